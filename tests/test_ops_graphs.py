"""Operators inside of graphs: registration, `torch.compile`, `torch.export`, FLOP counting."""

import pytest
import torch
from ops_support import INPUTS, OPERATORS, cast, fresh_seed, is_float, run
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.ops import scan_2d, selective_scan, ssd
from vision_ssm.ops.flops import scan_2d_flops, selective_scan_flops, ssd_flops

ARGUMENTS = {
    "selective_scan": ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "save"],
    "scan_2d": [
        *("x", "delta", "A", "B", "C", "D", "read", "write", "dt_weight", "dt_bias", "norm_weight", "norm_bias"),
        *("norm_eps", "delta_softplus", "segment", "merge", "save"),
    ],
    "ssd": ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "dt_softplus", "chunk_size"],
}
VARIANTS = [
    ("selective_scan", dict(groups=2)),
    ("selective_scan", dict(groups=2, skip=False, bias=False, softplus=False)),
    ("scan_2d", dict(write=True)),
    ("scan_2d", dict(rank=None, skip=False, bias=False, segment=4)),
    ("scan_2d", dict(norm=True)),
    ("scan_2d", dict(norm=True, per_route=True, merge=False)),
    ("ssd", {}),
    ("ssd", dict(skip=None, bias=False, initial=False)),
]


@pytest.fixture(autouse=True)
def _fresh_inputs():
    fresh_seed()


def arguments(op, options, requires_grad=True):
    """Inputs in the order of the schema."""
    defaults = {"delta_softplus": True, "norm_eps": 1e-5, "merge": True, "save": requires_grad}
    inputs = defaults | INPUTS[op](**options)
    return [
        value.requires_grad_(requires_grad) if is_float(value) else value for value in map(inputs.get, ARGUMENTS[op])
    ]


@pytest.mark.parametrize(("op", "options"), VARIANTS)
def test_opcheck(op, options):
    torch.library.opcheck(getattr(torch.ops.vision_ssm, op).default, arguments(op, options))


@pytest.mark.parametrize(("op", "options"), VARIANTS)
def test_opcheck_backward(op, options):
    inputs = arguments(op, options, requires_grad=False)
    outputs = getattr(torch.ops.vision_ssm, op)(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    backward = getattr(torch.ops.vision_ssm, f"{op}_backward").default
    torch.library.opcheck(backward, [*map(torch.randn_like, outputs), *inputs])


@pytest.mark.parametrize("op", OPERATORS)
def test_compile_fullgraph_sees_one_node(op):
    operator = OPERATORS[op][0]
    inputs = INPUTS[op]()
    graphs = []

    def backend(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if "vision_ssm" in str(node.target)])
        return module.forward

    torch._dynamo.reset()
    outputs = torch.compile(operator, fullgraph=True, backend=backend)(**inputs)
    assert graphs == [[f"vision_ssm.{op}.default"]]
    torch.testing.assert_close(outputs, operator(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_training_equals_eager(op):
    operator, inputs = OPERATORS[op][0], INPUTS[op]()
    torch._dynamo.reset()
    compiled = run(torch.compile(operator, fullgraph=True, backend="aot_eager"), inputs)
    for name, value in run(operator, inputs).items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize(
    ("op", "options", "others"),
    [
        ("selective_scan", dict(groups=4), dict(batch=3, length=33)),
        ("selective_scan", dict(constant="B"), dict(batch=3)),
        ("scan_2d", dict(write=True), dict(batch=3, size=(5, 7))),
        ("ssd", {}, dict(batch=3, length=40)),
    ],
)
def test_compile_with_dynamic_sizes(op, options, others):
    torch._dynamo.reset()
    compiled = torch.compile(OPERATORS[op][0], fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in (INPUTS[op](**options), INPUTS[op](**options | others)):
        torch.testing.assert_close(compiled(**inputs), OPERATORS[op][0](**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("op", OPERATORS)
def test_export(op):
    inputs = INPUTS[op]()
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    options = {name: value for name, value in inputs.items() if name not in names}

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return OPERATORS[op][0](**dict(zip(names, tensors)), **options)

    tensors = tuple(inputs[name] for name in names)
    program = torch.export.export(Module(), tensors)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count(f"vision_ssm.{op}.default") == 1
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors), rtol=0, atol=0)


def test_export_with_dynamic_batch():
    class Module(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    def tensors(batch):
        inputs = INPUTS["selective_scan"](batch=batch)
        return tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))

    batch = torch.export.Dim("batch")
    free = {0: batch}
    program = torch.export.export(Module(), tensors(2), dynamic_shapes=(free, free, None, free, free))
    others = tensors(5)
    torch.testing.assert_close(program.module()(*others), Module()(*others), rtol=0, atol=0)


def test_operators_do_not_differentiate_twice():
    inputs = cast(INPUTS["scan_2d"](), torch.float64)
    x = inputs.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(scan_2d(x, **inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="scan_2d_backward"):
        grad.sum().backward()


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def test_flops_selective_scan():
    inputs = INPUTS["selective_scan"](batch=2, dim=24, length=10, states=3)
    forward = selective_scan_flops(2, 10, 24, 3, gate=True)
    assert forward == 9 * 2 * 10 * 24 * 3 + 2 * (2 * 10 * 24)
    assert counted(lambda: selective_scan(**inputs)) == {"vision_ssm.selective_scan": forward}
    assert selective_scan_flops(2, 10, 24, 3, skip=False) == 9 * 2 * 10 * 24 * 3
    assert selective_scan_flops(2, 10, 24, 3) == forward - 2 * 10 * 24
    assert counted(lambda: run(selective_scan, inputs)) == {
        "vision_ssm.selective_scan": forward,
        "vision_ssm.selective_scan_backward": 2 * forward,
    }


def test_flops_scan_2d():
    inputs = INPUTS["scan_2d"](batch=2, size=(4, 5), dim=24, states=3, rank=2, steps=7)
    forward = scan_2d_flops(2, 7, 4, 24, 3, rank=2)
    assert forward == 2 * 7 * 4 * 24 * (9 * 3 + 1 + 2 * 2)
    assert counted(lambda: run(scan_2d, inputs)) == {
        "vision_ssm.scan_2d": forward,
        "vision_ssm.scan_2d_backward": 2 * forward,
    }
    full = INPUTS["scan_2d"](batch=2, size=(4, 5), dim=24, states=3, rank=None, skip=False)
    assert counted(lambda: scan_2d(**full)) == {"vision_ssm.scan_2d": 2 * 20 * 4 * 24 * 9 * 3}
    full["x"] = full["x"].unsqueeze(2).expand(-1, -1, 4, -1)  # every route has a map of its own
    assert counted(lambda: scan_2d(**full)) == {"vision_ssm.scan_2d": 2 * 20 * 4 * 24 * 9 * 3}


def test_flops_ssd():
    inputs = INPUTS["ssd"](batch=2, length=21, heads=6, width=5, states=7)
    forward = ssd_flops(2, 21, 6, 5, 7)
    assert forward == 2 * 21 * 30 * (9 * 7 + 1)
    assert counted(lambda: run(ssd, inputs)) == {"vision_ssm.ssd": forward, "vision_ssm.ssd_backward": 2 * forward}

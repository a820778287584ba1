"""The locally bi-directional scan: golden cases, its twin, graphs, and bad arguments."""

import golden_cases
import pytest
import torch
from ops_support import check, compare, fresh_seed, run, selective_scan_inputs
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.ops import local_selective_scan, select_backend, selective_scan
from vision_ssm.ops.composed_local_scan import make_table
from vision_ssm.ops.flops import local_selective_scan_flops
from vision_ssm.ops.local_selective_scan import default_window, local_scan
from vision_ssm.ops.reference import local_selective_scan_reference

FLOATS = (torch.float64, torch.float32)


@pytest.fixture(autouse=True)
def _fresh_inputs():
    fresh_seed()


def inputs_of(**options):
    inputs = selective_scan_inputs(**{"last_state": False, "groups": 1, **options})
    del inputs["return_last_state"]
    return inputs


@pytest.mark.parametrize("name", ["lbmamba_scan_w4", "lbmamba_scan_w3_L9"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_golden(name, backend, monkeypatch):
    monkeypatch.setenv("VISION_SSM_BACKEND", backend)
    case = golden_cases.load(f"ops/{name}")
    ours = {"dt": "delta", "dt_bias": "delta_bias"}
    inputs = {ours.get(key, key): torch.tensor(value).double() for key, value in case["inputs"].items()}
    cotangent = torch.tensor(case["grad_output"]).double()
    results = run(local_selective_scan, {**inputs, "delta_softplus": True, "window": case["window"]}, [cotangent])
    torch.testing.assert_close(results["output 0"], torch.tensor(case["output"]).double(), rtol=1e-6, atol=1e-6)
    assert len(case["gradients"]) == len(inputs)
    for key, value in case["gradients"].items():
        name = f"gradient of {ours.get(key, key)}"
        torch.testing.assert_close(results[name], torch.tensor(value).double(), rtol=1e-6, atol=1e-6)


def test_golden_windows():
    cases = golden_cases.load("ops/lbmamba_window")["cases"]
    assert len(cases) > 5 and all(default_window(length) == window for length, window in cases)


def test_worked_example():
    """One channel, one state, five steps, windows {0, 1}, {2, 3}, {4}."""
    step = torch.rand(5).double() + 0.1
    a, b = torch.exp(-step), step * torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0])
    forward = [b[0]]
    for t in range(1, 5):
        forward.append(a[t] * forward[-1] + b[t])
    want = torch.stack([b[0] + a[0] * b[1], forward[1], forward[2] + a[2] * b[3], forward[3], forward[4]])
    ones = torch.ones(1, 1, 5).double()
    y = local_selective_scan((b / step)[None, None], step[None, None], -ones[0, :, :1], ones, ones, window=2)
    torch.testing.assert_close(y, want[None, None])


def test_tables():
    tables = [[make_table(5, window, reverse, 2, "cpu").tolist() for window in (1, 2)] for reverse in (False, True)]
    assert tables[0] == [[[0, 1, 2, 3, 4]] * 2, [[1, 0, 3, 2, 5, 4]] * 2]
    assert tables[1] == [[[4, 3, 2, 1, 0]] * 2, [[3, 4, 1, 2, 5, 0]] * 2]


CASES = {
    "one step": dict(length=1, batch=16),
    "less than a window": dict(length=3, batch=16),
    "whole windows": dict(length=24),
    "partial window": dict(length=63),
    "windows of 8": dict(length=130, dim=6, batch=1),
    "groups": dict(groups=4, length=21),
    "bare": dict(skip=False, gate=False, bias=False, softplus=False),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_twin(options, dtype):
    inputs = inputs_of(**options)
    inputs["window"] = default_window(inputs["u"].shape[-1])
    compare("local_selective_scan", local_selective_scan, local_selective_scan_reference, inputs, dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 19, 40])
def test_twin_with_any_window(window):
    inputs = {**inputs_of(), "window": window}
    compare("local_selective_scan", local_selective_scan, local_selective_scan_reference, inputs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_twin_in_half_precision(dtype):
    inputs = {**inputs_of(), "window": 4}
    compare("local_selective_scan", local_selective_scan, local_selective_scan_reference, inputs, dtype)


def test_windows_of_one_step_are_the_plain_scan():
    inputs = inputs_of()
    torch.testing.assert_close(local_selective_scan(**inputs, window=1), selective_scan(**inputs))
    shared = {key: value[:, 0] if key in "BC" else value for key, value in inputs.items()}
    assert torch.equal(local_selective_scan(**shared), local_selective_scan(**inputs))


def test_reversed_sequences_and_low_rank_step_sizes():
    """What models call: channel-last, step sizes of low rank, walked from the end."""
    shapes = dict(x=(2, 21, 1, 6), delta=(2, 21, 1, 2), B=(2, 21, 1, 3), C=(2, 21, 1, 3))
    maps = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    others = dict(dt_weight=torch.randn(1, 6, 2).double(), dt_bias=torch.randn(1, 6).double())
    decay, skip = -torch.rand(1, 6, 3).double(), torch.randn(1, 6).double()
    y = local_scan(**maps, A=decay, D=skip, window=4, **others)
    flipped = {name: value.flip(1) for name, value in maps.items()}
    turned = local_scan(**flipped, A=decay, D=skip, window=4, reverse=True, **others)
    torch.testing.assert_close(turned.flip(1), y)
    full = maps["delta"] @ others["dt_weight"][0].T
    channels = {"u": maps["x"][:, :, 0].mT, "delta": full[:, :, 0].mT}
    channels |= {name: maps[name][:, :, 0].mT for name in "BC"}
    same = local_selective_scan(
        **channels, A=decay[0], D=skip[0], delta_bias=others["dt_bias"][0], delta_softplus=True, window=4
    )
    torch.testing.assert_close(same.mT, y[:, :, 0])


def test_autocast_changes_nothing():
    inputs = inputs_of()
    want = run(local_selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(local_selective_scan, inputs)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_inference_mode_leaves_tables_that_training_can_use():
    inputs = inputs_of(length=23)
    with torch.inference_mode():
        local_selective_scan(**inputs, window=7)
    run(local_selective_scan, {**inputs, "window": 7})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(local_selective_scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (19, 19, 140):
        inputs = inputs_of(length=length, dim=6)
        got = run(compiled, inputs)
        for name, value in run(local_selective_scan, inputs).items():
            check(name, got[name], value, 1e-6)


def test_exports():
    inputs = inputs_of()
    options = {name: inputs.pop(name) for name in ("delta_softplus",)}

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return local_selective_scan(**dict(zip(inputs, tensors)), **options)

    tensors = tuple(inputs.values())
    program = torch.export.export(Module(), tensors)
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("window", [1, 4])
def test_flops(window):
    inputs = inputs_of(batch=2, dim=24, length=10, states=3, gate=False)
    with FlopCounterMode(display=False) as counter:
        run(local_selective_scan, {**inputs, "window": window})
    forward = local_selective_scan_flops(2, 10, 24, 3, window)
    assert counter.get_total_flops() == 3 * forward
    assert forward == (9 * 2 * 24 * 3 * 10) * (1 + (window > 1)) + 2 * 24 * 10


def low_rank_inputs(window, bias=True):
    """Arguments of the operator, in the order of its schema."""
    shapes = [(2, 10, 2, 6), (2, 10, 2, 3), (2, 6, 4), (2, 10, 2, 4), (2, 10, 2, 4), (2, 6), (2, 6, 3), (2, 6)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    return [*tensors[:7], tensors[7] if bias else None, True, window, False]


@pytest.mark.parametrize("window", [1, 4, 5])
def test_opcheck(window):
    inputs = low_rank_inputs(window)
    leaves = [value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in inputs]
    torch.library.opcheck(torch.ops.vision_ssm.local_selective_scan.default, leaves)
    plain = low_rank_inputs(window, bias=False)
    cotangent = torch.randn_like(plain[0])
    torch.library.opcheck(torch.ops.vision_ssm.local_selective_scan_backward.default, [cotangent, *plain])


def test_backend_is_that_of_the_scan_it_calls(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    assert select_backend(torch.zeros(1), "local_selective_scan") == select_backend(torch.zeros(1), "scan_2d")


BAD = [
    ("u", lambda t: t[0], ValueError, r"u must be \(batch, dim, L\), got shape \(24, 19\)"),
    ("u", lambda t: t.long(), TypeError, "u must be floating-point, got torch.int64"),
    ("A", lambda t: t.to(torch.complex64), TypeError, r"A is complex \(torch.complex64\)"),
    ("A", lambda t: t[1:], ValueError, r"A has shape \(23, 3\), expected \(dim, N\) = \(24, 3\)"),
    ("delta", lambda t: t[..., 1:], ValueError, r"delta has shape .* like u"),
    ("B", lambda t: t[0, 0], ValueError, r"B must be \(batch, G, N, L\), got shape \(3, 19\)"),
    ("B", lambda t: t.expand(-1, 5, -1, -1), ValueError, "B has 5 groups, which do not divide the 24 channels of u"),
    ("C", lambda t: t.expand(-1, 2, -1, -1), ValueError, r"C has shape \(2, 2, 3, 19\), expected \(batch, G, N, L\)"),
    ("D", lambda t: t[1:], ValueError, r"D has shape \(23,\), expected \(dim\)"),
    ("z", lambda t: t[1:], ValueError, r"z has shape .* like u"),
    ("delta_bias", lambda t: t[1:], ValueError, r"delta_bias has shape \(23,\), expected \(dim\)"),
    ("window", lambda t: 0, ValueError, "window must be a positive whole number, got 0"),
    ("window", lambda t: 2.5, ValueError, "window must be a positive whole number, got 2.5"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), BAD)
def test_bad_arguments(name, spoil, error, message):
    inputs = {**inputs_of(), "window": None}
    inputs[name] = spoil(inputs[name])
    with pytest.raises(error, match=f"^local_selective_scan: .*{message}"):
        local_selective_scan(**inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter; kernels mean infinity
def test_through_triton_kernels(interpreter, monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    assert select_backend(torch.zeros(1), "local_selective_scan").name == "triton"
    inputs = {**inputs_of(length=11, batch=1, dim=5, states=2), "window": 4}
    compare("local_selective_scan", local_selective_scan, local_selective_scan_reference, inputs, torch.float32)

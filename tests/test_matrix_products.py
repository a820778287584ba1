"""Operators that are matrix products, such as non-causal SSD: against their twins, and in graphs."""

import types
import warnings

import pytest
import torch
from ops_support import TOLERANCE, check, compare, fresh_seed, is_float, run
from plstm_support import plstm_inputs
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.ops import hidden_state_mixer, noncausal_ssd, plstm2d, select_backend
from vision_ssm.ops.backend import MATRIX_PRODUCTS
from vision_ssm.ops.flops import hidden_state_mixer_flops, noncausal_ssd_flops
from vision_ssm.ops.reference import hidden_state_mixer_reference, noncausal_ssd_reference
from vision_ssm.ops.torch_plstm import plstm2d_reference


@pytest.fixture(autouse=True)
def _fresh_inputs():
    fresh_seed()


def ssd_inputs(batch=2, length=19, heads=6, width=5, states=3, groups=2, skip="heads", bias=True, softplus=True):
    """Keyword arguments of `noncausal_ssd`; `skip` is "heads", "channels" or None."""
    dt = torch.randn(batch, length, heads)
    inputs = {
        "x": torch.randn(batch, length, heads, width),
        "dt": dt if softplus else dt.abs(),
        "A": -0.1 - torch.rand(heads),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
        "dt_softplus": softplus,
    }
    if skip:
        inputs["D"] = torch.randn((heads,) if skip == "heads" else (heads, width))
    if bias:
        inputs["dt_bias"] = torch.randn(heads) - 1
    return inputs


def mixer_inputs(batch=2, length=19, dim=6, states=4, inner=5):
    """Keyword arguments of `hidden_state_mixer`."""
    inputs = {name: torch.randn(batch, length, states) for name in ("dt", "B", "C")}
    return {"x": torch.randn(batch, length, dim)} | inputs | {
        "in_weight": torch.randn(2 * inner, dim) / dim**0.5,
        "out_weight": torch.randn(dim, inner) / inner**0.5,
        "D": torch.randn(1),
    }


OPERATORS = {
    "noncausal_ssd": (noncausal_ssd, noncausal_ssd_reference, ssd_inputs),
    "hidden_state_mixer": (hidden_state_mixer, hidden_state_mixer_reference, mixer_inputs),
    "plstm2d": (plstm2d, plstm2d_reference, plstm_inputs),
}
ARGUMENTS = {
    "noncausal_ssd": ["x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus"],
    "hidden_state_mixer": ["x", "dt", "B", "C", "in_weight", "out_weight", "D", "A"],
    "plstm2d": list(plstm_inputs()),
}
CASES = [
    ("noncausal_ssd", {}),
    ("noncausal_ssd", dict(groups=1, skip="channels")),
    ("noncausal_ssd", dict(groups=6, skip=None, bias=False, softplus=False)),
    ("noncausal_ssd", dict(batch=1, length=1, heads=1, width=1, states=1, groups=1)),
    ("hidden_state_mixer", {}),
    ("hidden_state_mixer", dict(batch=1, length=7, dim=1, states=1, inner=1)),
    ("hidden_state_mixer", dict(length=2, dim=3, states=5, inner=12)),
    ("plstm2d", {}),
    ("plstm2d", dict(orientations=1, states=2, turns="L", direct=False)),
]


def test_they_are_all_here():
    assert set(OPERATORS) == {*MATRIX_PRODUCTS, "plstm2d"}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("op", "options"), CASES, ids=str)
def test_twin(op, options, dtype):
    operator, twin, inputs = OPERATORS[op]
    compare(op, operator, twin, inputs(**options), dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_results_are_wide(op):
    operator, _, inputs = OPERATORS[op]
    for dtype, wide in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        given = {name: value.to(dtype) if is_float(value) else value for name, value in inputs().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = operator(**given)
        assert {output.dtype for output in (outputs if isinstance(outputs, tuple) else (outputs,))} == {wide}


def test_sums_over_a_large_map_leave_the_range_of_float16():
    length = 4096
    x, steps = torch.full((1, length, 2, 4), 100.0).half(), torch.ones(1, length, 2).half()
    matrix = torch.full((1, length, 1, 3), 10.0).half()
    y = noncausal_ssd(x, steps, -torch.ones(2), matrix, matrix)
    assert torch.equal(y, torch.full_like(y, 3 * 100 * 100.0 * length)) and y.min() > torch.finfo(torch.float16).max


def test_heads_take_turns_between_groups():
    """Of four heads and two groups, heads 0 and 2 belong to group 0; the order of the tokens does not matter."""
    inputs = ssd_inputs(heads=4, groups=2)
    changed = dict(inputs, B=inputs["B"].clone())
    changed["B"][:, :, 0] += 1
    same = (noncausal_ssd(**inputs) == noncausal_ssd(**changed)).flatten(3).all(3).all(1).all(0)
    assert same.tolist() == [False, True, False, True]
    order = torch.randperm(19)
    moved = {k: v[:, order] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    torch.testing.assert_close(noncausal_ssd(**moved), noncausal_ssd(**inputs)[:, order])


def test_decay_of_the_hidden_state_mixer_is_inert():
    inputs = mixer_inputs()
    decay = torch.rand(4, requires_grad=True)
    with_decay, without = hidden_state_mixer(**inputs, A=decay), hidden_state_mixer(**inputs)
    for got, want, twin in zip(with_decay, without, hidden_state_mixer_reference(**inputs, A=decay)):
        assert torch.equal(got, want)
        check("y", got, twin, TOLERANCE[torch.float32])
    sum(output.sum() for output in with_decay).backward()
    assert torch.equal(decay.grad, torch.zeros(4))


@pytest.mark.parametrize("index", [0, 1])
def test_one_output_of_the_hidden_state_mixer_alone(index):
    inputs, sides = mixer_inputs(), []
    for function in (hidden_state_mixer, hidden_state_mixer_reference):
        leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
        function(**leaves)[index].sum().backward()
        sides.append(leaves)
    for name, leaf in sides[1].items():
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # C does not reach the states
        check(name, sides[0][name].grad, want, TOLERANCE[torch.float64])


def arguments(op, options, requires_grad=True):
    """Inputs in the order of the schema, in which D is (heads, 1) or (heads, P)."""
    inputs = OPERATORS[op][2](**options)
    if op == "noncausal_ssd" and "D" in inputs and inputs["D"].dim() == 1:
        inputs["D"] = inputs["D"].unsqueeze(1)
    return [value.requires_grad_(requires_grad) if is_float(value) else value for value in map(inputs.get, ARGUMENTS[op])]


@pytest.mark.parametrize(("op", "options"), [CASES[0], CASES[2], CASES[4], *CASES[-2:]], ids=str)
def test_opcheck(op, options):
    torch.library.opcheck(getattr(torch.ops.vision_ssm, op).default, arguments(op, options))
    inputs = arguments(op, options, requires_grad=False)
    outputs = getattr(torch.ops.vision_ssm, op)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    backward = getattr(torch.ops.vision_ssm, f"{op}_backward").default
    torch.library.opcheck(backward, [*map(torch.randn_like, outputs), *inputs])


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_training_equals_eager(op):
    operator, _, inputs = OPERATORS[op]
    given = inputs()
    torch._dynamo.reset()
    compiled = run(torch.compile(operator, fullgraph=True, backend="aot_eager"), given)
    for name, value in run(operator, given).items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.parametrize(
    ("op", "formula", "sizes", "per_image"),
    [
        ("noncausal_ssd", noncausal_ssd_flops, dict(length=21, heads=6, width=5, states=7), 21 * 30 * (2 * 2 * 7 + 1)),
        ("hidden_state_mixer", hidden_state_mixer_flops, dict(length=21, dim=6, states=4, inner=5), 4 * (4 * 126 + 6 * 30)),
    ],
)  # fmt: skip
def test_flops(op, formula, sizes, per_image):
    operator, _, inputs = OPERATORS[op]
    with FlopCounterMode(display=False) as counter:
        run(operator, inputs(batch=2, **sizes))
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    forward = formula(2, **sizes)
    assert forward == 2 * per_image
    assert counted == {f"vision_ssm.{op}": forward, f"vision_ssm.{op}_backward": 2 * forward}


@pytest.mark.parametrize("op", MATRIX_PRODUCTS)
def test_no_kernel_is_missed(op, monkeypatch):
    """On a GPU as well PyTorch's products are the fast path: no warning, and nothing that triton could be asked for."""
    tensor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(tensor, op) == ("chunked", "")
        monkeypatch.setenv("VISION_SSM_BACKEND", "triton")
        assert select_backend(tensor, op) == ("chunked", "")
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    operator, twin, inputs = OPERATORS[op]
    given = inputs()
    for name, value in run(twin, given).items():
        assert torch.equal(run(operator, given)[name], value)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("noncausal_ssd", dict(x=torch.zeros(2, 19, 30)), ValueError, r"x must be \(B, L, heads, P\), got shape \(2, 19"),
        ("noncausal_ssd", dict(dt=torch.zeros(2, 19, 5)), ValueError, r"dt has shape \(2, 19, 5\), expected \(B, L, heads\)"),
        ("noncausal_ssd", dict(A=torch.zeros(5)), ValueError, r"A has shape \(5,\), expected \(heads\) = \(6,\)"),
        ("noncausal_ssd", dict(C=torch.zeros(2, 19, 1, 3)), ValueError, r"C has shape .*, expected \(B, L, groups, N\)"),
        ("noncausal_ssd", dict(D=torch.zeros(6, 2)), ValueError, r"expected \(heads\) or \(heads, P\) = \(6, 5\)"),
        ("noncausal_ssd", dict(dt_bias=torch.zeros(1)), ValueError, "dt_bias has shape"),
        ("noncausal_ssd", dict(B=torch.zeros(2, 19, 4, 3), C=torch.zeros(2, 19, 4, 3)), ValueError, "4 groups, which do not divide the 6 heads"),
        ("noncausal_ssd", dict(x=torch.zeros(2, 19, 6, 5, dtype=torch.long)), TypeError, "x must be floating-point"),
        ("hidden_state_mixer", dict(B=torch.zeros(2, 19, 3)), ValueError, r"B has shape \(2, 19, 3\), expected \(B, L, N\)"),
        ("hidden_state_mixer", dict(in_weight=torch.zeros(5, 6)), ValueError, r"expected \(2 \* inner, dim\) = \(10, 6\)"),
        ("hidden_state_mixer", dict(out_weight=torch.zeros(5, 5)), ValueError, r"expected \(dim, inner\) = \(6, 5\)"),
        ("hidden_state_mixer", dict(D=torch.zeros(6)), ValueError, r"D has shape \(6,\), expected \(1\)"),
        ("hidden_state_mixer", dict(A=torch.zeros(1)), ValueError, r"A has shape \(1,\), expected \(N\) = \(4,\)"),
        ("hidden_state_mixer", dict(x=torch.zeros(2, 19)), ValueError, r"x must be \(B, L, dim\)"),
    ],
)  # fmt: skip
def test_bad_input(op, change, error, message):
    operator, _, inputs = OPERATORS[op]
    with pytest.raises(error, match=message):
        operator(**{**inputs(), **change})

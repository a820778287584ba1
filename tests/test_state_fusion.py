"""State fusion: PyTorch path and Triton kernels, in Triton's interpreter and on a GPU, against the twin in float64."""

import golden_cases
import pytest
import torch
from ops_support import TOLERANCE, Poison, cast, check, compare, fresh_seed, run
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm import kernels
from vision_ssm.ops import scan_2d, select_backend, state_fusion
from vision_ssm.ops.state_fusion import state_fusion_flops
from vision_ssm.ops.torch_state_fusion import state_fusion_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = golden_cases.load("ops/spatialmamba_state_fusion")["cases"]

# (B, H, W, D)
SHAPES = {
    "one cell": (2, 1, 1, 5),
    "one row": (1, 1, 9, 16),
    "one column": (1, 9, 1, 5),
    "smaller than the kernels": (2, 3, 4, 8),
    "several bands of rows": (1, 9, 2, 8),
    "wide": (1, 2, 29, 5),
    "more channels than a block": (1, 2, 2, 40),
}
ODD = (1, 2, 3, 24)


@pytest.fixture(autouse=True)
def _fresh_inputs(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    fresh_seed()


@pytest.fixture(params=["torch", "interpreter"])
def path(request):
    """Runs a test on the PyTorch path and with the kernels."""
    if request.param == "interpreter":
        request.getfixturevalue("interpreter")
    return request.param


def fusion_inputs(shape):
    """Keyword arguments of `state_fusion`."""
    *place, dim = shape
    return {
        "states": torch.randn(shape),
        "kernels": torch.randn(3, dim, 3, 3),
        "alpha": torch.randn(3),
        "C": torch.randn(*place, 1),
        "D": torch.randn(dim),
        "x": torch.randn(shape),
    }


def compare_with_twin(shape, dtype):
    compare("state_fusion", state_fusion, state_fusion_reference, fusion_inputs(shape), dtype)


def bare_fusion(operator, states, kernels, alpha):
    """The fused states alone: read out by 1, nothing skipped."""
    dim = states.shape[3]
    return operator(states, kernels, alpha, states.new_ones(*states.shape[:3], 1), states.new_zeros(dim), states)


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
@pytest.mark.parametrize("operator", [state_fusion, state_fusion_reference], ids=["torch", "reference"])
def test_golden(case, operator):
    """Scan, fusion and read-out of the original: outputs and the gradient of everything."""
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in case["inputs"].items()}
    given = {key: value.requires_grad_() for key, value in given.items()}
    height, width = case["H"], case["W"]
    batch, dim, length = given["u"].shape
    x, delta, b, c = (given[key].transpose(1, 2) for key in ("u", "delta", "B", "C"))  # (B, L, D) or (B, L, 1)
    states = scan_2d(
        x,
        delta.unsqueeze(2),
        -given["A_log"].exp().unsqueeze(0),
        b.unsqueeze(2),
        torch.ones_like(c).unsqueeze(2),
        read=torch.arange(length).unsqueeze(0),
        dt_bias=given["dt_bias"].unsqueeze(0),
    )
    states = states.view(batch, height, width, dim)
    weights = torch.cat([given[key].transpose(0, 1) for key in ("kernel_3", "kernel_3_1", "kernel_3_2")])
    c = c.reshape(batch, height, width, 1)
    y = operator(states, weights, given["alpha"], c, given["D"], x.reshape(states.shape))
    exact = dict(rtol=1e-9, atol=1e-12)

    def expect(name, have):
        want = torch.tensor(case["outputs"][name], dtype=torch.float64)
        torch.testing.assert_close(have.permute(0, 3, 1, 2).reshape(want.shape), want, **exact)

    expect("h", states)
    expect("fused", bare_fusion(operator, states, weights, given["alpha"]))
    expect("y", y)
    cotangent = torch.tensor(case["grad_output"]["y"], dtype=torch.float64)  # (B, D, L)
    y.backward(cotangent.transpose(1, 2).reshape(y.shape))
    assert given.keys() == case["grad_inputs"].keys()
    for key, value in case["grad_inputs"].items():
        torch.testing.assert_close(given[key].grad, torch.tensor(value, dtype=torch.float64), **exact)


def test_beyond_the_edge_lies_the_edge(path):
    """A row a b c, and the tap three cells to the left."""
    states = torch.tensor([2.0, 3.0, 5.0]).view(1, 1, 3, 1).requires_grad_()
    weights = torch.zeros(3, 1, 3, 3)
    weights[1, 0, 1, 0] = 1.0
    fused = bare_fusion(state_fusion, states, weights, torch.ones(3))
    assert fused.flatten().tolist() == [2.0, 2.0, 2.0]
    fused.sum().backward()
    assert states.grad.flatten().tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(path, shape):
    compare_with_twin(shape, torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin_in_float64(shape):
    compare_with_twin(shape, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(path, dtype):
    """Half states, C and x: the result is float32."""
    compare_with_twin(ODD, dtype)
    inputs = cast(fusion_inputs(ODD), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = state_fusion(**inputs)
    assert y.dtype == torch.float32 and torch.equal(y, state_fusion(**inputs))
    wide = {name: value.float() for name, value in inputs.items()}
    torch.testing.assert_close(y, state_fusion(**wide))


def test_mixed_precision(path):
    """As in a model under autocast: float32 states, everything else in half precision."""
    inputs = cast(fusion_inputs(ODD), torch.bfloat16)
    inputs["states"] = torch.randn(ODD)
    exact = {name: value.double() for name, value in inputs.items()}
    got = run(state_fusion, inputs)
    for name, value in run(state_fusion_reference, exact).items():
        tolerance = TOLERANCE[torch.float32 if name in ("output 0", "gradient of states") else torch.bfloat16]
        check(name, got[name], value, tolerance)


def test_views(path):
    """C as a part of a projection, x as half of one, maps in other memory, and an expanded gradient."""
    inputs = fusion_inputs(ODD)
    want = run(state_fusion, inputs, [torch.ones(ODD)])
    nan = torch.full_like(inputs["x"], torch.nan)
    views = inputs | {
        "C": torch.cat([nan[..., :5], inputs["C"], nan[..., :2]], dim=-1)[..., 5:6],
        "x": torch.cat([inputs["x"], nan], dim=-1).chunk(2, dim=-1)[0],
        "states": inputs["states"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "kernels": inputs["kernels"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    leaves = {name: value.detach().requires_grad_() for name, value in views.items()}
    y = state_fusion(**leaves)
    y.backward(torch.ones(()).expand(ODD))
    torch.testing.assert_close(y, want["output 0"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, want[f"gradient of {name}"])


def test_no_images(path):
    got = run(state_fusion, fusion_inputs((0, 3, 3, 5)))
    want = run(state_fusion_reference, fusion_inputs((0, 3, 3, 5)))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("shape", [ODD, SHAPES["wide"], SHAPES["one cell"]], ids=str)
def test_no_uninitialised_memory_is_read(interpreter, monkeypatch, shape):
    """Outputs are NaN before the kernels run, and every element of them is written."""
    module = kernels.find("state_fusion")
    poison = Poison(monkeypatch)
    monkeypatch.setitem(module.__dict__, "__name__", "vision_ssm.ops, for Poison")
    compare_with_twin(shape, torch.float32)
    assert poison.count > 0


def test_repetition_is_bit_equal(path):
    inputs = fusion_inputs(ODD)
    first, second = run(state_fusion, inputs), run(state_fusion, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_opcheck(path):
    inputs = fusion_inputs((1, 2, 2, 5))
    arguments = [inputs[name] for name in ("states", "kernels", "C", "D", "x")]
    grad = torch.randn_like(inputs["x"])
    torch.library.opcheck(torch.ops.vision_ssm.state_fusion_backward.default, [grad, *arguments])
    leaves = [value.requires_grad_() for value in arguments]
    torch.library.opcheck(torch.ops.vision_ssm.state_fusion.default, leaves)


def test_gradcheck():
    inputs = {name: value.double().requires_grad_() for name, value in fusion_inputs((1, 2, 3, 2)).items()}
    assert torch.autograd.gradcheck(state_fusion, tuple(inputs.values()))


def test_compiled_training_equals_eager():
    inputs = fusion_inputs(ODD)
    torch._dynamo.reset()
    compiled = torch.compile(state_fusion, fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs)
    for name, value in run(state_fusion, inputs).items():
        torch.testing.assert_close(got[name], value)


def test_reference_backend_runs_the_twin(monkeypatch):
    inputs = fusion_inputs(ODD)
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert torch.equal(state_fusion(**inputs), state_fusion_reference(**inputs))


def test_flops():
    with FlopCounterMode(display=False) as counter:
        run(state_fusion, fusion_inputs((2, 4, 5, 6)))
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    forward = state_fusion_flops(2 * 4 * 5 * 6)
    assert forward == 55 * 240
    assert flops == {"vision_ssm.state_fusion": forward, "vision_ssm.state_fusion_backward": 2 * forward}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(states=[1.0]), TypeError, "state_fusion: states must be a tensor, got list"),
        (dict(x=torch.zeros(1, 4, 4, 6).int()), TypeError, "x must be floating-point"),
        (dict(states=torch.zeros(4, 4, 6)), ValueError, r"states must be \(B, H, W, D\), got shape \(4, 4, 6\)"),
        (dict(states=torch.zeros(1, 0, 4, 6)), ValueError, "without an empty dimension"),
        (dict(kernels=torch.zeros(3, 5, 3, 3)), ValueError, r"kernels has shape .* expected \(3, D, 3, 3\) = \(3, 6,"),
        (dict(alpha=torch.zeros(2)), ValueError, r"alpha has shape \(2,\), expected \(3\)"),
        (dict(C=torch.zeros(1, 4, 4, 6)), ValueError, r"C has shape .* expected \(B, H, W, 1\) = \(1, 4, 4, 1\)"),
        (dict(D=torch.zeros(6, device="meta")), ValueError, "D is on meta but states is on cpu"),
        (dict(x=torch.zeros(1, 4, 5, 6)), ValueError, r"x has shape .* expected \(B, H, W, D\)"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        state_fusion(**fusion_inputs((1, 4, 4, 6)) | arguments)


# Spatial-Mamba-T at 224 x 224, and sizes that fill no tile
GPU_SHAPES = [(4, 56, 56, 128), (2, 28, 28, 256), (2, 14, 14, 512), (2, 7, 7, 1024), (3, 17, 41, 37), (2, 1, 1, 5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_on_a_gpu(shape, dtype):
    """Against the twin in float64, and bit-equal on repetition."""
    inputs = {name: value.cuda() for name, value in fusion_inputs(shape).items()}
    assert select_backend(inputs["states"], "state_fusion") == ("triton", "")
    compare("state_fusion", state_fusion, state_fusion_reference, inputs, dtype)
    inputs = cast(inputs, dtype)
    second = run(state_fusion, inputs)
    for name, value in run(state_fusion, inputs).items():
        assert torch.equal(value, second[name]), name

"""Depthwise convolution: PyTorch path and Triton kernels, in Triton's interpreter, against the twin in float64."""

import pytest
import torch
from ops_support import TOLERANCE, Poison, check, fresh_seed
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm import kernels
from vision_ssm.ops.depthwise_conv import depthwise_conv, depthwise_conv_flops
from vision_ssm.ops.torch_depthwise_conv import depthwise_conv_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "silu", "gelu")

# (B, H, W, C), kernel size
CASES = {
    "square": ((2, 7, 7, 16), (3, 3)),
    "several bands of rows": ((1, 9, 4, 16), (3, 3)),
    "one position": ((16, 1, 1, 24), (3, 3)),
    "one row": ((3, 1, 7, 5), (3, 3)),
    "one column": ((3, 7, 1, 5), (3, 3)),
    "two rows": ((2, 2, 5, 24), (3, 3)),
    "map cut along its width": ((1, 1, 29, 8), (3, 3)),
    "more channels than a block": ((1, 4, 1, 40), (3, 3)),
    "5 x 5": ((1, 7, 6, 5), (5, 5)),
    "5 x 5, two columns": ((2, 7, 2, 5), (5, 5)),
    "7 x 7": ((2, 9, 10, 5), (7, 7)),
    "9 x 9, one row": ((1, 1, 17, 6), (9, 9)),
    "9 x 3, many parts": ((40, 1, 2, 16), (9, 3)),
    "1 x 7": ((1, 3, 9, 16), (1, 7)),
    "7 x 1": ((1, 9, 3, 16), (7, 1)),
    "1 x 1": ((1, 3, 5, 5), (1, 1)),
}
ODD = ((1, 3, 4, 24), (3, 3))
LARGE = ((1, 3, 4, 5), (5, 5))  # takes another path of the kernels than 3 x 3
LARGEST = ((1, 3, 4, 5), (7, 7))  # and this one a third


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


def conv_inputs(shape, size, bias=True, scale=1.0):
    """x, weight and bias."""
    tensors = [torch.randn(shape) * scale, torch.randn(shape[3], 1, *size)]
    return [*tensors, torch.randn(shape[3])] if bias else tensors


def differentiate(operator, tensors, activation, cotangent):
    """Output and gradients by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = operator(*leaves, activation=activation)
    grads = torch.autograd.grad(y, leaves, cotangent.to(y.dtype))
    return {"y": y.detach()} | {f"gradient of {name}": grad for name, grad in zip(("x", "weight", "bias"), grads)}


def compare_with_twin(tensors, activation, dtype, parameters=None):
    """x in `dtype`; weight and bias in that of `parameters`, by default float32 at least."""
    parameters = parameters or torch.promote_types(dtype, torch.float32)
    tensors = [tensor.to(parameters if i else dtype) for i, tensor in enumerate(tensors)]
    exact = [tensor.double() for tensor in tensors]
    cotangent = torch.randn(tensors[0].shape).to(dtype)
    want = differentiate(depthwise_conv_reference, exact, activation, cotangent)
    got = differentiate(depthwise_conv, tensors, activation, cotangent)
    for name, value in want.items():
        check(name, got[name], value, TOLERANCE[dtype])
    assert got["y"].dtype == dtype
    for tensor, name in zip(tensors, ("x", "weight", "bias")):
        assert got[f"gradient of {name}"].dtype == tensor.dtype


@pytest.mark.parametrize("case", CASES)
def test_twin(path, case):
    compare_with_twin(conv_inputs(*CASES[case]), "silu", torch.float32)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "size"), [ODD, LARGE, LARGEST], ids=["3 x 3", "5 x 5", "7 x 7"])
def test_activations(path, shape, size, activation, bias):
    compare_with_twin(conv_inputs(shape, size, bias), activation, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "size"), CASES.values(), ids=CASES)
def test_twin_in_float64(shape, size, activation):
    compare_with_twin(conv_inputs(shape, size), activation, torch.float64)


@pytest.mark.parametrize("wide", [True, False], ids=["float32 parameters", "same dtype"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "size"), [ODD, LARGE, LARGEST], ids=["3 x 3", "5 x 5", "7 x 7"])
def test_half_precision(path, shape, size, dtype, wide):
    compare_with_twin(conv_inputs(shape, size), "silu", dtype, torch.float32 if wide else dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter, where kernels count on infinity
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("scale", [1e2, 1e15, 1e30])
def test_large_values(path, activation, scale):
    """Large pre-activations of both signs: no overflow where the twin has none."""
    compare_with_twin(conv_inputs(*ODD, scale=scale), activation, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_computes_in_float32(interpreter, activation):
    """Half-precision inputs are computed as their float32 values are, whatever autocast says."""
    tensors = [tensor.bfloat16() for tensor in conv_inputs(*ODD)]
    plain = depthwise_conv(*tensors, activation=activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(depthwise_conv(*tensors, activation=activation), plain)
    wide = depthwise_conv(*(tensor.float() for tensor in tensors), activation=activation)
    torch.testing.assert_close(plain.float(), wide, rtol=2**-7, atol=0)  # the interpreter rounds towards 0


def test_torch_path_is_a_channels_last_convolution():
    """In bfloat16 it gives what the layer under autocast gives, and float32 islands stay so."""
    x, weight, bias = conv_inputs(*ODD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3])
        assert torch.equal(depthwise_conv(x.bfloat16(), weight, bias), want.permute(0, 2, 3, 1))
        assert depthwise_conv(x, weight, bias).dtype == torch.float32


def test_slice_of_channels(path):
    """Half of a projection, as gated blocks give it, and an expanded gradient."""
    x, weight, bias = conv_inputs(*ODD)
    half = torch.cat([x, torch.full_like(x, torch.nan)], dim=-1).chunk(2, dim=-1)[0]
    one = torch.ones(())
    want = differentiate(depthwise_conv, [x, weight, bias], "silu", one.expand_as(x).contiguous())
    got = differentiate(depthwise_conv, [half, weight, bias], "silu", one.expand_as(x))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_other_strides(path):
    """Channels-first memory and a transposed map: the same numbers."""
    x, weight, bias = conv_inputs((2, 5, 5, 8), (3, 3))
    want = depthwise_conv(x, weight, bias)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(depthwise_conv(strided, weight, bias), want)
    transposed = depthwise_conv(x.transpose(1, 2), weight.transpose(2, 3), bias)
    torch.testing.assert_close(transposed, want.transpose(1, 2))


@pytest.mark.parametrize("batch", [0, 1])
def test_no_images(path, batch):
    tensors = conv_inputs((batch, 3, 3, 5), (3, 3))
    want = differentiate(depthwise_conv_reference, tensors, "silu", torch.ones_like(tensors[0]))
    got = differentiate(depthwise_conv, tensors, "silu", torch.ones_like(tensors[0]))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(("shape", "size"), [ODD, LARGE, LARGEST, ((1, 2, 29, 5), (3, 3))], ids=["3 x 3", "5 x 5", "7 x 7", "wide"])
def test_no_uninitialised_memory_is_read(interpreter, monkeypatch, shape, size):
    """Outputs are NaN before the kernels run, and every element of them is written."""
    module = kernels.find("depthwise_conv")
    poison = Poison(monkeypatch)
    monkeypatch.setitem(module.__dict__, "__name__", "vision_ssm.ops, for Poison")
    compare_with_twin(conv_inputs(shape, size), "silu", torch.float32)
    assert poison.count > 0


@pytest.mark.parametrize(("shape", "size"), [ODD, LARGE, LARGEST], ids=["3 x 3", "5 x 5", "7 x 7"])
def test_repetition_is_bit_equal(path, shape, size):
    tensors = conv_inputs(shape, size)
    first, second = (differentiate(depthwise_conv, tensors, "gelu", tensors[0]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(bias):
    tensors = [tensor.double().requires_grad_() for tensor in conv_inputs((1, 3, 2, 2), (3, 3), bias)]
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *values: depthwise_conv(*values, activation=activation), tensors)  # noqa: B023


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(path, bias):
    x, weight, *rest = conv_inputs((1, 1, 2, 5), (3, 3), bias)
    arguments = [x, weight, rest[0] if bias else None, "silu"]
    grad = torch.randn_like(x)
    torch.library.opcheck(torch.ops.vision_ssm.depthwise_conv_backward.default, [grad, *arguments])
    leaves = [value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(torch.ops.vision_ssm.depthwise_conv.default, leaves)


def test_compile_fullgraph_sees_one_node():
    tensors = conv_inputs(*ODD)
    graphs = []

    def backend(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if "vision_ssm" in str(node.target)])
        return module.forward

    torch._dynamo.reset()
    y = torch.compile(depthwise_conv, fullgraph=True, backend=backend)(*tensors, activation="silu")
    assert graphs == [["vision_ssm.depthwise_conv.default"]]
    assert torch.equal(y, depthwise_conv(*tensors, activation="silu"))


def test_compiled_training_equals_eager():
    tensors = conv_inputs(*ODD)
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager")
    got = differentiate(compiled, tensors, "silu", tensors[0])
    for name, value in differentiate(depthwise_conv, tensors, "silu", tensors[0]).items():
        assert torch.equal(got[name], value), name


def test_reference_backend_runs_the_twin(monkeypatch):
    tensors = conv_inputs(*ODD)
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert torch.equal(
        depthwise_conv(*tensors, activation="gelu"), depthwise_conv_reference(*tensors, activation="gelu")
    )


def test_flops():
    tensors = conv_inputs((2, 4, 5, 6), (3, 5))
    with FlopCounterMode(display=False) as counter:
        differentiate(depthwise_conv, tensors, "silu", tensors[0])
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    forward = depthwise_conv_flops(2 * 4 * 5 * 6, (3, 5))
    assert forward == 2 * 15 * 240
    assert flops == {"vision_ssm.depthwise_conv": forward, "vision_ssm.depthwise_conv_backward": 2 * forward}


X, WEIGHT = torch.zeros(1, 4, 4, 6), torch.zeros(6, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "depthwise_conv: x must be a tensor, got list"),
        (dict(x=X.int()), TypeError, "x must be floating-point"),
        (dict(weight=WEIGHT.to(torch.complex64)), TypeError, "weight is complex"),
        (dict(x=X[0]), ValueError, r"x must be \(B, H, W, C\), got shape \(4, 4, 6\)"),
        (dict(x=X[:, :0]), ValueError, r"x must be \(B, H, W, C\) without an empty dimension"),
        (dict(weight=WEIGHT[:, 0]), ValueError, r"weight must be \(C, 1, kh, kw\), got shape"),
        (dict(weight=WEIGHT[:5]), ValueError, r"weight has shape \(5, 1, 3, 3\), expected \(C, 1, kh, kw\) = \(6, "),
        (dict(weight=WEIGHT.view(3, 2, 3, 3)), ValueError, r"weight has shape \(3, 2, 3, 3\), expected"),
        (dict(weight=WEIGHT[..., :2]), ValueError, "kernel sizes must be odd, .* got 3 x 2"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias has shape \(5,\), expected \(C\) = \(6,\)"),
        (dict(bias=torch.zeros(6, device="meta")), ValueError, "bias is on meta but x is on cpu"),
        (dict(activation="relu"), ValueError, "unknown activation 'relu'; choose from none, silu, gelu"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv(**dict(x=X, weight=WEIGHT) | arguments)

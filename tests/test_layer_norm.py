"""Layer norm and RMS norm with a residual: the PyTorch path and the Triton kernels against the twin, and the operator in graphs."""

import pytest
import torch
from ops_support import TOLERANCE, check, fresh_seed, is_float, run
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm import kernels
from vision_ssm.ops.layer_norm import layer_norm, layer_norm_flops
from vision_ssm.ops.torch_layer_norm import layer_norm_reference

HALVES = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 5), (1, 1, 96), (7, 1, 1), (7, 1, 96), (1, 7, 200), (3, 11, 5), (3, 11, 96), (3, 11, 200), (3, 11, 1)]
CENTER = pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
MIXED = dict(x=torch.float32, residual=torch.bfloat16, out_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_inputs():
    fresh_seed()


@pytest.fixture(params=["torch", "triton"])
def path(request):
    """Runs a test on the PyTorch path, then in Triton's interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


def identify(value):
    return str(value).removeprefix("torch.")


def layer_norm_inputs(shape=(3, 11, 96), residual=True, row_scale=True, out_dtype=None, center=True, bias=None):
    """Keyword arguments of `layer_norm`; of three samples, drop path leaves out the second. No bias without `center`.

    The RMS norm of one channel is nearly its sign: `eps` is such that a gradient remains, and signs do not cancel.
    """
    inputs = {
        "x": torch.randn(shape),
        "weight": 1 + torch.randn(shape[-1]) / 2,
        "center": center,
        "out_dtype": out_dtype,
    }
    if center if bias is None else bias:
        inputs["bias"] = torch.randn(shape[-1])
    if residual:
        inputs["residual"] = torch.randn(shape)
        if row_scale:
            inputs["row_scale"] = 1.25 * (torch.arange(shape[0]) % 3 != 1)
    if shape[-1] == 1 and not center:
        inputs |= {name: inputs[name].abs() for name in inputs.keys() & {"x", "residual"}} | {"eps": 0.5}
    return inputs


def cast(inputs, dtype, residual_dtype=None):
    """Activations in `dtype`, or the residual in another; weight, bias and row_scale in float32 at least."""
    dtypes = {name: torch.promote_types(dtype, torch.float32) for name in ("weight", "bias", "row_scale")}
    dtypes |= {"x": dtype, "residual": residual_dtype or dtype}
    return {name: value.to(dtypes[name]) if is_float(value) else value for name, value in inputs.items()}


def differentiate(operator, inputs, cotangents=None):
    """Outputs and gradients by name; row_scale, which has none, is left out."""
    inputs = dict(inputs)
    scale = inputs.pop("row_scale", None)
    return run(lambda **leaves: operator(**leaves, row_scale=scale), inputs, cotangents)


def compare_with_twin(inputs, tolerance):
    """Outputs and all gradients against the twin in float64 on the same values."""
    exact = {name: value.double() if is_float(value) else value for name, value in inputs.items()}
    exact["out_dtype"] = None
    given = inputs["x"], inputs["x"].new_empty(0, dtype=inputs["out_dtype"] or inputs["x"].dtype)
    cotangents = [torch.randn(inputs["x"].shape) for _ in given]
    if inputs["x"].shape[-1] == 1:  # the gradient of the bias is one sum, whose terms must not cancel
        cotangents = [cotangent.abs() for cotangent in cotangents]
    cotangents = [cotangent.to(like.dtype) for cotangent, like in zip(cotangents, given)]
    cotangents = cotangents if "residual" in inputs else cotangents[1:]
    want = differentiate(layer_norm_reference, exact, cotangents)
    got = differentiate(layer_norm, inputs, cotangents)
    assert got.keys() == want.keys()
    for name, value in want.items():
        check(name, got[name], value, tolerance)
    for name, value in inputs.items():
        if is_float(value) and name != "row_scale":
            assert got[f"gradient of {name}"].dtype == value.dtype
    assert got[f"output {len(cotangents) - 1}"].dtype == given[1].dtype
    assert got["output 0"].dtype == given[0].dtype or "residual" not in inputs


@CENTER
@pytest.mark.parametrize("options", [dict(), dict(row_scale=False), dict(residual=False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin(path, shape, options, center):
    compare_with_twin(layer_norm_inputs(shape, center=center, **options), TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("options", [dict(), dict(residual=False)], ids=str)
def test_bias_is_an_option_of_both(path, options, center):
    """A layer norm without bias, and an RMS norm with one."""
    inputs = layer_norm_inputs(center=center, bias=not center, **options)
    compare_with_twin(inputs, TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_in_float64(shape, center):
    compare_with_twin(cast(layer_norm_inputs(shape, center=center), torch.float64), TOLERANCE[torch.float64])


@CENTER
@pytest.mark.parametrize("dtype", HALVES, ids=identify)
@pytest.mark.parametrize("options", [dict(), dict(residual=False), dict(out_dtype=torch.float32)], ids=str)
def test_twin_in_half_precision(path, options, dtype, center):
    compare_with_twin(cast(layer_norm_inputs(center=center, **options), dtype), TOLERANCE[dtype])


@CENTER
@pytest.mark.parametrize("shape", [(3, 11, 96), (2, 3, 4, 200)], ids=str)
def test_mixed_dtypes(path, shape, center):
    """A stream in float32, a branch in bfloat16, and what a linear layer takes: the block under autocast."""
    inputs = layer_norm_inputs(shape, out_dtype=MIXED["out_dtype"], center=center)
    inputs = cast(inputs, MIXED["x"], MIXED["residual"])
    compare_with_twin(inputs, TOLERANCE[torch.bfloat16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s, y = layer_norm(**inputs)
    assert (s.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    check("s", s, layer_norm_reference(**inputs)[0], TOLERANCE[torch.float32])


@CENTER
def test_half_precision_weights(path, center):
    inputs = layer_norm_inputs(center=center)
    inputs = {name: value.half() if is_float(value) else value for name, value in inputs.items()}
    compare_with_twin(inputs, TOLERANCE[torch.float16])


@CENTER
def test_norm_of_the_stored_sum(path, center):
    """y is the norm of s as it is returned, rounded, so that backward sees what forward saw."""
    inputs = cast(layer_norm_inputs(out_dtype=torch.float32, center=center), torch.bfloat16)
    s, y = layer_norm(**inputs)
    alone = layer_norm(s, inputs["weight"], inputs.get("bias"), center=center, out_dtype=torch.float32)
    check("y", y, alone, TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("channels", [100, 1200])
def test_other_widths(path, channels, center):
    """Rows that end inside of a tile, and rows that one warp does not hold."""
    compare_with_twin(layer_norm_inputs((1, 3, channels), row_scale=False, center=center), TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("change", [lambda x: x + 1e4, lambda x: x - 1e4, lambda x: x * 1e15], ids=["+", "-", "*"])
def test_large_values(path, change, residual, center):
    """As exact as ever; values are such that the sum s, which is stored in float32, is not rounded."""
    inputs = layer_norm_inputs(residual=residual, center=center)
    for name in inputs.keys() & {"x", "residual"}:
        inputs[name] = torch.round(64 * inputs[name]) / 64
    inputs["x"] = change(inputs["x"])
    compare_with_twin(inputs, TOLERANCE[torch.float32])


@CENTER
def test_one_large_value(path, center):
    """The first value of a row tells nothing about the others."""
    inputs = layer_norm_inputs(residual=False, center=center)
    inputs["x"][..., 0] = 1e6
    compare_with_twin(inputs, TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678, 1e15])
def test_constant_rows(path, value, center):
    """No deviation: y of a layer norm is the bias, and gradients are those of the twin."""
    inputs = layer_norm_inputs(residual=False, center=center)
    inputs["x"][1] = value
    compare_with_twin(inputs, TOLERANCE[torch.float32])
    y = layer_norm(**inputs)[1]
    if center:
        assert torch.equal(y, inputs["bias"].expand_as(y))


@CENTER
@pytest.mark.parametrize("options", [dict(), dict(residual=False)], ids=str)
def test_no_uninitialised_memory_is_read(path, options, monkeypatch, center):
    """Outputs hold NaN before they are written; `Poison` of ops_support does not reach into kernel modules."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _f=allocate, **options: _f(*args, **options).fill_(torch.nan))
    compare_with_twin(layer_norm_inputs(center=center, **options), TOLERANCE[torch.float32])


@CENTER
def test_repetition_is_bit_equal(path, center):
    inputs = layer_norm_inputs((4, 30, 96), center=center)
    first = differentiate(layer_norm, inputs)
    differentiate(layer_norm, layer_norm_inputs(center=center))
    second = differentiate(layer_norm, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@CENTER
def test_strided_inputs(path, center):
    """A permuted map, a slice as the residual, and an expanded gradient."""
    inputs = layer_norm_inputs((2, 3, 5, 8), center=center)
    want = differentiate(layer_norm, inputs)
    strided = inputs | {
        "x": inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "residual": torch.cat([inputs["residual"]] * 2, dim=-1)[..., :8],
    }
    leaves = {
        name: value.requires_grad_() for name, value in strided.items() if is_float(value) and name != "row_scale"
    }
    s, y = layer_norm(**leaves, row_scale=inputs["row_scale"], center=center)
    grads = torch.autograd.grad(s.sum() + y.sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads):
        check(name, grad, want[f"gradient of {name}"], 0.0)


@CENTER
@pytest.mark.parametrize("index", [0, 1])
def test_gradient_of_one_output(path, index, center):
    """The sum, or the norm, may go unused."""
    inputs = layer_norm_inputs(center=center)
    weights = torch.randn(inputs["x"].shape)
    for name in ("x", "residual"):
        leaf = inputs[name].requires_grad_()
        got, want = (
            torch.autograd.grad((f(**inputs)[index] * weights).sum(), leaf)[0]
            for f in (layer_norm, layer_norm_reference)
        )
        check(name, got, want, TOLERANCE[torch.float32])


@CENTER
@pytest.mark.parametrize("options", [dict(), dict(residual=False)], ids=str)
def test_no_rows(path, options, center):
    inputs = layer_norm_inputs((0, 4, 96), center=center, **options)
    got, want = (differentiate(f, inputs) for f in (layer_norm, layer_norm_reference))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@CENTER
@pytest.mark.parametrize("options", [dict(residual=True), dict(residual=False)], ids=str)
def test_nothing_is_kept_without_gradients(path, options, center):
    inputs = layer_norm_inputs(center=center, **options)
    with torch.no_grad():
        plain = layer_norm(**inputs)
    inputs["weight"].requires_grad_()
    torch.testing.assert_close(layer_norm(**inputs), plain, rtol=0, atol=0)
    arguments = [inputs.get(name) for name in ("x", "residual", "row_scale", "weight", "bias")]
    for save, shape in ((False, (0,)), (True, (33, 1 + center))):
        assert torch.ops.vision_ssm.layer_norm(*arguments, 1e-5, center, None, save)[2].shape == shape


@CENTER
def test_gradcheck(center):
    inputs = cast(layer_norm_inputs((3, 2, 5), center=center), torch.float64)
    names = ["x", "weight", *(["bias"] if center else []), "residual"]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *values: layer_norm(**inputs | dict(zip(names, values))), leaves)


@CENTER
def test_same_as_the_module(path, center):
    norm = torch.nn.LayerNorm(96) if center else torch.nn.RMSNorm(96, eps=1e-5)
    x, bias = torch.randn(2, 5, 96) + 1, norm.bias if center else None
    check("y", layer_norm(x, norm.weight, bias, center=center).detach(), norm(x).detach(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backward_from", ["s", "grad"])
def test_normalise_backward(interpreter, backward_from):
    """The part that other kernels call: any statistics rounded to float32, with or without a gradient of s."""
    module = kernels.find("layer_norm")
    s, weight, grad_y, grad_s = torch.randn(33, 96) + 100, torch.randn(96), torch.randn(33, 96), torch.randn(33, 96)
    exact, exact_weight = s.double().requires_grad_(), weight.double().requires_grad_()
    bias = torch.zeros(96, dtype=torch.float64, requires_grad=True)
    layer_norm_reference(exact, exact_weight, bias).backward(grad_y.double())
    variance, mean = torch.var_mean(s.double(), -1, correction=0)
    statistics = torch.stack([mean, 1 / torch.sqrt(variance + 1e-5)], 1).float()
    others = grad_s if backward_from == "grad" else None
    total, grad_weight, grad_bias = module.normalise_backward(grad_y, s, statistics, weight, others)
    want = exact.grad if others is None else exact.grad + grad_s
    pairs = [(total, want), (grad_weight, exact_weight.grad), (grad_bias, bias.grad)]
    for name, (got, expected) in zip(("s", "weight", "bias"), pairs):
        check(name, got, expected, TOLERANCE[torch.float32])
    half = module.normalise_backward(grad_y, s, statistics, weight, others, torch.bfloat16)[0]
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"statistics has shape \(0,\), expected \(33, 2\)"):
        module.normalise_backward(grad_y, s, statistics.new_empty(0), weight)
    check("s", half, total, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("channels", [1, 5, 31, 32, 96, 100, 192, 200, 384, 768, 1000, 1025, 4096, 5000])
def test_tiles_cover_rows(channels):
    rows, chunk, parts = kernels.find("layer_norm")._tiling(channels)
    assert rows * chunk == 512 and (parts - 1) * chunk < channels <= parts * chunk
    assert parts * chunk == channels or channels not in (96, 192, 384, 768)


def operator_arguments(options, requires_grad=True):
    inputs = layer_norm_inputs((2, 3, 8), **options)
    values = [inputs.get(name) for name in ("x", "residual", "row_scale", "weight", "bias")]
    for index in (0, 1, 3, 4):
        if values[index] is not None:
            values[index].requires_grad_(requires_grad)
    return [*values, 1e-5, inputs["center"], inputs["out_dtype"], True]


@CENTER
@pytest.mark.parametrize("options", [dict(), dict(residual=False), dict(out_dtype=torch.bfloat16)], ids=str)
def test_opcheck(options, center):
    options = options | dict(center=center)
    torch.library.opcheck(torch.ops.vision_ssm.layer_norm.default, operator_arguments(options))
    arguments = operator_arguments(options, requires_grad=False)
    s, y, statistics = torch.ops.vision_ssm.layer_norm(*arguments)
    gradients = torch.randn_like(s), torch.randn_like(y)
    torch.library.opcheck(torch.ops.vision_ssm.layer_norm_backward.default, [*gradients, statistics, *arguments])


@CENTER
@pytest.mark.parametrize("options", [dict(out_dtype=torch.bfloat16), dict(residual=False)], ids=str)
def test_compile(options, center):
    """One node, and what eager training gives, also for other sizes."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if "vision_ssm" in str(node.target)])
        return module.forward

    inputs = layer_norm_inputs(center=center, **options)
    torch._dynamo.reset()
    outputs = torch.compile(layer_norm, fullgraph=True, backend=backend)(**inputs)
    assert graphs == [["vision_ssm.layer_norm.default"]]
    torch.testing.assert_close(outputs, layer_norm(**inputs), rtol=0, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(layer_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 11, 96), (2, 4, 24)):
        inputs = layer_norm_inputs(shape, center=center, **options)
        got = differentiate(compiled, inputs)
        for name, value in differentiate(layer_norm, inputs).items():
            assert torch.equal(got[name], value), name


@CENTER
def test_reference_backend(monkeypatch, center):
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    inputs = layer_norm_inputs(center=center)
    torch.testing.assert_close(layer_norm(**inputs), layer_norm_reference(**inputs), rtol=0, atol=0)


@CENTER
def test_flops(center):
    inputs, alone = layer_norm_inputs((2, 5, 96), center=center), 8 if center else 4
    with FlopCounterMode(display=False) as counter:
        differentiate(layer_norm, inputs)
    forward = layer_norm_flops((2, 5, 96), (2, 5, 96), center)
    assert forward == (alone + 1) * 2 * 5 * 96 and layer_norm_flops((2, 5, 96), None, center) == alone * 2 * 5 * 96
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(x=torch.zeros(96)),
            ValueError,
            r"x must be \(B, ..., C\) without an empty dimension but B, got .*\(96,\)",
        ),
        (dict(x=torch.zeros(2, 0, 96)), ValueError, "without an empty dimension"),
        (dict(x=torch.zeros(3, 11, 96, dtype=torch.int32)), TypeError, "x must be floating-point"),
        (dict(weight=torch.zeros(95)), ValueError, r"weight has shape \(95,\), expected \(C\) = \(96,\)"),
        (dict(bias=torch.zeros(1, 96)), ValueError, "bias has shape"),
        (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
        (dict(bias=1.0), TypeError, "bias must be a tensor, got float"),
        (dict(residual=torch.zeros(3, 1, 96)), ValueError, "residual has shape"),
        (dict(residual=torch.zeros(3, 11, 96, device="meta")), ValueError, "residual is on meta but x is on cpu"),
        (dict(residual=torch.zeros(3, 11, 96, dtype=torch.complex64)), TypeError, "residual is complex"),
        (dict(row_scale=torch.zeros(3, 1)), ValueError, "row_scale has shape"),
        (dict(row_scale=torch.zeros(3, requires_grad=True)), ValueError, "row_scale is not differentiable"),
        (dict(residual=None), ValueError, "row_scale is a factor of residual, which is not given"),
        (dict(eps=-1.0), ValueError, "eps must be 0 or more, got -1.0"),
        (dict(out_dtype=torch.int8), TypeError, "out_dtype must be a floating dtype such as torch.bfloat16, got"),
        (dict(out_dtype="bf16"), TypeError, "out_dtype must be a floating dtype"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"layer_norm: .*{message}"):
        layer_norm(**layer_norm_inputs() | change)


@pytest.mark.parametrize("center", [True, False])
def test_gradients_where_forward_kept_nothing(center):
    """As in a program that was exported without gradients and is trained."""
    x, weight = torch.randn(3, 5, requires_grad=True), torch.rand(5)
    with torch.no_grad():
        exported = torch.export.export(Normed(weight, center), (torch.randn(3, 5),)).module()
    (ours,) = torch.autograd.grad(exported(x).square().sum(), x)
    (plain,) = torch.autograd.grad(layer_norm(x, weight, center=center).square().sum(), x)
    torch.testing.assert_close(ours, plain)


class Normed(torch.nn.Module):
    def __init__(self, weight, center):
        super().__init__()
        self.register_buffer("weight", weight)
        self.center = center

    def forward(self, x):
        return layer_norm(x, self.weight, center=self.center)

"""DCNv4: PyTorch path and Triton kernels, in Triton's interpreter and on a GPU, against the twin in float64."""

from functools import partial

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from ops_support import TOLERANCE, Poison, cast, check, compare, fresh_seed, run
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm import kernels
from vision_ssm.ops import dcnv4, select_backend, torch_dcnv4
from vision_ssm.ops.dcnv4 import output_side
from vision_ssm.ops.flops import dcnv4_flops
from vision_ssm.ops.reference import dcnv4_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = ("dcnv4", "dcnv4_scale_removecenter")

# (B, H, W, D), groups, options of the operator
SHAPES = {
    "one cell": ((2, 1, 1, 5), 1, {}),
    "one row": ((1, 1, 9, 4), 2, {}),
    "odd sides, narrow groups": ((2, 3, 5, 6), 2, {}),
    "several tiles": ((1, 5, 7, 32), 1, {}),
    "more channels than a block": ((1, 1, 3, 70), 1, {}),
    "without the middle, scaled": ((1, 3, 4, 6), 2, dict(remove_center=True, offset_scale=0.5)),
    "strided": ((1, 5, 4, 6), 1, dict(stride=2)),
    "2 x 2, dilated, no margin": ((1, 6, 5, 4), 1, dict(kernel_size=2, padding=0, dilation=2)),
    "5 x 5": ((1, 5, 4, 3), 1, dict(kernel_size=5, padding=2, offset_scale=1.5)),
    "one point": ((1, 3, 2, 4), 2, dict(kernel_size=1, padding=0)),
}
ODD = SHAPES["odd sides, narrow groups"]
SMALL = ((2, 3, 5, 3), 1, {})


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


def inputs_of(shape, groups, options, spread=1.5, extra=5):
    """Tensors of `dcnv4`, and the operator and its twin with everything else; `extra` numbers belong to no point."""
    batch, height, width, _ = shape
    given = {**dict(kernel_size=3, stride=1, padding=1, dilation=1), **options}
    sides = {name: given[name] for name in ("kernel_size", "stride", "padding", "dilation")}
    rows, columns = (output_side(side, **sides) for side in (height, width))
    count = 3 * groups * (given["kernel_size"] ** 2 - options.get("remove_center", False))
    tensors = {
        "value": torch.randn(shape),
        "offset_mask": spread * torch.randn(batch, rows, columns, count + extra),
    }
    return tensors, partial(dcnv4, groups=groups, **options), partial(dcnv4_reference, groups=groups, **options)


def compare_with_twin(case, dtype, **spread):
    tensors, operator, twin = inputs_of(*case, **spread)
    if dtype in DTYPES[1:]:
        # places that the coarse dtype has too: the twin then samples between the same cells
        tensors["offset_mask"] = (tensors["offset_mask"] * 8).round().clamp(-60, 60) / 8 + 1 / 16
    compare("dcnv4", operator, twin, tensors, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("operator", [dcnv4, dcnv4_reference], ids=["torch", "reference"])
def test_golden(name, operator):
    """The original's mathematics: output and both gradients."""
    case = golden_cases.load(f"ops/{name}")
    config = case["config"]
    double = partial(torch.tensor, dtype=torch.float64)
    value, offset_mask = (double(case["inputs"][key]).requires_grad_() for key in ("value", "offset_mask"))
    options = dict(zip(("kernel_size", "stride", "padding", "dilation"), (config[k] for k in ("kernel", "stride", "pad", "dilation"))))
    options |= {key: config[key] for key in ("groups", "offset_scale", "remove_center")}
    y = operator(value, offset_mask, **options)
    y.backward(double(case["output_grad"]))
    exact = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(y, double(case["output"]), **exact)
    torch.testing.assert_close(value.grad, double(case["grads"]["value"]), **exact)
    torch.testing.assert_close(offset_mask.grad, double(case["grads"]["offset_mask"]), **exact)


def test_without_offsets_it_is_a_convolution(path):
    """The weights of a depthwise convolution, stored column by column."""
    weight = torch.randn(2, 3, 3)  # of two groups
    value = torch.randn(1, 4, 6, 6)
    numbers = torch.zeros(1, 4, 6, 2, 27)
    numbers[..., 18:] = weight.transpose(1, 2).flatten(1)
    want = F.conv2d(value.permute(0, 3, 1, 2), weight.repeat_interleave(3, 0).unsqueeze(1), padding=1, groups=6)
    torch.testing.assert_close(dcnv4(value, numbers.flatten(-2), 2), want.permute(0, 2, 3, 1))


def test_one_point_by_hand(path):
    """A row a b c d: half a cell to the right, outside by half a cell, by a whole one, and by more."""
    value = torch.tensor([2.0, 3.0, 5.0, 7.0]).view(1, 1, 4, 1).requires_grad_()
    numbers = torch.tensor([[0.5, 0.0, 4.0], [-1.5, 0.0, 1.0], [2.0, 0.0, 1.0], [-1e30, 0.0, 1.0]])
    numbers = numbers.view(1, 1, 4, 3).requires_grad_()
    y = dcnv4(value, numbers, 1, kernel_size=1, padding=0)
    assert y.flatten().tolist() == [10.0, 1.0, 0.0, 0.0]
    y.sum().backward()
    assert value.grad.flatten().tolist() == [2.5, 2.0, 0.0, 0.0]
    # d/dx, d/dy and the sample; what lies below the row is 0
    assert numbers.grad.view(4, 3)[:2].tolist() == [[4.0, -10.0, 2.5], [2.0, -1.0, 1.0]]
    assert not numbers.grad.view(4, 3)[2:].any()


def test_numbers_behind_the_last_group_are_ignored(path):
    tensors, operator, _ = inputs_of(*SMALL, extra=0)
    want = run(operator, tensors)
    numbers = tensors["offset_mask"]
    padded = torch.cat([numbers, torch.full_like(numbers[..., :3], torch.nan)], dim=-1)
    got = run(operator, tensors | {"offset_mask": padded})
    assert torch.equal(got["output 0"], want["output 0"])
    gradient = got["gradient of offset_mask"]
    assert torch.equal(gradient[..., :-3], want["gradient of offset_mask"]) and not gradient[..., -3:].any()


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_twin(path, case):
    compare_with_twin(case, torch.float32)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_twin_in_float64(case):
    compare_with_twin(case, torch.float64)


@pytest.mark.parametrize("spread", [30.0, 1e30], ids=["outside", "far outside"])
def test_points_outside(path, spread):
    compare_with_twin(ODD, torch.float32, spread=spread)


def test_all_points_in_one_cell(path):
    """Every point of the map next to the same cell: the longest list that there can be."""
    tensors, operator, twin = inputs_of((2, 3, 4, 5), 1, {})
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    taps = torch.arange(9)
    for first, target, place, tap in ((0, 1.25, columns, taps // 3), (1, 0.625, rows, taps % 3)):
        tensors["offset_mask"][..., first:18:2] = target - (place[..., None] + tap - 1)
    compare("dcnv4", operator, twin, tensors, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(path, dtype):
    """The result has the dtype of the map and is summed in float32."""
    compare_with_twin(SMALL, dtype)
    tensors, operator, _ = inputs_of(*SMALL)
    tensors = cast(tensors, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator(**tensors)
    assert y.dtype == dtype and torch.equal(y, operator(**tensors))
    wide = operator(**{name: value.float() for name, value in tensors.items()})
    torch.testing.assert_close(y, wide.to(dtype))


def test_mixed_precision(path):
    """A half-precision map at places of full precision, and the other way round."""
    tensors, operator, twin = inputs_of(*SMALL)
    for half in tensors:
        mixed = tensors | {half: tensors[half].bfloat16()}
        got, want = run(operator, mixed), run(twin, {name: value.double() for name, value in mixed.items()})
        for name, value in want.items():
            dtype = mixed["value"].dtype if name == "output 0" else mixed[name.removeprefix("gradient of ")].dtype
            assert got[name].dtype == dtype
            check(name, got[name], value, TOLERANCE[dtype])


def test_views(path):
    """A map in other memory, numbers that are a part of a projection, and an expanded gradient."""
    tensors, operator, _ = inputs_of(*SMALL)
    shape = SMALL[0]
    want = run(operator, tensors, [torch.ones(shape)])
    value, numbers = tensors.values()
    nan = torch.full_like(numbers, torch.nan)
    value = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    numbers = torch.cat([nan, numbers, nan], dim=-1).chunk(3, dim=-1)[1].requires_grad_()
    y = operator(value, numbers)
    y.backward(torch.ones(()).expand(shape))
    torch.testing.assert_close(y, want["output 0"])
    torch.testing.assert_close(value.grad, want["gradient of value"])
    torch.testing.assert_close(numbers.grad, want["gradient of offset_mask"])


def test_no_images(path):
    tensors, operator, twin = inputs_of((0, 3, 3, 4), 2, {})
    got, want = run(operator, tensors), run(twin, tensors)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("limit", [1, 36 * 5 * 2 * 2, 36 * 5 * 2 * 3 * 2], ids=["rows", "two rows", "images"])
def test_chunks(monkeypatch, limit):
    """Images and bands of rows, worked on one by one, give what all at once give."""
    tensors, operator, _ = inputs_of((5, 3, 5, 6), 2, {})
    want = run(operator, tensors)
    monkeypatch.setattr(torch_dcnv4, "_ENTRIES", limit)
    for name, value in run(operator, tensors).items():
        torch.testing.assert_close(value, want[name])


def test_kernels_sort_a_few_images_at_once(interpreter, monkeypatch):
    tensors, operator, _ = inputs_of((3, 2, 3, 4), 1, {})
    want = run(operator, tensors)
    monkeypatch.setattr(kernels.find("dcnv4"), "_SORTED", 2 * 2 * 3 * 9)
    for name, value in run(operator, tensors).items():
        assert torch.equal(value, want[name]), name


def test_too_many_positions(interpreter):
    module = kernels.find("dcnv4")
    value = torch.zeros(1, 1, 1, 1).expand(1, 1 << 16, 1 << 15, 1)
    numbers = torch.zeros(1, 1, 1, 27).expand(1, 1 << 16, 1 << 15, 27)
    with pytest.raises(ValueError, match="has too many positions for one launch"):
        module._Call(value.shape, numbers.shape, 1, 3, 1, 1, 1, 1.0, False).check()


@pytest.mark.parametrize("case", [SMALL, SHAPES["strided"]], ids=str)
def test_no_uninitialised_memory_is_read(interpreter, monkeypatch, case):
    """Outputs are NaN before the kernels run, and every element of them is written."""
    module = kernels.find("dcnv4")
    poison = Poison(monkeypatch)
    monkeypatch.setitem(module.__dict__, "__name__", "vision_ssm.ops, for Poison")
    compare_with_twin(case, torch.float32)
    assert poison.count > 0


def test_repetition_is_bit_equal(path):
    tensors, operator, _ = inputs_of(*SMALL)
    first, second = run(operator, tensors), run(operator, tensors)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_opcheck(path):
    tensors, _, _ = inputs_of((1, 2, 3, 4), 1, {})
    arguments = [*tensors.values(), 1, 3, 1, 1, 1, 1.0, False]
    grad = torch.randn_like(tensors["value"])
    torch.library.opcheck(torch.ops.vision_ssm.dcnv4_backward.default, [grad, *arguments])
    for value in tensors.values():
        value.requires_grad_()
    torch.library.opcheck(torch.ops.vision_ssm.dcnv4.default, arguments)


def test_gradcheck():
    """Places between cells: at a cell the sample has a kink."""
    tensors, operator, _ = inputs_of((1, 3, 2, 2), 1, {}, extra=1)
    numbers = tensors["offset_mask"].double()
    numbers = (numbers - numbers.floor()).clamp(0.1, 0.9) + numbers.floor()
    assert torch.autograd.gradcheck(operator, (tensors["value"].double().requires_grad_(), numbers.requires_grad_()))


def test_compiled_training_equals_eager():
    """One node in a full graph."""
    tensors, operator, _ = inputs_of(*ODD)
    torch._dynamo.reset()
    got = run(torch.compile(operator, fullgraph=True, backend="aot_eager"), tensors)
    for name, value in run(operator, tensors).items():
        torch.testing.assert_close(got[name], value)


def test_reference_backend_runs_the_twin(monkeypatch):
    tensors, operator, twin = inputs_of(*SHAPES["without the middle, scaled"])
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert torch.equal(operator(**tensors), twin(**tensors))


def test_flops():
    tensors, operator, _ = inputs_of((2, 4, 5, 6), 2, dict(remove_center=True))
    with FlopCounterMode(display=False) as counter:
        run(operator, tensors)
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    forward = dcnv4_flops(2 * 4 * 5 * 6, 8)
    assert forward == 240 * 8 * 4 * 2
    assert flops == {"vision_ssm.dcnv4": forward, "vision_ssm.dcnv4_backward": 2 * forward}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(value=[1.0]), TypeError, "dcnv4: value must be a tensor, got list"),
        (dict(offset_mask=torch.zeros(1, 4, 4, 56).int()), TypeError, "offset_mask must be floating-point"),
        (dict(value=torch.zeros(4, 4, 6)), ValueError, r"value must be \(B, H, W, D\), got shape \(4, 4, 6\)"),
        (dict(value=torch.zeros(1, 0, 4, 6)), ValueError, "without an empty dimension"),
        (dict(offset_mask=torch.zeros(1, 4, 4, 56, device="meta")), ValueError, "offset_mask is on meta but value is on"),
        (dict(groups=4), ValueError, "groups must divide the 6 channels of value, got 4"),
        (dict(groups=0), ValueError, "groups must be at least 1, got 0"),
        (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
        (dict(padding=-1), ValueError, "padding must be at least 0, got -1"),
        (dict(kernel_size=2, remove_center=True), ValueError, "remove_center needs an odd kernel_size of at least 3, got 2"),
        (dict(kernel_size=1, remove_center=True), ValueError, "remove_center needs an odd kernel_size of at least 3, got 1"),
        (dict(dilation=3), ValueError, "3 x 3 with dilation 3 does not fit into a map of 4 x 4 with padding 1"),
        (dict(padding=0), ValueError, r"offset_mask has shape \(1, 4, 4, 56\), expected \(B, H', W', M\) = \(1, 2, 2\)"),
        (dict(groups=3), ValueError, "56 numbers per cell, expected at least 81: 2 offsets and a weight for each of 9 points"),
    ],
)  # fmt: skip
def test_errors(arguments, error, message):
    given = dict(value=torch.zeros(1, 4, 4, 6), offset_mask=torch.zeros(1, 4, 4, 56), groups=2)
    with pytest.raises(error, match=message):
        dcnv4(**given | arguments)


# HRVMamba-B at 224 x 224, sizes that fill no tile, and a kernel of other options
GPU_SHAPES = [
    ((4, 56, 56, 160), 5, {}),
    ((2, 28, 28, 320), 10, {}),
    ((2, 7, 7, 1280), 40, {}),
    ((3, 64, 48, 64), 2, {}),
    ((3, 17, 41, 37), 1, {}),
    ((2, 1, 1, 5), 1, {}),
    ((2, 31, 30, 96), 3, dict(stride=2, remove_center=True, offset_scale=0.5)),
    ((1, 15, 14, 260), 2, dict(kernel_size=5, padding=4, dilation=2)),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_SHAPES, ids=str)
def test_on_a_gpu(case, dtype):
    """Against the twin in float64, and bit-equal on repetition and in a compiled graph."""
    tensors, operator, twin = inputs_of(*case)
    tensors = {name: value.cuda() for name, value in tensors.items()}
    tensors["offset_mask"] = (tensors["offset_mask"] * 8).round().clamp(-60, 60) / 8 + 1 / 16
    assert select_backend(tensors["value"], "dcnv4") == ("triton", "")
    compare("dcnv4", operator, twin, tensors, dtype)
    tensors = cast(tensors, dtype)
    first = run(operator, tensors)
    for again in (operator, operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        for name, value in run(again, tensors).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_points_on_a_gpu():
    """Far outside, all in one cell, and images that are sorted a few at a time: as on the CPU in float64."""
    spread, operator, twin = inputs_of((4, 20, 21, 64), 2, {}, spread=1e4)
    crowded, _, _ = inputs_of((4, 20, 21, 64), 2, {})
    for group in range(2):
        numbers = crowded["offset_mask"][..., 27 * group : 27 * group + 18]
        numbers[..., 0::2] = 5.25 - (torch.arange(21.0).view(-1, 1) + torch.arange(9) // 3 - 1)
        numbers[..., 1::2] = 8.625 - (torch.arange(20.0).view(-1, 1, 1) + torch.arange(9) % 3 - 1)
    for tensors in (spread, crowded):
        compare("dcnv4", operator, twin, {name: value.cuda() for name, value in tensors.items()}, torch.float32)
    tensors = {name: value.cuda() for name, value in inputs_of((4, 20, 21, 64), 2, {})[0].items()}
    want = run(operator, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.find("dcnv4"), "_SORTED", 2 * 20 * 21 * 2 * 9)
        for name, value in run(operator, tensors).items():
            assert torch.equal(value, want[name]), name

"""mmcv's operators on those of torchvision: values, gradients, precisions, and what there is not."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
import torchvision
from torch.nn import functional as F

from vision_ssm.integrations import mmcv_ext

pytestmark = pytest.mark.skipif(not mmcv_ext.install(), reason="mmcv is missing here, or has compiled operators")

BOXES = [[0.0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 4, 4], [20, 20, 30, 30], [20, 20, 30, 31]]
SCORES = [0.9, 0.8, 0.7, 0.6, 0.95]


@pytest.fixture
def ops():
    return pytest.importorskip("mmcv.ops")


def boxes_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def iou(a, b, offset):
    """IoU of two boxes whose sides are longer than the difference of their ends by `offset`."""
    common = 1.0
    for axis in (0, 1):
        common *= max(min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return common / (sum(areas) - common)


def plain_nms(boxes, scores, threshold, offset):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_keeps_what_a_plain_loop_keeps(offset, threshold, ops):
    boxes, scores = boxes_of(60), torch.rand(60)
    dets, kept = ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == plain_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    torch.testing.assert_close(dets, torch.cat([boxes[kept], scores[kept, None]], dim=1))


def test_nms_values_and_options(ops):
    boxes, scores = torch.tensor(BOXES), torch.tensor(SCORES)
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == [4, 0, 2]
    assert ops.nms(boxes, scores, 0.5, max_num=2)[1].tolist() == [4, 0]
    assert ops.nms(boxes, scores, 0.5, score_threshold=0.75)[1].tolist() == [4, 0]
    dets, kept = ops.nms(boxes.numpy(), scores.numpy(), 0.5)
    assert kept.tolist() == [4, 0, 2] and dets.shape == (3, 5)


def test_the_offset_decides(ops):
    boxes, scores = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.4]]), torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.5, offset=0)[1].tolist() == [0, 1]  # 0.4
    assert ops.nms(boxes, scores, 0.5, offset=1)[1].tolist() == [0]  # 2.8 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nms_of_nothing_and_of_other_precisions(dtype, ops):
    dets, kept = ops.nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.int64
    assert ops.nms(torch.tensor(BOXES, dtype=dtype), torch.tensor(SCORES, dtype=dtype), 0.5)[1].tolist() == [4, 0, 2]


def test_batched_nms(ops):
    boxes, scores = torch.tensor(BOXES), torch.tensor(SCORES)
    classes = torch.tensor([0, 1, 0, 2, 2])
    dets, kept = ops.batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.5))
    assert kept.tolist() == [4, 0, 1, 2]
    torch.testing.assert_close(dets[:, 4], scores[kept])
    assert ops.batched_nms(boxes, scores, classes, dict(iou_threshold=0.5), class_agnostic=True)[1].tolist() == [4, 0, 2]
    kept = ops.batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.5, split_thr=2))[1]
    assert kept.tolist() == [4, 0, 1, 2]
    dets, kept = ops.batched_nms(boxes, scores, classes, dict(type="soft_nms", iou_threshold=0.5, min_score=0.05))
    assert kept.tolist() == [4, 0, 1, 2, 3] and dets[4, 4] < 0.1


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    scores, left, rows = list(scores), list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        rows.append((best, scores[best]))
        left.remove(best)
        for i in list(left):
            overlap = iou(boxes[i], boxes[best], offset)
            if method == "gaussian":
                scores[i] *= 2.718281828459045 ** (-overlap * overlap / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == "linear" else 0.0
            if scores[i] < min_score:
                left.remove(i)
    return rows


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["linear", "gaussian", "naive"])
def test_soft_nms_follows_a_plain_loop(method, offset, ops):
    boxes, scores = boxes_of(40, seed=1), torch.rand(40)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
    dets, kept = ops.soft_nms(boxes, scores, **options)
    expected = plain_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.05, method, offset)
    assert kept.tolist() == [i for i, _ in expected] and 5 < len(kept) < 40
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))
    torch.testing.assert_close(dets[:, :4], boxes[kept])


def test_soft_nms_of_nothing(ops):
    dets, kept = ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_naive_soft_nms_is_nms(ops):
    boxes, scores = boxes_of(50, seed=2), torch.rand(50)
    assert ops.soft_nms(boxes, scores, 0.5, method="naive")[1].tolist() == ops.nms(boxes, scores, 0.5)[1].tolist()


# A 2 x 2 map pooled to 2 x 2 over its whole: each bin's sample points, bilinear, averaged; by hand.
ROI_INPUTS = [
    ([[[[1.0, 2.0], [3.0, 4.0]]]], [[0.0, 0.0, 0.0, 1.0, 1.0]], [[[[1.0, 1.25], [1.5, 1.75]]]]),
    (
        [[[[1.0, 2.0], [3.0, 4.0]], [[4.0, 3.0], [2.0, 1.0]]]],
        [[0.0, 0.0, 0.0, 1.0, 1.0]],
        [[[[1.0, 1.25], [1.5, 1.75]], [[4.0, 3.75], [3.5, 3.25]]]],
    ),
]


@pytest.mark.parametrize("image,rois,expected", ROI_INPUTS)
def test_roi_align_values(image, rois, expected, ops):
    """Region [0, 1] in two bins of one sample each, at -1/4 and 1/4 in pixel centres, where -1/4 is clamped to 0."""
    pooled = ops.roi_align(torch.tensor(image), torch.tensor(rois), (2, 2), 1.0, 1, "avg", True)
    torch.testing.assert_close(pooled, torch.tensor(expected))


def test_roi_align_of_a_ramp(ops):
    """A linear image is reproduced: every bin holds the value at its centre."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    image = torch.stack([x, y, 2 * x - y])[None]
    rois = torch.tensor([[0, 16.0, 8, 80, 72]])
    for ratio in (0, 2):
        pooled = ops.RoIAlign((4, 4), spatial_scale=0.25, sampling_ratio=ratio)(image, rois)
        centres = torch.arange(4) * 4 + 2 - 0.5
        torch.testing.assert_close(pooled[0, 0], (4 + centres).expand(4, 4))
        torch.testing.assert_close(pooled[0, 1], (2 + centres)[:, None].expand(4, 4))
        torch.testing.assert_close(pooled[0, 2], 2 * pooled[0, 0] - pooled[0, 1])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_gradient(ratio, aligned, ops):
    image = torch.rand(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.5, 0.5, 5, 4], [1, 1, 2, 6, 5.5], [0, 2, 2, 2.5, 2.5]], dtype=torch.float64)
    layer = ops.RoIAlign((2, 3), spatial_scale=0.9, sampling_ratio=ratio, aligned=aligned)
    torch.autograd.gradcheck(lambda x: layer(x, rois), (image,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roi_align_in_half_precision(dtype, ops):
    image, rois = torch.rand(1, 3, 8, 8), torch.tensor([[0, 0.0, 0, 7, 5]])
    inputs = [image.to(dtype).requires_grad_(), image.to(dtype).float().requires_grad_()]
    pooled = [ops.roi_align(x, rois.to(x.dtype), (3, 3), 1.0, 0, "avg", True) for x in inputs]
    assert pooled[0].dtype == dtype
    torch.testing.assert_close(pooled[0], pooled[1].to(dtype))
    for y in pooled:
        y.backward(torch.ones_like(y))
    assert inputs[0].grad.dtype == dtype
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad.to(dtype))


def test_roi_align_of_no_regions(ops):
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    pooled = ops.roi_align(image, torch.zeros(0, 5), (7, 7), 0.25, 0, "avg", True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert not image.grad.any()


def test_max_pooling_is_refused(ops):
    with pytest.raises(NotImplementedError, match="roi_align needs compiled ops for pool_mode='max'; use pool_mode='avg'"):
        ops.roi_align(torch.rand(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 0, "max", True)


def plain_focal_loss(logits, target, gamma, alpha, weight=None):
    """From the cross-entropies, as papers write it; the last class of a one-hot code is background."""
    truth = F.one_hot(target, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    p = logits.sigmoid()
    wrong = truth * (1 - p) + (1 - truth) * p
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * wrong**gamma
    loss = loss * (alpha * truth + (1 - alpha) * (1 - truth))
    if weight is not None:
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target, None]
    return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma,alpha", [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss(reduction, gamma, alpha, weighted, ops):
    logits = (torch.randn(8, 5, dtype=torch.float64) * 3).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 5, 5, 2])  # 5: background
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    loss = ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, reduction)
    expected = plain_focal_loss(logits, target, gamma, alpha, weight)
    reduce = {"none": lambda x: x, "mean": lambda x: x.sum() / len(x), "sum": torch.sum}[reduction]
    torch.testing.assert_close(loss, reduce(expected))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    (right,) = torch.autograd.grad(reduce(expected).sum(), logits)
    torch.testing.assert_close(gradient, right)
    if reduction == "none":
        torch.autograd.gradcheck(
            lambda x: ops.sigmoid_focal_loss(x, target, gamma, alpha, weight, "sum"), (logits.detach().requires_grad_(),)
        )


def test_focal_loss_of_extreme_logits(ops):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0.0], [0.25 * 200, 0.75 * 200]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.75]]))


def test_focal_loss_agrees_with_mmdets_python(ops):
    losses = pytest.importorskip("mmdet.models.losses.focal_loss")
    logits, target = torch.randn(20, 4), torch.randint(0, 5, (20,))
    one_hot = F.one_hot(target, 5)[:, :4]
    expected = losses.py_sigmoid_focal_loss(logits, one_hot, avg_factor=3.0)
    torch.testing.assert_close(losses.sigmoid_focal_loss(logits, target, avg_factor=3.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_focal_loss_in_half_precision(dtype, ops):
    logits = torch.randn(6, 3).to(dtype).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 3, 0])
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, plain_focal_loss(logits.float(), target, 2.0, 0.25).to(dtype))


GEOMETRIES = [
    dict(stride=1, padding=1, dilation=1, groups=1, deform_groups=1),
    dict(stride=2, padding=(2, 1), dilation=(2, 1), groups=2, deform_groups=2),
]


def deformable(layer, height=5, width=4, masked=False):
    """Inputs of a deformable convolution: images, offsets and, where they are weighted, weights of the samples."""
    dtype = layer.weight.dtype
    images = torch.rand(2, 4, height, width, dtype=dtype, requires_grad=True)
    sides = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            (height, width), layer.padding, layer.dilation, layer.kernel_size, layer.stride
        )
    ]
    taps = layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
    # away from whole numbers, where the interpolation has no derivative
    offset = (torch.randint(-2, 2, (2, 2 * taps, *sides)) + 0.2 + 0.6 * torch.rand(2, 2 * taps, *sides)).to(dtype)
    inputs = [images, offset.requires_grad_()]
    if masked:
        inputs.append(torch.rand(2, taps, *sides, dtype=dtype, requires_grad=True))
    return inputs


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deform_conv(geometry, ops):
    layer = ops.DeformConv2d(4, 6, (3, 2), **geometry).double()
    images, offset = deformable(layer)
    conv = {key: geometry[key] for key in ("stride", "padding", "dilation")}
    expected = torchvision.ops.deform_conv2d(images, offset, layer.weight, None, **conv)
    torch.testing.assert_close(layer(images, offset), expected)
    zero = torch.zeros_like(offset)
    torch.testing.assert_close(layer(images, zero), F.conv2d(images, layer.weight, None, groups=geometry["groups"], **conv))

    def run(x, at, weight):
        return ops.deform_conv2d(x, at, weight, *[geometry[key] for key in geometry])

    torch.autograd.gradcheck(run, (images, offset, layer.weight))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
def test_modulated_deform_conv(bias, geometry, ops):
    layer = ops.ModulatedDeformConv2d(4, 6, (3, 2), bias=bias, **geometry).double()
    if bias:
        torch.nn.init.normal_(layer.bias)
    images, offset, mask = deformable(layer, masked=True)
    conv = {key: geometry[key] for key in ("stride", "padding", "dilation")}
    expected = torchvision.ops.deform_conv2d(images, offset, layer.weight, layer.bias, mask=mask, **conv)
    torch.testing.assert_close(layer(images, offset, mask), expected)

    def run(x, at, share, weight, *added):
        added = added[0] if added else None
        return ops.modulated_deform_conv2d(x, at, share, weight, added, *[geometry[key] for key in geometry])

    parameters = (layer.weight, layer.bias) if bias else (layer.weight,)
    torch.autograd.gradcheck(run, (images, offset, mask, *parameters))


def test_packed_deformable_convolutions_begin_as_convolutions(ops):
    images = torch.rand(1, 4, 8, 8)
    first = ops.DeformConv2dPack(4, 6, 3, padding=1)
    torch.testing.assert_close(first(images), F.conv2d(images, first.weight, padding=1))
    second = ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    torch.testing.assert_close(second(images), F.conv2d(images, 0.5 * second.weight, second.bias, padding=1))


def test_deform_conv_in_half_precision(ops):
    layer = ops.DeformConv2d(4, 6, 3, padding=1).bfloat16()
    images, offset = deformable(layer)
    y = layer(images, offset)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    exact = ops.DeformConv2d(4, 6, 3, padding=1)
    exact.weight.data = layer.weight.detach().float()
    torch.testing.assert_close(y, exact(images.float(), offset.float()).bfloat16())
    assert images.grad.dtype == offset.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


def test_other_operators_exist_and_are_refused_when_called(ops):
    ext = sys.modules[mmcv_ext.NAME]
    assert callable(ext.carafe_forward) and hasattr(ext, "anything_at_all")
    with pytest.raises(NotImplementedError, match="mmcv operator nms_rotated needs compiled ops"):
        ops.nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    with pytest.raises(NotImplementedError, match="mmcv operator box_iou_rotated needs compiled ops"):
        ops.box_iou_rotated(torch.rand(3, 5), torch.rand(3, 5))
    with pytest.raises(AttributeError, match="__wrapped__"):
        ext.__wrapped__  # noqa: B018
    assert not hasattr(ext, "__path__")


def test_the_module_looks_like_one():
    ext = sys.modules[mmcv_ext.NAME]
    assert importlib.util.find_spec(mmcv_ext.NAME) is ext.__spec__ and ext.__spec__.name == "mmcv._ext"
    assert mmcv_ext.install() and sys.modules[mmcv_ext.NAME] is ext, "a second call changes nothing"


def test_steps_aside_for_loaded_operators(monkeypatch):
    compiled = types.ModuleType(mmcv_ext.NAME)
    monkeypatch.setitem(sys.modules, mmcv_ext.NAME, compiled)
    assert not mmcv_ext.install() and sys.modules[mmcv_ext.NAME] is compiled


def test_steps_aside_for_operators_that_could_be_loaded(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, None) if name == mmcv_ext.NAME else None

    monkeypatch.delitem(sys.modules, mmcv_ext.NAME)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert not mmcv_ext.install() and mmcv_ext.NAME not in sys.modules


def test_without_mmcv_there_is_nothing_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, mmcv_ext.NAME)
    monkeypatch.setitem(sys.modules, "mmcv", None)
    assert not mmcv_ext.install() and mmcv_ext.NAME not in sys.modules


@pytest.mark.gpu
def test_gpu_against_cpu(ops):
    boxes, scores = boxes_of(200), torch.rand(200)
    dets, kept = ops.nms(boxes, scores, 0.5, offset=1)
    dets_gpu, kept_gpu = ops.nms(boxes.cuda(), scores.cuda(), 0.5, offset=1)
    assert kept_gpu.is_cuda and kept_gpu.tolist() == kept.tolist()
    torch.testing.assert_close(dets_gpu.cpu(), dets)
    soft, soft_gpu = ops.soft_nms(boxes, scores), ops.soft_nms(boxes.cuda(), scores.cuda())
    assert soft_gpu[1].is_cuda and soft_gpu[1].tolist() == soft[1].tolist()
    torch.testing.assert_close(soft_gpu[0].cpu(), soft[0])

    rois = torch.cat([torch.arange(20)[:, None] % 2, boxes_of(20)], dim=1)
    align = ops.RoIAlign((7, 7), 0.25, 0)
    target = torch.randint(0, 6, (30,))
    first = ops.DeformConv2d(4, 6, 3, padding=1, deform_groups=2)
    second = ops.ModulatedDeformConv2d(4, 6, 3, padding=1, deform_groups=2)
    cases = [
        (lambda x: align(x, rois.to(x)), [torch.rand(2, 5, 32, 32)]),
        (lambda x: ops.sigmoid_focal_loss(x, target.to(x.device), 2.0, 0.25, None, "none"), [torch.randn(30, 5)]),
        (lambda x, at, w: ops.deform_conv2d(x, at, w, 1, 1, 1, 1, 2), [*deformable(first), first.weight]),
        (
            lambda x, at, m, w, b: ops.modulated_deform_conv2d(x, at, m, w, b, 1, 1, 1, 1, 2),
            [*deformable(second, masked=True), second.weight, second.bias],
        ),
    ]
    for run, inputs in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            results = []
            for device in ("cpu", "cuda"):
                leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
                y = run(*leaves)
                assert y.device.type == device and y.dtype == dtype
                y.backward(torch.ones_like(y))
                results.append([y.detach().cpu().float(), *[leaf.grad.cpu().float() for leaf in leaves]])
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            for cpu, gpu in zip(*results, strict=True):
                torch.testing.assert_close(gpu, cpu, rtol=tolerance, atol=tolerance * float(cpu.abs().max()))

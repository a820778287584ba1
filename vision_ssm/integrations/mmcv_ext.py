"""The extension module of mmcv, ``mmcv._ext``, on torchvision's operators, for installations of mmcv without one.

Everything in ``mmcv.ops`` reaches its compiled code through functions of that one module, which write their results
into tensors they are given. The functions here have the same names and arguments, run wherever torchvision's operators
do (CPU and CUDA), and are all that UPerNet, Mask R-CNN, Cascade R-CNN, RetinaNet, Soft-NMS and deformable convolutions
need. Every other function of the module exists and raises `NotImplementedError` when it is called.

Source of the semantics: mmcv 2 (Apache-2.0), the Python side of mmcv.ops. Papers: Mask R-CNN (RoIAlign), arXiv
1703.06870; Focal Loss, arXiv 1708.02002; Soft-NMS, arXiv 1704.04503; Deformable ConvNets v1 and v2, arXiv 1703.06211
and 1811.11168.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

NAME = "mmcv._ext"
_HALF = (torch.float16, torch.bfloat16)
_NAIVE, _LINEAR, _GAUSSIAN = 0, 1, 2
_MAX_POOL = 0


def widen(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32, which every operator of torchvision takes on every device."""
    return [tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, (K,) int64, best first.

    boxes: (N, 4), corners. offset: what a side is longer by than the difference of its ends, 0 or 1.
    """
    boxes, scores = boxes.float(), scores.float()
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores, float(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: boxes in the order they are chosen, scores of the others falling with their overlap.

    Writes boxes and fallen scores into the first rows of `dets`, (N, 5). A box leaves when its score falls below
    `min_score`.

    Args:
        boxes, scores: (N, 4) and (N,).
        method: 0 suppresses a box from `iou_threshold` on, 1 multiplies its score by 1 - IoU from there on, 2 by
            exp(-IoU^2 / `sigma`) whatever the IoU is.

    Returns:
        Indices of the boxes that are left, (K,) int64.
    """
    boxes, scores = boxes.float(), scores.float().clone()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    left = torch.arange(len(boxes), device=boxes.device)
    chosen = []
    while len(left):
        best = left[scores[left].argmax()]
        chosen.append(best)
        left = left[left != best]
        corners = torch.maximum(boxes[left, :2], boxes[best, :2]), torch.minimum(boxes[left, 2:], boxes[best, 2:])
        common = (corners[1] - corners[0] + offset).clamp(min=0).prod(1)
        iou = common / (areas[left] + areas[best] - common)
        if method == _GAUSSIAN:
            weight = torch.exp(-(iou**2) / sigma)
        else:
            reduced = 1 - iou if method == _LINEAR else torch.zeros_like(iou)
            weight = torch.where(iou >= iou_threshold, reduced, 1.0)
        scores[left] *= weight
        left = left[scores[left] >= min_score]
    indices = torch.stack(chosen) if chosen else left
    dets[: len(indices)] = torch.cat([boxes[indices], scores[indices, None]], dim=1)
    return indices


def _sampling(sampling_ratio: int, pool_mode: int) -> int:
    if pool_mode == _MAX_POOL:
        raise NotImplementedError("mmcv operator roi_align needs compiled ops for pool_mode='max'; use pool_mode='avg'")
    return sampling_ratio if sampling_ratio > 0 else -1


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average-pooling RoIAlign of (B, C, H, W) at (K, 5) regions (image, corners), into `output`, (K, C, h, w)."""
    ratio = _sampling(sampling_ratio, pool_mode)
    features = widen(input)[0]
    size = aligned_height, aligned_width
    pooled = torch.ops.torchvision.roi_align(features, rois.to(features.dtype), spatial_scale, *size, ratio, aligned)
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds to `grad_input`, (B, C, H, W), the gradient of `roi_align_forward`."""
    ratio = _sampling(sampling_ratio, pool_mode)
    grad = widen(grad_output)[0]
    size = aligned_height, aligned_width
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad, rois.to(grad.dtype), spatial_scale, *size, *grad_input.shape, ratio, aligned
    )


def _focal_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float32 at least, which entries are of their row's class, and every entry's factor, (N, C) each."""
    logits = widen(input)[0]
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)  # background: no class at all
    scale = torch.where(positive, alpha, 1 - alpha).to(logits.dtype)
    if weight.numel():
        of_class = F.pad(weight.to(logits.dtype), (0, 1), value=1.0)  # weights say nothing about background
        scale = scale * of_class[target, None]
    return logits, positive, scale


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of every logit, into `output`, (N, C): -alpha (1 - p)^gamma log p for the class of a row, and
    -(1 - alpha) p^gamma log(1 - p) for all others.

    Args:
        input: logits, (N, C).
        target: class of each row, (N,) int64; C means background, which is none of the classes.
        weight: factor of the rows of each class, (C,), or an empty tensor. Rows of background have the factor 1.
    """
    logits, positive, scale = _focal_terms(input, target, weight, alpha)
    signed = torch.where(positive, logits, -logits)  # sigmoid of it: probability of the truth
    output.copy_(-scale * torch.sigmoid(-signed) ** gamma * F.logsigmoid(signed))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of `sigmoid_focal_loss_forward` by each logit, into `grad_input`, (N, C)."""
    logits, positive, scale = _focal_terms(input, target, weight, alpha)
    signed = torch.where(positive, logits, -logits)
    right, wrong = torch.sigmoid(signed), torch.sigmoid(-signed)
    slope = scale * wrong**gamma * (gamma * right * F.logsigmoid(signed) - wrong)
    grad_input.copy_(torch.where(positive, slope, -slope))


class _Convolution:
    """Geometry of a deformable convolution, and torchvision's operator on it."""

    def __init__(
        self,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        offset_groups: int,
    ):
        self.options = (*stride, *padding, *dilation, groups, offset_groups)

    def _operands(
        self, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[list[Tensor], bool]:
        absent = input.new_zeros(input.shape[0], 1), input.new_zeros(weight.shape[0])
        given = [input, weight, offset, absent[0] if mask is None else mask, absent[1] if bias is None else bias]
        return widen(*(tensor.contiguous() for tensor in given)), mask is not None

    def forward(
        self, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        operands, masked = self._operands(input, weight, offset, mask, bias)
        return torch.ops.torchvision.deform_conv2d(*operands, *self.options, masked)

    def backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of input, weight, offset, mask and bias."""
        operands, masked = self._operands(input, weight, offset, mask, None)
        grad = widen(grad.contiguous())[0]
        return torch.ops.torchvision._deform_conv2d_backward(grad, *operands, *self.options, masked)


def _first_version(options: dict[str, Any]) -> _Convolution:
    """Geometry as the functions of the first deformable convolution are told it."""
    stride, padding, dilation = [(options[f"{name}H"], options[f"{name}W"]) for name in ("d", "pad", "dilation")]
    return _Convolution(stride, padding, dilation, options["group"], options["deformable_group"])


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **options: Any
) -> None:
    """Deformable convolution of (B, C, H, W) with offsets (B, 2 * G * kH * kW, H', W'), into `output`.

    `columns` and `ones` are scratch memory of the compiled operator and stay untouched.
    """
    output.copy_(_first_version(options).forward(input, weight, offset))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    """Adds to `grad_input` and `grad_offset` those gradients of `deform_conv_forward`."""
    of_input, _, of_offset, _, _ = _first_version(options).backward(grad_output, input, weight, offset)
    grad_input += of_input
    grad_offset += of_offset


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **options: Any,
) -> None:
    """Adds to `grad_weight` that gradient of `deform_conv_forward` times ``scale``."""
    weight = torch.zeros_like(grad_weight)  # whose own gradient does not depend on it
    grad_weight += options["scale"] * _first_version(options).backward(grad_output, input, weight, offset)[1]


def _second_version(options: dict[str, Any]) -> _Convolution:
    """Geometry as the functions of the modulated deformable convolution are told it."""
    stride, padding, dilation = [(options[f"{name}_h"], options[f"{name}_w"]) for name in ("stride", "pad", "dilation")]
    return _Convolution(stride, padding, dilation, options["group"], options["deformable_group"])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    """Deformable convolution whose samples are weighted by `mask`, (B, G * kH * kW, H', W'), into `output`."""
    added = bias if options["with_bias"] else None
    output.copy_(_second_version(options).forward(input, weight, offset, mask, added))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **options: Any,
) -> None:
    """Adds to the given gradients those of `modulated_deform_conv_forward`."""
    found = _second_version(options).backward(grad_output, input, weight, offset, mask)
    for total, part in zip((grad_input, grad_weight, grad_offset, grad_mask), found):
        total += part
    if options["with_bias"]:
        grad_bias += found[4]


FUNCTIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}
"""What the module offers; any other function of mmcv's raises."""


def _missing(name: str) -> Any:
    """The module's ``__getattr__``: mmcv asks for all its functions when it is imported, and calls few."""
    if name.startswith("__"):
        raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv operator {name} needs compiled ops, which this installation of mmcv does not have; torchvision has"
            f" no counterpart. Install a build of mmcv with its ops, or choose a model without {name}"
        )

    return missing


def install() -> bool:
    """Put these functions in the place of ``mmcv._ext`` if there is no such module.

    To be called before ``mmcv.ops`` is imported first. Real compiled operators are left alone.

    Returns:
        Whether mmcv's operators are those of this file: False where mmcv is not installed or has its own.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        return getattr(present, "__file__", None) == __file__
    try:
        if importlib.util.find_spec(NAME) is not None:
            return False
    except ModuleNotFoundError:  # no mmcv
        return False
    module = types.ModuleType(NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None, origin=__file__)
    module.__file__ = __file__
    module.__dict__.update(FUNCTIONS, __getattr__=_missing)
    sys.modules[NAME] = module
    return True

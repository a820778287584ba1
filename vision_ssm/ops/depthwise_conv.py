"""Depthwise convolution of channel-last maps with bias and activation: what precedes the scan in most families."""

import math
from typing import Any

from torch import Tensor

from . import torch_depthwise_conv
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .registration import register_operator
from .torch_depthwise_conv import ACTIVATIONS, depthwise_conv_reference

_OP = "depthwise_conv"


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def depthwise_conv_flops(elements: int, kernel_size: tuple[int, int]) -> int:
    """FLOPs for `elements` outputs, 2 per multiply-accumulate; bias and activation are not counted."""
    return 2 * elements * math.prod(kernel_size)


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any) -> int:
    return depthwise_conv_flops(math.prod(x), (weight[2], weight[3]))


_convolve = register_operator(
    _OP,
    "Tensor x, Tensor weight, Tensor? bias, str activation",
    ("y",),
    torch_depthwise_conv,
    _fake,
    _flops,
)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """``activation(conv2d(x, weight) + bias)``, every channel on its own; the map keeps its size.

    The convolution has stride 1 and is padded with zeros. Kernels compute in float32, whatever autocast says; without
    a kernel, the convolution itself runs in the dtype of `x`, as `nn.Conv2d` does under autocast. float64 `x` is
    computed in float64. Only the inputs are kept for the backward pass.

    Args:
        x: (B, H, W, C), channels last, any floating dtype. Read in place if its positions are equally spaced in memory,
            as those of a slice of channels are.
        weight: (C, 1, kh, kw), the parameter of a depthwise `nn.Conv2d`; kh and kw are odd.
        bias: (C).
        activation: "none", "silu" or "gelu" (the exact one).

    Returns:
        (B, H, W, C) in the dtype of `x`.

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit, or a kernel size is even; unknown `activation`; VISION_SSM_BACKEND
            names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(x=x, weight=weight), dict(bias=bias))
    check_dimensions(_OP, "x", x, "(B, H, W, C)")
    check_dimensions(_OP, "weight", weight, "(C, 1, kh, kw)")
    channels, (kernel_height, kernel_width) = x.shape[3], weight.shape[2:]
    check_shape(_OP, "weight", weight, (channels, 1, kernel_height, kernel_width), "(C, 1, kh, kw)")
    if kernel_height % 2 == 0 or kernel_width % 2 == 0:
        raise ValueError(
            f"{_OP}: kernel sizes must be odd, so that the map keeps its size, got {kernel_height} x {kernel_width}"
        )
    check_shape(_OP, "bias", bias, (channels,), "(C)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{_OP}: unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")

    if demanded_backend() == "reference":
        return depthwise_conv_reference(x, weight, bias, activation=activation)
    return _convolve(x, weight, bias, activation)

"""Depthwise convolution of channel-last maps in plain PyTorch: the twin that defines it, and what runs anywhere."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import work_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda pre: pre, "silu": F.silu, "gelu": F.gelu}
_ACTIVATIONS_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, pre: grad,
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
}


def depthwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """The twin: a sum of shifted maps; see :func:`vision_ssm.ops.depthwise_conv.depthwise_conv` for the arguments."""
    work = work_dtype(x)
    _, height, width, _ = x.shape
    kernel_height, kernel_width = weight.shape[2:]
    padding_height, padding_width = kernel_height // 2, kernel_width // 2
    padded = F.pad(x.to(work), (0, 0, padding_width, padding_width, padding_height, padding_height))
    total = torch.zeros_like(x, dtype=work)
    for i in range(kernel_height):
        for j in range(kernel_width):
            total = total + padded[:, i : i + height, j : j + width] * weight[:, 0, i, j].to(work)
    if bias is not None:
        total = total + bias.to(work)
    return ACTIVATIONS[activation](total).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The pre-activation (B, H, W, C) in the dtype of x, as `nn.Conv2d` under autocast gives it."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    bias = None if bias is None else bias.to(x.dtype)
    # A permuted channel-last map is a channels_last tensor, so nothing is copied
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, padding=padding, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x: (B, H, W, C), weight: (C, 1, kh, kw), bias: (C). Returns a tensor like x."""
    pre = _convolve(x, weight, bias)
    return pre if activation == "none" else ACTIVATIONS[activation](pre.to(work_dtype(x))).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> dict[str, Tensor]:
    """grad: (B, H, W, C). Returns the gradients of x, weight and, if it is given, bias."""
    work = work_dtype(x)
    wide = grad.to(work)
    if activation != "none":
        wide = _ACTIVATIONS_BACKWARD[activation](wide, _convolve(x, weight, bias).to(work))
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        wide.to(x.dtype).permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        None,
        [1, 1],
        [weight.shape[2] // 2, weight.shape[3] // 2],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [True, True, False],
    )
    grads = {"x": grad_x.permute(0, 2, 3, 1), "weight": grad_weight}
    if bias is not None:
        grads["bias"] = wide.sum((0, 1, 2))  # in float32, which the convolution would not do
    return grads

"""Layer norm and RMS norm over the last axis, with the residual addition before it in a pre-norm block."""

import math
from typing import Any

import torch
from torch import Tensor

from . import torch_layer_norm
from .backend import demanded_backend
from .checks import check_shape, check_tensors
from .registration import register_operator, wants_gradient
from .torch_layer_norm import layer_norm_reference

_OP = "layer_norm"
# Layer norm: mean 1, deviation 3, normalising 2, weight and bias 2. RMS norm: squares 2, normalising 1, weight 1.
_FLOPS_PER_ELEMENT = {True: 8, False: 4}


def _fake(
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_dtype: torch.dtype | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    s = x.new_empty(0 if residual is None else x.shape)
    return s, x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def layer_norm_flops(x: tuple[int, ...], residual: tuple[int, ...] | None, center: bool = True) -> int:
    """FLOPs of a norm of a tensor of shape `x`: 8 per element, of an RMS norm 4; 1 for the addition of a `residual`."""
    return (_FLOPS_PER_ELEMENT[center] + (residual is not None)) * math.prod(x)


def _flops_of_inputs(*inputs: Any) -> int:
    x, residual, _, _, _, _, center, *_ = inputs
    return layer_norm_flops(x, residual, center)


# What backward needs is s, not x and the residual. An operator may not return one tensor twice, so `saved` could only
# hold a copy of s: 4 bytes written and kept per float32 element. Instead backward adds again: it reads and keeps the
# residual, which is 2 bytes in a bfloat16 branch, and x, which is the s of the norm before and kept by that anyway.
_layer_norm = register_operator(
    _OP,
    "Tensor x, Tensor? residual, Tensor? row_scale, Tensor weight, Tensor? bias, float eps, bool center, "
    "ScalarType? out_dtype, bool save",
    ("s", "y"),
    torch_layer_norm,
    _fake,
    _flops_of_inputs,
    saved=("statistics",),
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    center: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm, or RMS norm, over the last axis of ``s = x + row_scale * residual``.

    ``y = (s - mean) / sqrt(var + eps) * weight + bias``, or ``y = s / sqrt(mean of squares + eps) * weight + bias``
    without `center`, computed in float32 (float64 for float64 `x`) whatever autocast says, from s as it is returned, in
    the dtype of `x`.

    Args:
        x: (B, ..., C), any floating dtype.
        weight: (C).
        bias: (C), or None.
        residual: (B, ..., C), what is added to `x` before the norm, any floating dtype.
        row_scale: (B), factor of every sample's residual, as drop path gives it. Not differentiable.
        eps: added to the variance, or to the mean of squares.
        center: whether the mean is subtracted: a layer norm; if not, an RMS norm.
        out_dtype: floating dtype of y; None: that of `x`.

    Returns:
        y in `out_dtype`, or with a `residual` the pair (s, y), both of the shape of `x`.

    Raises:
        TypeError: a tensor is complex or not floating-point, or `out_dtype` is no floating dtype.
        ValueError: a shape, a device or `eps` does not fit; `row_scale` without `residual`, or with a gradient;
            VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(x=x, weight=weight), dict(bias=bias, residual=residual, row_scale=row_scale))
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x must be (B, ..., C) without an empty dimension but B, got shape {tuple(x.shape)}")
    check_shape(_OP, "weight", weight, tuple(x.shape[-1:]), "(C)")
    check_shape(_OP, "bias", bias, tuple(x.shape[-1:]), "(C)")
    check_shape(_OP, "residual", residual, tuple(x.shape), "(B, ..., C) like x")
    check_shape(_OP, "row_scale", row_scale, tuple(x.shape[:1]), "(B)")
    if row_scale is not None and residual is None:
        raise ValueError(f"{_OP}: row_scale is a factor of residual, which is not given")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{_OP}: row_scale is not differentiable; pass row_scale.detach()")
    if eps < 0:
        raise ValueError(f"{_OP}: eps must be 0 or more, got {eps}")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"{_OP}: out_dtype must be a floating dtype such as torch.bfloat16, got {out_dtype!r}")

    if demanded_backend() == "reference":
        return layer_norm_reference(
            x, weight, bias, residual=residual, row_scale=row_scale, eps=eps, center=center, out_dtype=out_dtype
        )
    save = wants_gradient(x, residual, weight, bias)
    s, y, _ = _layer_norm(x, residual, row_scale, weight, bias, eps, center, out_dtype, save)
    return y if residual is None else (s, y)

"""Layer norm in plain PyTorch: its reference twin, and the path of every device without a kernel of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunked import work_dtype


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Residual addition and layer norm, formula by formula; see :func:`vision_ssm.ops.layer_norm.layer_norm`."""
    work = work_dtype(x)
    s = x.to(work)
    if residual is not None:
        branch = residual.to(work)
        if row_scale is not None:
            branch = branch * row_scale.to(work).view(-1, *[1] * (x.dim() - 1))
        s = s + branch
    s = s.to(x.dtype)
    centred = s.to(work) - s.to(work).mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = (y * weight.to(work) + bias.to(work)).to(out_dtype or x.dtype)
    return y if residual is None else (s, y)


def _sum(x: Tensor, residual: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """``x + row_scale * residual`` in the dtype of `x`, and `x` itself without a residual."""
    if residual is None:
        return x
    work = work_dtype(x)
    if row_scale is None:
        return torch.add(x.to(work), residual.to(work)).to(x.dtype)
    scale = row_scale.to(work).view(-1, *[1] * (x.dim() - 1))
    return torch.addcmul(x.to(work), residual.to(work), scale).to(x.dtype)


def _shifted(s: Tensor) -> Tensor:
    """`s` without the first value of its row, which changes no norm.

    PyTorch's own norm keeps the mean in float32: where that is 1e4 times the deviation, four digits of the result are
    lost. A value of the row is as near to the mean as the deviation tells, and is subtracted exactly.
    """
    s = s.to(work_dtype(s))
    return s - s[..., :1]


def empty_saved(
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    save: bool,
) -> Sequence[Tensor]:
    """Mean and reciprocal deviation of every row, (rows, 2)."""
    return [x.new_empty(math.prod(x.shape[:-1]), 2, dtype=work_dtype(x))]


def forward(
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
    save: bool,
) -> Sequence[Tensor]:
    """Returns s (empty without a residual), y and, if `save`, the mean and reciprocal deviation of every row."""
    work = work_dtype(x)
    s = _sum(x, residual, row_scale)
    y, mean, rstd = torch.native_layer_norm(_shifted(s), x.shape[-1:], weight.to(work), bias.to(work), eps)
    results = [x.new_empty(0) if residual is None else s, y.to(out_dtype or x.dtype)]
    return [*results, torch.stack([mean.flatten(), rstd.flatten()], dim=1)] if save else results


def backward(
    grad_s: Tensor,
    grad_y: Tensor,
    statistics: Tensor,
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *_: object,
) -> dict[str, Tensor]:
    """Gradients by name, from the `statistics` that `forward` kept; zeros for `row_scale`."""
    work = work_dtype(x)
    if not grad_y.numel():
        grad_y = x.new_zeros(x.shape)
    mean, rstd = (column.view(*x.shape[:-1], 1) for column in statistics.unbind(1))
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(work).contiguous(),
        _shifted(_sum(x, residual, row_scale)),
        x.shape[-1:],
        mean.contiguous(),
        rstd.contiguous(),
        weight.to(work),
        bias.to(work),
        [True, True, True],
    )
    if x.shape[-1] == 1:
        grad.zero_()  # y is the bias; PyTorch leaves a rounding error, times the large reciprocal deviation
    gradients = {"weight": grad_weight, "bias": grad_bias}
    if residual is not None:
        if grad_s.numel():
            grad = grad + grad_s.to(work)
        gradients["residual"] = grad.clone()
        if row_scale is not None:
            gradients["residual"] = grad * row_scale.to(work).view(-1, *[1] * (x.dim() - 1))
            gradients["row_scale"] = torch.zeros_like(row_scale)
    return gradients | {"x": grad}

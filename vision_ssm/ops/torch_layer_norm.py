"""Layer norm and RMS norm in plain PyTorch: their reference twin, and the path of every device without a kernel."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunked import work_dtype


def layer_norm_reference(
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
    """Residual addition and norm, formula by formula; see :func:`vision_ssm.ops.layer_norm.layer_norm`."""
    work = work_dtype(x)
    s = x.to(work)
    if residual is not None:
        branch = residual.to(work)
        if row_scale is not None:
            branch = branch * row_scale.to(work).view(-1, *[1] * (x.dim() - 1))
        s = s + branch
    s = s.to(x.dtype)
    y = s.to(work)
    if center:
        y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(work)
    if bias is not None:
        y = y + bias.to(work)
    y = y.to(out_dtype or x.dtype)
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
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_dtype: torch.dtype | None,
    save: bool,
) -> Sequence[Tensor]:
    """Mean, if it is subtracted, and reciprocal deviation of every row, (rows, 2) or (rows, 1)."""
    return [x.new_empty(math.prod(x.shape[:-1]), 1 + center, dtype=work_dtype(x))]


def forward(
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_dtype: torch.dtype | None,
    save: bool,
) -> Sequence[Tensor]:
    """Returns s (empty without a residual), y and, if `save`, what `empty_saved` describes."""
    work = work_dtype(x)
    s = _sum(x, residual, row_scale)
    weight, bias = weight.to(work), None if bias is None else bias.to(work)
    if center:
        y, *statistics = torch.native_layer_norm(_shifted(s), x.shape[-1:], weight, bias, eps)
    else:
        wide = s.to(work).contiguous()  # whatever the strides, rows are summed in one order
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y, statistics = (wide * rstd).mul_(weight), [rstd]
        if bias is not None:
            y += bias
    results = [x.new_empty(0) if residual is None else s, y.to(out_dtype or x.dtype)]
    return [*results, torch.stack([column.flatten() for column in statistics], dim=1)] if save else results


def _centred_backward(
    grad_y: Tensor, s: Tensor, statistics: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the sum `s`, the weight and the bias of a layer norm; all tensors in the working dtype."""
    mean, rstd = (column.contiguous() for column in statistics)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_y, _shifted(s), s.shape[-1:], mean, rstd, weight, bias, [True, True, bias is not None]
    )
    if s.shape[-1] == 1:
        grad.zero_()  # y is the bias; PyTorch leaves a rounding error, times the large reciprocal deviation
    return grad, grad_weight, grad_bias


def _rms_backward(
    grad_y: Tensor, s: Tensor, statistics: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_centred_backward`, of an RMS norm."""
    (rstd,) = statistics
    normal, weighted = s * rstd, grad_y * weight
    grad = (weighted - normal * (weighted * normal).mean(-1, keepdim=True)) * rstd
    rows = tuple(range(s.dim() - 1))
    return grad, (grad_y * normal).sum(rows), None if bias is None else grad_y.sum(rows)


def backward(
    grad_s: Tensor,
    grad_y: Tensor,
    statistics: Tensor,
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    out_dtype: torch.dtype | None,
    save: bool,
) -> dict[str, Tensor]:
    """Gradients by name, from the `statistics` that `forward` kept; zeros for `row_scale`."""
    if not save:  # exported where no gradient was wanted
        *_, statistics = forward(x, residual, row_scale, weight, bias, eps, center, out_dtype, True)
    work = work_dtype(x)
    if not grad_y.numel():
        grad_y = x.new_zeros(x.shape)
    grad, grad_weight, grad_bias = (_centred_backward if center else _rms_backward)(
        grad_y.to(work).contiguous(),
        _sum(x, residual, row_scale).to(work).contiguous(),
        [column.view(*x.shape[:-1], 1) for column in statistics.unbind(1)],
        weight.to(work),
        None if bias is None else bias.to(work),
    )
    gradients = {"weight": grad_weight}
    if grad_bias is not None:
        gradients["bias"] = grad_bias
    if residual is not None:
        if grad_s.numel():
            grad = grad + grad_s.to(work)
        gradients["residual"] = grad.clone()
        if row_scale is not None:
            gradients["residual"] = grad * row_scale.to(work).view(-1, *[1] * (x.dim() - 1))
            gradients["row_scale"] = torch.zeros_like(row_scale)
    return gradients | {"x": grad}

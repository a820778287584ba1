"""Layer norm and RMS norm of channel-last rows, with the residual addition before it: memory-bound kernels.

A tile is [ROWS, CHUNK] numbers, 4 per lane, so that every lane moves 16 bytes of float32 and 8 of half precision
whatever the mix of dtypes, and no tile changes its layout. A program holds whole rows, as PARTS tiles side by side; up
to `_WARP_ROW` channels a row belongs to one warp, and its sums need no barrier. Sizes that are 3 times a power of two,
as those of most backbones are, leave no lane idle.

Bytes moved per element, with x and s in float32, the residual and y in bfloat16: forward reads 6 and writes 6, backward
reads 12 and writes 6; without residual, 4 + 2 and 6 + 4.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div, power_of_2
from .sums import sum_parts

_WARPS = 4
_TILE = _WARPS * 32 * 4  # numbers of one tile: more per lane, and half-precision loads would ask for another layout
_WARP_ROW = 1024  # channels up to which a row stays in one warp
_INTERPRETED_PROGRAMS = 2  # in Triton's interpreter, where there is no GPU to fill


@triton.jit
def _row_sum(terms):
    """Sum of a row's tiles, [ROWS, CHUNK] each, over all columns."""
    total = terms[0]
    for part in tl.static_range(1, len(terms)):
        total += terms[part]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def _columns(part: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of tile number `part`, [ROWS, CHUNK].

    One row of them would do, but what is loaded with that would have a layout of its own, and go through shared memory.
    """
    return tl.broadcast_to((part * CHUNK + tl.arange(0, CHUNK))[None, :], [ROWS, CHUNK])


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(x, residual, scale, offsets, mask):
    """``x + scale * residual`` in float32, rounded as it is stored in the dtype of x."""
    total = _load(x + offsets, mask)
    if residual is not None:
        branch = _load(residual + offsets, mask)
        if scale is not None:
            branch *= scale
        total = (total + branch).to(x.dtype.element_ty).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["row_count", "rows_per_sample"])
def _layer_norm_forward_kernel(
    x,  # (rows, C)
    residual,  # (rows, C) or None
    row_scale,  # (samples) or None
    weight,  # (C)
    bias,  # (C) or None
    s,  # (rows, C) or None
    y,  # (rows, C)
    statistics,  # (rows, 2), without CENTER (rows, 1), or None
    row_count,
    rows_per_sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < row_count
    scale = None
    if row_scale is not None:
        scale = _load(row_scale + rows.to(row_count.dtype) // rows_per_sample, inside)
    values = ()
    for part in tl.static_range(PARTS):
        columns = _columns(part, ROWS, CHUNK)
        values += (_load_sum(x, residual, scale, rows * C + columns, inside & (columns < C)),)
    if s is not None:
        for part in tl.static_range(PARTS):
            columns = _columns(part, ROWS, CHUNK)
            mask = inside & (columns < C)
            tl.store(s + rows * C + columns, values[part].to(s.dtype.element_ty), mask=mask)

    centred = ()
    squares = ()
    if CENTER:
        # The mean is only as exact as its dtype. What is left of it after the subtraction is subtracted in a second
        # step, so that rows far from 0 keep their digits, and rows of one value become 0.
        coarse = _row_sum(values) / C
        for part in tl.static_range(PARTS):
            columns = _columns(part, ROWS, CHUNK)
            difference = tl.where(columns < C, values[part] - coarse, 0.0)
            centred += (difference,)
            squares += (difference * difference,)
        rest = _row_sum(centred) / C
        rstd = tl.rsqrt(tl.maximum(_row_sum(squares) / C - rest * rest, 0.0) + eps)
    else:
        for part in tl.static_range(PARTS):
            squares += (values[part] * values[part],)
        rstd = tl.rsqrt(_row_sum(squares) / C + eps)
    for part in tl.static_range(PARTS):
        columns = _columns(part, ROWS, CHUNK)
        normal = (centred[part] - rest) * rstd if CENTER else values[part] * rstd
        out = normal * _load(weight + columns, columns < C)
        if bias is not None:
            out += _load(bias + columns, columns < C)
        tl.store(y + rows * C + columns, out.to(y.dtype.element_ty), mask=inside & (columns < C))
    if statistics is not None:
        if CENTER:
            tl.store(statistics + rows * 2, coarse + rest, mask=inside)
            tl.store(statistics + rows * 2 + 1, rstd, mask=inside)
        else:
            tl.store(statistics + rows, rstd, mask=inside)


@triton.jit(do_not_specialize=["row_count", "rows_per_sample"])
def _layer_norm_backward_kernel(
    grad_y,  # (rows, C)
    grad_s,  # (rows, C) or None
    x,  # (rows, C)
    residual,  # (rows, C) or None
    row_scale,  # (samples) or None
    statistics,  # (rows, 2), without CENTER (rows, 1)
    weight,  # (C)
    grad_x,  # (rows, C)
    grad_residual,  # (rows, C) or None
    partials,  # (2, programs, C): gradients of weight and bias from the rows of every program; (1, ...) without BIAS
    row_count,
    rows_per_sample,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
    BIAS: tl.constexpr,
):
    grad_weight = ()
    grad_bias = ()
    for _ in tl.static_range(PARTS):
        grad_weight += (tl.zeros([ROWS, CHUNK], tl.float32),)
        if BIAS:
            grad_bias += (tl.zeros([ROWS, CHUNK], tl.float32),)

    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    for _ in range(tl.program_id(0), tl.cdiv(row_count, ROWS), tl.num_programs(0)):
        inside = rows < row_count
        scale = None
        if row_scale is not None:
            scale = _load(row_scale + rows.to(row_count.dtype) // rows_per_sample, inside)
        if CENTER:
            mean = _load(statistics + rows * 2, inside)
            rstd = _load(statistics + rows * 2 + 1, inside)
        else:
            rstd = _load(statistics + rows, inside)
        values = ()
        gradients = ()
        others = ()
        for part in tl.static_range(PARTS):
            columns = _columns(part, ROWS, CHUNK)
            mask = inside & (columns < C)
            values += (_load_sum(x, residual, scale, rows * C + columns, mask),)
            gradients += (_load(grad_y + rows * C + columns, mask),)
            if grad_s is not None:
                others += (_load(grad_s + rows * C + columns, mask),)

        # As in the forward kernel, `rest` is what the stored mean lacks; the other sums do not have to wait for it.
        centred = ()
        weighted = ()
        products = ()
        for part in tl.static_range(PARTS):
            columns = _columns(part, ROWS, CHUNK)
            centred += (tl.where(columns < C, values[part] - mean, 0.0) if CENTER else values[part],)
            weighted += (gradients[part] * _load(weight + columns, columns < C),)
            products += (weighted[part] * centred[part],)
        if CENTER:
            rest = _row_sum(centred) / C
            mean_weighted = _row_sum(weighted) / C
            mean_product = (_row_sum(products) / C - rest * mean_weighted) * rstd
        else:
            mean_product = _row_sum(products) / C * rstd

        old_weight, old_bias = grad_weight, grad_bias
        grad_weight = ()
        grad_bias = ()
        for part in tl.static_range(PARTS):
            columns = _columns(part, ROWS, CHUNK)
            mask = inside & (columns < C)
            normal = (centred[part] - rest) * rstd if CENTER else centred[part] * rstd
            grad_weight += (old_weight[part] + gradients[part] * normal,)
            if BIAS:
                grad_bias += (old_bias[part] + gradients[part],)
            grad = weighted[part] - mean_weighted if CENTER else weighted[part]
            grad = (grad - normal * mean_product) * rstd
            if grad_s is not None:
                grad += others[part]
            tl.store(grad_x + rows * C + columns, grad.to(grad_x.dtype.element_ty), mask=mask)
            if grad_residual is not None:
                if scale is not None:
                    grad *= scale
                tl.store(grad_residual + rows * C + columns, grad.to(grad_residual.dtype.element_ty), mask=mask)
        rows += tl.num_programs(0).to(tl.int64) * ROWS

    to_weight = partials + tl.program_id(0).to(tl.int64) * C
    to_bias = partials + (tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C
    for part in tl.static_range(PARTS):
        columns = part * CHUNK + tl.arange(0, CHUNK)
        tl.store(to_weight + columns, tl.sum(grad_weight[part], axis=0), mask=columns < C)
        if BIAS:
            tl.store(to_bias + columns, tl.sum(grad_bias[part], axis=0), mask=columns < C)


class _Tiling(NamedTuple):
    """Constants of the kernels: a program works on `rows` whole rows, as `parts` tiles of `chunk` columns."""

    rows: int
    chunk: int
    parts: int


@functools.cache
def _tiling(channels: int) -> _Tiling:
    """The widest chunks of those that pad rows of `channels` numbers the least."""
    if channels < 32:
        chunks: Sequence[int] = (power_of_2(channels),)
    elif channels <= _WARP_ROW:
        chunks = [chunk for chunk in (128, 64, 32) if channels <= 8 * chunk]
    else:
        chunks = [chunk for chunk in (512, 256) if channels <= 8 * chunk] or [512]
    chunk = min(chunks, key=lambda chunk: -channels % chunk)
    return _Tiling(_TILE // chunk, chunk, -(-channels // chunk))


@functools.cache
def _backward_programs(device: torch.device, parts: int) -> int:
    """As many programs as run at once, so that each has the same share of the rows."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    per_multiprocessor = 4 if parts <= 4 else 2
    return per_multiprocessor * torch.cuda.get_device_properties(device).multi_processor_count


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
    """Mean, if it is subtracted, and reciprocal deviation of every row, (rows, 2) or (rows, 1) float32."""
    return [x.new_empty(math.prod(x.shape[:-1]), 1 + center, dtype=torch.float32)]


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
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    s = None if residual is None else torch.empty_like(x)
    arguments = (x, residual, row_scale, weight, bias, eps, center, out_dtype, save)
    statistics = empty_saved(*arguments)[0] if save else None
    channels = x.shape[-1]
    rows = x.numel() // channels
    if rows:
        tiling = _tiling(channels)
        launch(
            _layer_norm_forward_kernel,
            (ceil_div(rows, tiling.rows),),
            x,
            residual,
            None if row_scale is None else row_scale.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            s,
            y,
            statistics,
            rows,
            rows // x.shape[0],
            eps,
            C=channels,
            ROWS=tiling.rows,
            CHUNK=tiling.chunk,
            PARTS=tiling.parts,
            CENTER=center,
            num_warps=_WARPS,
        )
    results = [x.new_empty(0) if s is None else s, y]
    return results if statistics is None else [*results, statistics]


def _launch_backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    statistics: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    center: bool = True,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Fills `grad_x` and `grad_residual`; all tensors contiguous.

    Returns the gradients of weight and, if there is one, bias, float32.
    """
    channels = x.shape[-1]
    rows = x.numel() // channels
    expected = (rows, 1 + center)
    if statistics.shape != expected:
        raise ValueError(f"statistics has shape {tuple(statistics.shape)}, expected {expected}; forward saves it")
    if not rows:
        grad_weight, grad_bias = weight.new_zeros(2, channels, dtype=torch.float32)
        return grad_weight, grad_bias if bias else None
    tiling = _tiling(channels)
    programs = min(ceil_div(rows, tiling.rows), _backward_programs(x.device, tiling.parts))
    partials = x.new_empty(1 + bias, programs, channels, dtype=torch.float32)
    launch(
        _layer_norm_backward_kernel,
        (programs,),
        grad_y,
        grad_s,
        x,
        residual,
        row_scale,
        statistics,
        weight,
        grad_x,
        grad_residual,
        partials,
        rows,
        rows // x.shape[0],
        C=channels,
        ROWS=tiling.rows,
        CHUNK=tiling.chunk,
        PARTS=tiling.parts,
        CENTER=center,
        BIAS=bias,
        num_warps=_WARPS,
    )
    if not bias:
        return partials[0].sum(0), None
    _, grad_weight, grad_bias, _ = sum_parts(partials.view(2, programs, 1, 1, channels))
    return grad_weight.view(channels), grad_bias.view(channels)


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
    x = x.contiguous()
    if not grad_y.numel():
        grad_y = x.new_zeros(x.shape)
    grad_x = torch.empty_like(x)
    gradients = {"x": grad_x}
    grad_residual = None
    if residual is not None:
        residual = residual.contiguous()
        gradients["residual"] = grad_residual = torch.empty_like(residual)
    if row_scale is not None:
        row_scale = row_scale.contiguous()
        gradients["row_scale"] = torch.zeros_like(row_scale)
    gradients["weight"], grad_bias = _launch_backward(
        grad_y.contiguous(),
        None if residual is None or not grad_s.numel() else grad_s.contiguous(),
        x,
        residual,
        row_scale,
        statistics,
        weight.contiguous(),
        grad_x,
        grad_residual,
        center,
        bias is not None,
    )
    if grad_bias is not None:
        gradients["bias"] = grad_bias
    return gradients


def normalise_backward(
    grad_y: Tensor,
    s: Tensor,
    statistics: Tensor,
    weight: Tensor,
    grad_s: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of ``y = (s - mean) / deviation * weight + bias``, for kernels that end in a norm.

    Args:
        grad_y: (rows, C), any floating dtype.
        s: (rows, C), what was normalised, any floating dtype.
        statistics: (rows, 2) float32, mean and reciprocal deviation of every row. The mean may be rounded.
        weight: (C).
        grad_s: (rows, C), gradient that s has from elsewhere, added.
        out_dtype: dtype of the gradient of s; None: that of `s`.

    Returns:
        The whole gradient of s, (rows, C), and the gradients of weight and bias, (C) float32.

    Raises:
        ValueError: `statistics` does not fit `s`.
    """
    s = s.contiguous()
    total = torch.empty_like(s, dtype=out_dtype or s.dtype)
    grad_weight, grad_bias = _launch_backward(
        grad_y.contiguous(),
        None if grad_s is None else grad_s.contiguous(),
        s,
        None,
        None,
        statistics.contiguous(),
        weight.contiguous(),
        total,
        None,
    )
    return total, grad_weight, grad_bias

"""Adds up what routes leave behind: outputs of steps at positions, gradients of projections, with a layer norm."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .route_plan import Bags
from .sizes import ceil_div, power_of_2
from .tiles import rounded

_UNROLLED = 16  # rows per target up to which the loop over them is unrolled


@triton.jit
def _merge_kernel(
    steps, rows, offsets, out, total, statistics, weight, bias, targets, step_rows, eps,
    count, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(targets, TARGETS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    t = ((tl.program_id(0) % groups) * TARGETS + tl.arange(0, TARGETS))[:, None]
    d = tl.arange(0, BLOCK)
    inside = (t < targets) & (d < DIM)[None, :]
    if offsets is None:
        start = t * count
        end = start + count
    else:
        start = tl.load(offsets + t, mask=t < targets, other=0)
        end = tl.load(offsets + t + 1, mask=t < targets, other=0)
    steps += image * step_rows * DIM
    y = tl.zeros([TARGETS, BLOCK], tl.float32)
    if COUNT > 0:
        for j in tl.static_range(COUNT):
            used = (t < targets) & (start + j < end)
            row = tl.load(rows + start + j, mask=used, other=0).to(tl.int64)
            y += tl.load(steps + row * DIM + d[None, :], mask=used & inside, other=0.0).to(tl.float32)
    else:
        for j in range(count):
            used = (t < targets) & (start + j < end)
            row = tl.load(rows + start + j, mask=used, other=0).to(tl.int64)
            y += tl.load(steps + row * DIM + d[None, :], mask=used & inside, other=0.0).to(tl.float32)
    place = (image * targets + t) * DIM + d[None, :]
    if weight is not None:
        if total is not None:
            stored = rounded(y, total.dtype.element_ty)
            tl.store(total + place, stored, mask=inside)
            y = stored.to(tl.float32)  # backward sees the same sum
        mean = tl.sum(y, 1)[:, None] / DIM
        centred = tl.where((d < DIM)[None, :], y - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / DIM + eps)
        if total is not None:
            tl.store(statistics + (image * targets + t) * 2, mean, mask=t < targets)
            tl.store(statistics + (image * targets + t) * 2 + 1, scale, mask=t < targets)
        gain = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
        y = centred * scale * gain[None, :]
        if bias is not None:
            y += tl.load(bias + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, rounded(y, out.dtype.element_ty), mask=inside)


def merge(
    steps: Tensor,
    bags: Bags,
    out: Tensor,
    *,
    total: Tensor | None = None,
    statistics: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Add up the rows of every target, and normalise the sum over channels if `weight` is given.

    Args:
        steps: (B, rows, D), contiguous.
        bags: which rows belong to which target.
        out: (B, targets, D), contiguous; receives the result.
        total: like `out`; receives the sum before the norm, if given.
        statistics: (B * targets, 2) float32; receives mean and reciprocal deviation, if `total` is given.
        weight, bias, eps: of the layer norm.
    """
    batch, targets, dim = out.shape
    if not out.numel():
        return
    block = power_of_2(dim)
    group = max(1, 2048 // block)  # elements of a program
    grid = (ceil_div(targets, group) * batch,)
    launch(
        _merge_kernel, grid,
        steps, bags.rows, bags.offsets, out, total, statistics, weight, bias, targets, steps.shape[1], eps,
        bags.uniform, COUNT=bags.uniform if bags.uniform <= _UNROLLED else 0, DIM=dim, BLOCK=block, TARGETS=group,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _merge_projections_kernel(
    parts, rows, offsets, low_rank, B, C, steps_of_rank, targets, step_rows, blocks, part_size, count,
    stride_r, stride_b, stride_c, images, padded,
    RANK: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    ahead: tl.constexpr = RANK if steps_of_rank is None else 0  # columns of low-rank step sizes in `parts`
    width: tl.constexpr = ahead + 2 * STATES
    groups = tl.cdiv(targets, TARGETS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    t = ((tl.program_id(0) % groups) * TARGETS + tl.arange(0, TARGETS))[:, None]
    c = tl.arange(0, BLOCK)
    if offsets is None:
        start = t * count
        end = start + count
    else:
        start = tl.load(offsets + t, mask=t < targets, other=0)
        end = tl.load(offsets + t + 1, mask=t < targets, other=0)
    parts += image * step_rows * width
    inside = (t < targets) & (c < width)[None, :]
    of_rank = (t < targets) & (c < RANK)[None, :]
    sums = tl.zeros([TARGETS, BLOCK], tl.float32)
    rank_sums = tl.zeros([TARGETS, BLOCK], tl.float32)
    for j in range(count):
        used = (t < targets) & (start + j < end)
        row = tl.load(rows + start + j, mask=used, other=0).to(tl.int64)
        source = parts + row * width + c[None, :]
        for _ in range(blocks):
            sums += tl.load(source, mask=used & inside, other=0.0)
            source += part_size
        if steps_of_rank is not None:
            step = ((row // padded) * images + image) * padded + row % padded
            source = steps_of_rank + step * RANK + c[None, :]
            rank_sums += tl.load(source, mask=used & of_rank, other=0.0).to(tl.float32)
    row = image * targets + t
    if RANK > 0:
        if steps_of_rank is None:
            rank_sums = sums
        tl.store(low_rank + row * stride_r + c[None, :], rounded(rank_sums, low_rank.dtype.element_ty), mask=of_rank)
    of_b = inside & (c >= ahead)[None, :] & (c < ahead + STATES)[None, :]
    tl.store(B + row * stride_b + (c - ahead)[None, :], rounded(sums, B.dtype.element_ty), mask=of_b)
    of_c = inside & (c >= ahead + STATES)[None, :]
    tl.store(C + row * stride_c + (c - ahead - STATES)[None, :], rounded(sums, C.dtype.element_ty), mask=of_c)


def merge_projections(
    parts: Tensor, bags: Bags, low_rank: Tensor | None, B: Tensor, C: Tensor, steps_of_rank: Tensor | None = None
) -> None:
    """Add up gradients of projections over blocks of channels and over the steps of every position.

    Args:
        parts: (blocks, images, rows, R + 2N) float32, contiguous; without the R columns if `steps_of_rank` is given.
        bags: which rows belong to which position and route.
        low_rank: (images, L, K, R), receives the first columns; None if there is none.
        B, C: (images, L, K, N), receive the others. All three have rows at a constant distance.
        steps_of_rank: (K*S, images, padded, R), contiguous: those of low-rank step sizes by step, summed up already.
    """
    blocks, images, rows, width = parts.shape
    targets = B.shape[1] * B.shape[2]
    if not B.numel():
        return
    rank, states = 0 if low_rank is None else low_rank.shape[3], B.shape[3]
    block = power_of_2(max(width, rank))
    group = max(1, 1024 // block)
    launch(
        _merge_projections_kernel, (ceil_div(targets, group) * images,),
        parts, bags.rows, bags.offsets, low_rank, B, C, steps_of_rank, targets, rows, blocks, parts.stride(0),
        bags.uniform, 0 if low_rank is None else low_rank.stride(2), B.stride(2), C.stride(2), images,
        1 if steps_of_rank is None else steps_of_rank.shape[2],
        RANK=rank, STATES=states, BLOCK=block, TARGETS=group, num_warps=4,
    )  # fmt: skip

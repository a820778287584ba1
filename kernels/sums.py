"""Adds up gradients of parameters, of which every program of a backward kernel leaves a part of its own."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div

_COLUMNS = 16  # numbers of a program: two sectors of 32 bytes per row
_ROWS = 128  # at once


@triton.jit
def _column_sums(
    source, target, block, inner, routes, segments, lines, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of (images, routes, segments, inner) over images and segments, columns of one block of (routes, inner)."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < routes * inner
    place = column + (column // inner) * ((segments - 1) * inner)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, lines, ROWS):
        line = first + tl.arange(0, ROWS)
        row = (line // segments).to(tl.int64) * (routes * segments * inner) + (line % segments) * inner
        mask = (line < lines)[:, None] & inside[None, :]
        sums += tl.load(source + row[:, None] + place[None, :], mask=mask, other=0.0)
    tl.store(target + column, tl.sum(sums, 0), mask=inside)


@triton.jit
def _sums_kernel(
    parts, wide_parts, first_sums, next_sum, last_sum, wide_sums, inner, wide_inner, routes, segments, lines,
    part_size, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(routes * inner, COLUMNS)
    pid = tl.program_id(0)
    number = pid // blocks
    block = pid % blocks
    source = parts + number.to(tl.int64) * part_size
    if number < FIRST:
        target = first_sums + number * routes * inner
        _column_sums(source, target, block, inner, routes, segments, lines, ROWS, COLUMNS)
    elif number == FIRST:
        _column_sums(source, next_sum, block, inner, routes, segments, lines, ROWS, COLUMNS)
    elif number == FIRST + 1:
        _column_sums(source, last_sum, block, inner, routes, segments, lines, ROWS, COLUMNS)
    else:
        if wide_parts is not None:
            block = pid - (FIRST + 2) * blocks
            _column_sums(wide_parts, wide_sums, block, wide_inner, routes, segments, lines, ROWS, COLUMNS)


def sum_parts(parts: Tensor, wide_parts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums over images and segments, each in a tensor of its own, in one launch.

    Args:
        parts: (F + 2, images, routes, segments, inner) float32, contiguous; F may be 0.
        wide_parts: (images, routes, segments, wide inner) float32, contiguous.

    Returns:
        The first F sums (F, routes, inner), the next and the last (routes, inner), and that of `wide_parts`
        (routes, wide inner).
    """
    count, images, routes, segments, inner = parts.shape
    first = parts.new_empty(count - 2, routes, inner)
    following, last = parts.new_empty(routes, inner), parts.new_empty(routes, inner)
    wide_inner = 1 if wide_parts is None else wide_parts.shape[-1]
    wide = None if wide_parts is None else parts.new_empty(routes, wide_inner)
    programs = count * ceil_div(routes * inner, _COLUMNS)
    if wide_parts is not None:
        programs += ceil_div(routes * wide_inner, _COLUMNS)
    if programs:
        launch(
            _sums_kernel, (programs,),
            parts, wide_parts, first, following, last, wide, inner, wide_inner, routes, segments,
            images * segments, parts.stride(0), FIRST=count - 2, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return first, following, last, wide

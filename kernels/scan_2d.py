"""Scan of a channel-last map along routes: forward and backward, with the routes merged at the end.

The work is the recurrence of Mamba (arXiv 2312.00752) along the routes of VMamba (arXiv 2401.10166), as
`vision_ssm.ops.scan_2d` defines it. One program walks one route of one image for a block of channels, a lane per
channel, a tile of steps at a time: it gathers whole rows of channels, forms the step sizes of the tile with one matrix
product from their low-rank form, and runs the recurrence in registers. Outputs are written step after step, and
`merge` adds up the routes. Backward walks the tiles from the end, starting each from the state that forward kept. A
few long routes are cut into stretches that are scanned at once: a first pass finds what every stretch adds to what
enters it, and `carry` what enters the next.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scan_2d_states
from .carry import hand_on
from .launch import launch
from .merge import merge, merge_projections
from .route_plan import plan
from .sizes import ceil_div, power_of_2
from .sums import sum_parts
from .tiles import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    entering_row,
    entries,
    entry,
    of_step,
    operand_of,
    precise_dot,
    prefetch,
    rounded,
    rows_of,
    softplus_log2,
    softplus_slope,
    sum_products,
    task_of,
)

_INT32_LIMIT = 2**31 - 1


@triton.jit
def _state_projections(
    delta, B, C, i, n, stride_pl, stride_bl, stride_cl, RANK: tl.constexpr, STATES: tl.constexpr, LAYOUT: tl.constexpr
):
    """B and C at position `i`: rows [STATE_BLOCK] of states `n`.

    LAYOUT "apart": three tensors; "packed": one tensor, whose rows are delta, B and C.
    """
    if LAYOUT == "apart":
        b = B + i * stride_bl
        c = C + i * stride_cl
    else:
        b = delta + i * stride_pl + RANK
        c = b + STATES
    some = n < STATES
    return tl.load(b + n, mask=some, other=0.0).to(tl.float32), tl.load(c + n, mask=some, other=0.0).to(tl.float32)


@triton.jit
def _step_projections(delta, B, C, i, stride_pl, stride_bl, stride_cl, RANK: tl.constexpr, LAYOUT: tl.constexpr):
    """B and C of one state at positions `i`, both [TILE]; see `_state_projections` for LAYOUT."""
    if LAYOUT == "apart":
        return tl.load(B + i * stride_bl), tl.load(C + i * stride_cl)
    else:
        b = delta + i * stride_pl + RANK
        return tl.load(b), tl.load(b + 1)


@triton.jit
def _tile_of_shifts(shift, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """What every step size begins with: [CHANNELS, TILE]."""
    return tl.broadcast_to((tl.zeros([CHANNELS], tl.float32) + shift)[:, None], [CHANNELS, TILE])


@triton.jit
def _ask_for_rows(x, i, last, stride, CHANNELS: tl.constexpr):
    """Bring the rows at positions `i`, [TILE], into the cache, one sector of 32 bytes per lane, without a register.

    `x` points at the first of the program's channels; `last` is the last of them that exists.
    """
    sector: tl.constexpr = 256 // x.dtype.element_ty.primitive_bitwidth
    prefetch(x + (i * stride)[:, None] + tl.minimum(tl.arange(0, CHANNELS // sector) * sector, last)[None, :])


@triton.jit
def _low_rank_rows(delta, i, stride, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """Low-rank step sizes at positions `i`: [TILE, RANK_BLOCK]."""
    r = tl.arange(0, RANK_BLOCK)
    return tl.load(delta + (i * stride)[:, None] + r[None, :], mask=(r < RANK)[None, :], other=0.0)


@triton.jit(do_not_specialize=["stride_n"])  # or states would be spread over lanes, for wider loads of A
def _scan_2d_forward_kernel(
    x, delta, A, B, C, D, weight, bias, positions, begin, y, states,
    stride_xb, stride_xl, stride_xk, stride_pb, stride_pl, stride_pk,
    stride_bb, stride_bl, stride_bk, stride_cb, stride_cl, stride_ck, stride_n, padded, span,
    ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr, STATES: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, LAYOUT: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    # Low-rank step sizes of one state are a tile ahead: their matrix product then stands behind the loop's other work,
    # where nobody waits for it, and as it stands before the loop too, its weight is brought into place there, once.
    # With several states the compiler would compute step sizes anew in every lane that holds some of them, and at a
    # high rank the weight would take too many registers.
    ahead: tl.constexpr = STATES == 1 and RANK > 0 and RANK <= 16
    block, k, image, line, stretch, start, stop = task_of(padded, span, ROUTES, SEGMENTS, DIM, CHANNELS)

    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < DIM
    mask = tl.zeros([CHANNELS], tl.int32) == 0 if DIM % CHANNELS == 0 else inside
    n = tl.arange(0, STATE_BLOCK)
    if STATES == 1:
        decay_rate = tl.load(A + k * DIM + d, mask=mask, other=0.0)  # [CHANNELS]
        h = entering_row(begin, (image * ROUTES * SEGMENTS + line) * tl.cdiv(padded, span) + stretch, d, mask, DIM)
    else:
        some = (n < STATES)[:, None] & inside[None, :]
        decay_rate = tl.load(A + (k * STATES * DIM + d)[None, :] + n[:, None] * stride_n, mask=some, other=0.0)
        h = tl.zeros([STATE_BLOCK, CHANNELS], tl.float32)
        if begin is not None:
            begin += ((image * ROUTES * SEGMENTS + line) * tl.cdiv(padded, span) + stretch) * STATES * DIM
            h = tl.load(begin + n[:, None] * stride_n + d[None, :], mask=some, other=0.0)
    skip = 0.0 if D is None else tl.load(D + k * DIM + d, mask=mask, other=0.0)
    shift = 0.0 if bias is None else tl.load(bias + k * DIM + d, mask=mask, other=0.0) * LOG2_E
    x += image * stride_xb + k * stride_xk + block * CHANNELS
    lane = tl.arange(0, CHANNELS)
    last = tl.minimum(CHANNELS, DIM - block * CHANNELS) - 1
    B += image * stride_bb + k * stride_bk
    C += image * stride_cb + k * stride_ck
    delta += image * stride_pb + k * stride_pk
    if RANK > 0:
        r = tl.arange(0, RANK_BLOCK)
        some_rank = inside[:, None] & (r < RANK)[None, :]
        expand = tl.load(weight + (k * DIM + d)[:, None] * RANK + r[None, :], mask=some_rank, other=0.0) * LOG2_E
        shifts = _tile_of_shifts(shift if ahead else 0.0, CHANNELS, TILE)
    positions += line * padded
    y += ((image * ROUTES * SEGMENTS + line) * padded + start) * DIM + d
    if KEEP > 0:
        states += (image * ROUTES * SEGMENTS + line) * tl.cdiv(padded, KEEP * TILE) * STATES * DIM + d
        states += (start // (KEEP * TILE)) * STATES * DIM

    i = entries(positions + start, WIDE, TILE)
    if ahead:
        v = precise_dot(expand, tl.trans(_low_rank_rows(delta, i, stride_pl, RANK, RANK_BLOCK)), shifts)
    for first in range(start, stop, TILE):
        if KEEP > 0:
            if first % (KEEP * TILE) == 0:
                if STATES == 1:
                    tl.store(states, h, mask=mask)
                else:
                    tl.store(states[None, :] + n[:, None] * DIM, h, mask=some)
                states += STATES * DIM
        here = i
        i = entries(positions + tl.minimum(first + TILE, stop - TILE), WIDE, TILE)
        _ask_for_rows(x, i, last, stride_xl, CHANNELS)
        if RANK > 0:
            low_rank = _low_rank_rows(delta, i if ahead else here, stride_pl, RANK, RANK_BLOCK)
            if not ahead:
                v = precise_dot(expand, tl.trans(low_rank), shifts)
            vs = rows_of(v, TILE, CHANNELS)
        else:
            _ask_for_rows(delta + block * CHANNELS, i, last, stride_pl, CHANNELS)
            vs = ()
        if STATES == 1:
            b, c = _step_projections(delta, B, C, here, stride_pl, stride_bl, stride_cl, RANK, LAYOUT)
            b = b.to(tl.float32) * LN_2
            c = c.to(tl.float32)
        xs = ()
        offsets = here * stride_xl
        step_offsets = here * stride_pl
        for j in tl.static_range(TILE):
            xs = xs + (tl.load(x + lane + of_step(offsets, j, CHANNELS), mask=mask, other=0.0),)
            if RANK == 0:
                step = tl.load(delta + d + of_step(step_offsets, j, CHANNELS), mask=mask, other=0.0)
                vs = vs + (step.to(tl.float32) * LOG2_E,)
        for j in tl.static_range(TILE):
            step = vs[j] if ahead else vs[j] + shift
            if SOFTPLUS:
                step = softplus_log2(step, EXACT)
            value = xs[j].to(tl.float32)
            if STATES == 1:
                h = tl.exp2(step * decay_rate) * h + (step * value) * of_step(b, j, CHANNELS)
                out = h * of_step(c, j, CHANNELS)
            else:
                at = entry(positions + first + j, WIDE)
                b, c = _state_projections(delta, B, C, at, n, stride_pl, stride_bl, stride_cl, RANK, STATES, LAYOUT)
                b = b * LN_2
                h = tl.exp2(step[None, :] * decay_rate) * h + (step * value)[None, :] * b[:, None]
                out = tl.sum(h * c[:, None], 0)
            out += skip * value
            tl.store(y + j * DIM, rounded(out, y.dtype.element_ty), mask=mask)
        y += TILE * DIM
        if ahead:
            v = precise_dot(expand, tl.trans(low_rank), shifts)


@triton.jit
def _scan_2d_backward_kernel(
    x, delta, A, B, C, D, weight, bias, positions, written, states, grad, end,
    grad_x, grad_delta, parts, sums, grad_weight, walked,
    stride_xb, stride_xl, stride_xk, stride_pb, stride_pl, stride_pk,
    stride_bb, stride_bl, stride_bk, stride_cb, stride_cl, stride_ck, stride_gb, stride_gl, stride_gk,
    stride_di, stride_dl, padded, span, steps, part_size, sum_size,
    ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, CONTRACTED: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Backward of one state per channel; all of a tile's states stay in registers.

    The gradient of step sizes is contracted to its CONTRACTED low-rank numbers here, or, where that is 0, left in
    `grad_delta` as it is; then `walked` receives the low-rank step sizes in the order of the steps.
    """
    width: tl.constexpr = CONTRACTED + 2
    block, k, image, line, stretch, start, stop = task_of(padded, span, ROUTES, SEGMENTS, DIM, CHANNELS)
    walk = image * ROUTES * SEGMENTS + line
    share = walk * tl.cdiv(padded, span) + stretch  # of what is summed up over programs

    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < DIM
    mask = tl.zeros([CHANNELS], tl.int32) == 0 if DIM % CHANNELS == 0 else inside
    place = k * DIM + d
    decay_rate = tl.load(A + place, mask=mask, other=0.0)
    log_rate = decay_rate * LN_2
    skip = 0.0 if D is None else tl.load(D + place, mask=mask, other=0.0)
    shift = 0.0 if bias is None else tl.load(bias + place, mask=mask, other=0.0) * LOG2_E
    # float16 would not hold every gradient, and the interpreter cuts bfloat16 off instead of rounding
    low = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 and not INTERPRETED else tl.float32
    column = tl.arange(0, COLUMNS)
    to_b = tl.where((column == CONTRACTED)[:, None] & (d >= 0)[None, :], 1.0, 0.0).to(low)  # [COLUMNS, CHANNELS]
    to_c = tl.where((column == CONTRACTED + 1)[:, None] & (d >= 0)[None, :], 1.0, 0.0).to(low)
    x += image * stride_xb + k * stride_xk + d
    B += image * stride_bb + k * stride_bk
    C += image * stride_cb + k * stride_ck
    delta += image * stride_pb + k * stride_pk
    grad += image * stride_gb + k * stride_gk + d
    if RANK > 0:
        r = tl.arange(0, RANK_BLOCK)
        some = inside[:, None] & (r < RANK)[None, :]
        expand = tl.load(weight + place[:, None] * RANK + r[None, :], mask=some, other=0.0) * LOG2_E
        shifts = _tile_of_shifts(shift, CHANNELS, TILE)
    if CONTRACTED > 0:  # gradients of step sizes are in units of log2 until the end
        some = inside[None, :] & (column < RANK)[:, None]
        contract = tl.load(weight + place[None, :] * RANK + column[:, None], mask=some, other=0.0)
        contract = (contract * LOG2_E).to(low)
        sum_weight = tl.zeros([CHANNELS, RANK_BLOCK], tl.float32)
    else:
        grad_delta += image * stride_di + line * stride_dl + stop.to(tl.int64) * DIM + d
    positions += line * padded + stop
    if written is not None:
        written += line * padded + stop
    grad_x += (walk * padded + stop) * DIM + d
    states += (walk * (padded // TILE) + stop // TILE) * DIM + d
    parts += block.to(tl.int64) * part_size + column[:, None]
    parts += (walk * padded + stop + tl.arange(0, TILE)[None, :]) * width

    back = entering_row(end, share, d, mask, DIM)  # gradient of the state, carried one step back
    sum_decay = tl.zeros([CHANNELS], tl.float32)
    sum_skip = tl.zeros([CHANNELS], tl.float32)
    sum_shift = tl.zeros([CHANNELS], tl.float32)
    for behind in range(0, stop - start, TILE):
        first = stop - behind - TILE
        positions -= TILE
        if written is not None:
            written -= TILE
        states -= DIM
        grad_x -= TILE * DIM
        parts -= TILE * width
        i = entries(positions, WIDE, TILE)
        if CONTRACTED == 0:
            grad_delta -= TILE * DIM
        if RANK > 0:
            low_rank = _low_rank_rows(delta, i, stride_pl, RANK, RANK_BLOCK)
            vs = rows_of(precise_dot(expand, tl.trans(low_rank), shifts), TILE, CHANNELS)
            if CONTRACTED == 0:
                if block == 0:
                    row = (line * stride_dl + image * stride_di) // DIM + first + tl.arange(0, TILE)
                    tl.store(walked + row[:, None] * RANK + r[None, :], low_rank, mask=(r < RANK)[None, :])
        else:
            vs = ()
        bs, cs = _step_projections(delta, B, C, i, stride_pl, stride_bl, stride_cl, RANK, LAYOUT)
        bs = bs.to(tl.float32) * LN_2
        cs = cs.to(tl.float32)
        xs = ()
        dys = ()
        for j in tl.static_range(TILE):
            at = entry(positions + j, WIDE)
            xs = xs + (tl.load(x + at * stride_xl, mask=mask, other=0.0),)
            if RANK == 0:
                v = tl.load(delta + d + at * stride_pl, mask=mask, other=0.0)
                vs = vs + (v.to(tl.float32) * LOG2_E + shift,)
            if written is not None:
                at = entry(written + j, WIDE)
            dys = dys + (tl.load(grad + at * stride_gl, mask=mask, other=0.0),)
        h = tl.load(states, mask=mask, other=0.0)
        hs = (h,)  # before the first step, and after every step
        sizes = ()
        decays = ()
        for j in tl.static_range(TILE):
            step = vs[j]
            if SOFTPLUS:
                step = softplus_log2(step, EXACT)
            if TAIL:
                step = tl.where(first + j < steps, step, 0.0)  # steps behind the end leave the state as it is
            decay = tl.exp2(step * decay_rate)
            h = decay * h + (step * xs[j].to(tl.float32)) * of_step(bs, j, CHANNELS)
            hs = hs + (h,)
            sizes = sizes + (step,)
            decays = decays + (decay,)
        slopes = ()
        of_b = ()
        of_c = ()
        for j in tl.static_range(TILE - 1, -1, -1):
            value = xs[j].to(tl.float32)
            dy = dys[j].to(tl.float32)
            if TAIL:
                dy = tl.where(first + j < steps, dy, 0.0)  # nor have they an output
            g = dy * of_step(cs, j, CHANNELS) + back
            back = decays[j] * g
            exponent = back * hs[j]  # gradient of step size times decay rate
            along = g * of_step(bs, j, CHANNELS)
            slope = log_rate * exponent + along * value  # gradient of the step size
            if SOFTPLUS:
                slope *= softplus_slope(vs[j], sizes[j])
            if TAIL:
                slope = tl.where(first + j < steps, slope, 0.0)
            dx = along * sizes[j] + skip * dy
            tl.store(grad_x + j * DIM, rounded(dx, grad_x.dtype.element_ty), mask=mask)
            if CONTRACTED == 0:
                tl.store(grad_delta + j * DIM, rounded(slope * LOG2_E, grad_delta.dtype.element_ty), mask=mask)
            sum_decay += exponent * sizes[j]
            sum_skip += dy * value
            sum_shift += slope
            slopes = (slope,) + slopes
            of_b = (g * value * sizes[j],) + of_b
            of_c = (dy * hs[j + 1],) + of_c
        columns = tl.zeros([COLUMNS, TILE], tl.float32)
        columns = sum_products(to_b, operand_of(of_b, low, TILE, CHANNELS), columns, EXACT) * LN_2
        columns = sum_products(to_c, operand_of(of_c, low, TILE, CHANNELS), columns, EXACT)
        if CONTRACTED > 0:
            slope = operand_of(slopes, low, TILE, CHANNELS)
            columns = sum_products(contract, slope, columns, EXACT)
            sum_weight = sum_products(slope, low_rank.to(low), sum_weight, EXACT)
        tl.store(parts, columns, mask=(column < width)[:, None] & (tl.arange(0, TILE) >= 0)[None, :])
    sums += share * DIM + d
    tl.store(sums, sum_decay * LN_2, mask=mask)
    sums += sum_size
    tl.store(sums, sum_skip, mask=mask)
    sums += sum_size
    tl.store(sums, sum_shift * LOG2_E, mask=mask)
    if CONTRACTED > 0:
        some = inside[:, None] & (r < RANK)[None, :]
        tl.store(grad_weight + (share * DIM + d)[:, None] * RANK + r[None, :], sum_weight * LOG2_E, mask=some)


@triton.jit(do_not_specialize=["stride_n"])
def _scan_2d_summary_kernel(
    x, delta, A, matrix, weight, bias, positions, written, carry, totals,
    stride_xb, stride_xl, stride_xk, stride_pb, stride_pl, stride_pk, stride_mb, stride_ml, stride_mk, stride_n,
    padded, span, steps,
    ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """What a stretch does to what enters it: adds `carry` to it, after a decay for the sum of step sizes in `totals`.

    What is carried are states, driven by x and B, or if TURNED gradients of states, from the end of the stretch to its
    start, where `x` is the gradient of the output, at positions `written`, and `matrix` is C.
    """
    block, k, image, line, stretch, start, stop = task_of(padded, span, ROUTES, SEGMENTS, DIM, CHANNELS)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = d < DIM
    n = tl.arange(0, STATE_BLOCK)
    some = (n < STATES)[:, None] & inside[None, :]
    decay_rate = tl.load(A + (k * STATES * DIM + d)[None, :] + n[:, None] * stride_n, mask=some, other=0.0)
    h = tl.zeros([STATE_BLOCK, CHANNELS], tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    shift = 0.0 if bias is None else tl.load(bias + k * DIM + d, mask=inside, other=0.0) * LOG2_E
    x += image * stride_xb + k * stride_xk + d
    matrix += image * stride_mb + k * stride_mk
    delta += image * stride_pb + k * stride_pk
    r = tl.arange(0, RANK_BLOCK)
    if RANK > 0:
        some_rank = inside[:, None] & (r < RANK)[None, :]
        expand = tl.load(weight + (k * DIM + d)[:, None] * RANK + r[None, :], mask=some_rank, other=0.0) * LOG2_E
    else:
        delta += d
    positions += line * padded
    if written is not None:
        written += line * padded

    for behind in range(0, stop - start, TILE):
        first = stop - behind - TILE if TURNED else start + behind
        vs = ()
        values = ()
        rows = ()
        if RANK > 0:
            low_rank = _low_rank_rows(delta, entries(positions + first, WIDE, TILE), stride_pl, RANK, RANK_BLOCK)
            v = precise_dot(expand, tl.trans(low_rank), tl.zeros([CHANNELS, TILE], tl.float32))
            vs = rows_of(v, TILE, CHANNELS)
        for j in tl.static_range(TILE):
            i = entry(positions + first + j, WIDE)
            rows = rows + (i,)
            if RANK == 0:
                vs = vs + (tl.load(delta + i * stride_pl, mask=inside, other=0.0).to(tl.float32) * LOG2_E,)
            if written is not None:
                i = entry(written + first + j, WIDE)
            values = values + (tl.load(x + i * stride_xl, mask=inside, other=0.0),)
        for j in tl.static_range(TILE - 1 if TURNED else 0, -1 if TURNED else TILE, -1 if TURNED else 1):
            step = vs[j] + shift
            if SOFTPLUS:
                step = softplus_log2(step, EXACT)
            value = values[j].to(tl.float32)
            if TURNED:  # a turned sequence begins with the steps behind its end, which do nothing
                step = tl.where(first + j < steps, step, 0.0)
                value = tl.where(first + j < steps, value, 0.0)
            else:
                value *= step * LN_2
            total += step
            drive = tl.load(matrix + rows[j] * stride_ml + n, mask=n < STATES, other=0.0).to(tl.float32)
            drive = drive[:, None] * value[None, :]
            decay = tl.exp2(step[None, :] * decay_rate)
            h = decay * (h + drive) if TURNED else decay * h + drive
    share = (image * ROUTES * SEGMENTS + line) * tl.cdiv(padded, span) + stretch
    tl.store(carry + share * STATES * DIM + n[:, None] * stride_n + d[None, :], h, mask=some)
    tl.store(totals + share * DIM + d, total, mask=inside)


class _Work(NamedTuple):
    """Sizes of a call, and how it is cut."""

    images: int
    length: int
    routes: int
    segments: int
    steps: int
    dim: int
    states: int
    rank: int
    keep: int

    @property
    def padded(self) -> int:
        return ceil_div(self.steps, TILE) * TILE

    @property
    def rows(self) -> int:
        return self.routes * self.segments * self.padded

    def programs(self, channels: int) -> int:
        """Blocks of channels of all sequences."""
        return self.images * self.routes * self.segments * ceil_div(self.dim, channels)

    def span(self, channels: int) -> int:
        """Steps of a stretch. A few long sequences are cut into stretches, and what enters each is found first."""
        programs, unit = self.programs(channels), self.keep * TILE
        if not 0 < programs < _FEW_PROGRAMS:
            return self.padded
        stretches = max(1, min(_MANY_PROGRAMS // programs, self.padded // _SHORTEST_STRETCH))
        return ceil_div(ceil_div(self.padded, unit), stretches) * unit


TILE = 16  # steps
_FEW_PROGRAMS = 768
_MANY_PROGRAMS = 3072  # 23 warps per multiprocessor of an H200
_SHORTEST_STRETCH = 64  # steps
_BACKWARD_CHANNELS = 32
_REGISTERS = 168  # 12 warps per multiprocessor
_PIECES = 16  # of the sum for the gradient of a route's step size weight


def _tiles_per_state(states: int) -> int:
    """Tiles between the states that forward keeps: all of them are small beside the map."""
    return 1 if states == 1 else 4


def _work(x: Tensor, delta: Tensor, A: Tensor, read: Tensor, dt_weight: Tensor | None, segment: int | None) -> _Work:
    routes, total = read.shape
    steps = segment or total
    states = A.shape[2]
    rank = 0 if dt_weight is None else delta.shape[3]
    sizes = (*x.shape[:2], routes, total // steps, steps, x.shape[-1], states, rank)
    return _Work(*sizes, keep=_tiles_per_state(states))


def _step_dtype(x: Tensor) -> torch.dtype:
    """Of what is kept per step and route. float16 could overflow where the sum of all routes is normalised."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _route_strides(x: Tensor) -> tuple[int, int, int]:
    """Of images, positions and routes; a map (B, L, D) is shared by all routes."""
    return (*x.stride()[:2], x.stride(2) if x.dim() == 4 else 0)


class _Call:
    """Inputs of a call as the kernels take them."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        read: Tensor,
        write: Tensor | None,
        dt_weight: Tensor | None,
        dt_bias: Tensor | None,
        delta_softplus: bool,
        segment: int | None,
    ):
        self.work = work = _work(x, delta, A, read, dt_weight, segment)
        self.x, self.delta, self.B, self.C = (_rows_contiguous(value) for value in (x, delta, B, C))
        self.A, self.D, self.weight, self.bias = (
            None if value is None else value.float().contiguous() for value in (A, D, dt_weight, dt_bias)
        )
        self.softplus = delta_softplus
        self.read = plan(read, work.segments, TILE, work.length)
        self.write = self.read if write is None else plan(write, work.segments, TILE, work.length)
        self.layout = self._layout()
        # offsets of positions and of steps; those of images and routes are always 64 bits wide
        largest = max(value.stride(1) * work.length for value in (self.x, self.delta, self.B, self.C))
        self.wide = max(largest, work.padded * work.dim * work.states) > _INT32_LIMIT

    def _layout(self) -> str:
        """How B and C lie beside delta, see `_state_projections`."""
        delta, B, C, states = self.delta, self.B, self.C, self.work.states
        size = delta.element_size()
        packed = (
            self.work.rank > 0
            and delta.dtype == B.dtype == C.dtype
            and delta.stride()[:3] == B.stride()[:3] == C.stride()[:3]
            and B.data_ptr() == delta.data_ptr() + size * self.work.rank
            and C.data_ptr() == B.data_ptr() + size * states
        )
        return "packed" if packed else "apart"

    def strides(self) -> tuple[int, ...]:
        return (
            *_route_strides(self.x), *self.delta.stride()[:3], *self.B.stride()[:3], *self.C.stride()[:3],
        )  # fmt: skip

    def entering(self, channels: int, rates: Tensor, grad: Tensor | None = None) -> Tensor | None:
        """What enters every stretch, (sequences, stretches, N, D): states, or gradients of states; None: nothing does.

        Args:
            channels: of a program of the scan.
            rates: decay rates, (K, N, D).
            grad: gradient of the output, for gradients of states.
        """
        work, turned = self.work, grad is not None
        span = work.span(channels)
        stretches = ceil_div(work.padded, span)
        if stretches == 1:
            return None
        source, matrix = (self.x, self.B) if grad is None else (grad, self.C)
        written = self.write.positions if turned and self.write is not self.read else None
        sequences = work.images * work.routes * work.segments
        carry = rates.new_empty(sequences, stretches, work.states, work.dim)
        totals = rates.new_empty(sequences, stretches, work.dim)
        launch(
            _scan_2d_summary_kernel, (work.programs(channels) * stretches,),
            source, self.delta, rates, matrix, self.weight, self.bias, self.read.positions, written, carry, totals,
            *_route_strides(source), *self.delta.stride()[:3], *matrix.stride()[:3], work.dim,
            work.padded, span, work.steps,
            STATES=work.states, STATE_BLOCK=power_of_2(work.states), TURNED=turned, **self.constants(channels),
        )  # fmt: skip
        return hand_on(
            carry, totals, rates, channels_last=True, routes=work.routes, segments=work.segments, turned=turned
        )

    def constants(self, channels: int) -> dict:
        work = self.work
        return dict(
            ROUTES=work.routes,
            SEGMENTS=work.segments,
            DIM=work.dim,
            RANK=work.rank,
            RANK_BLOCK=max(16, power_of_2(work.rank) if work.rank else 0),
            CHANNELS=channels,
            TILE=TILE,
            SOFTPLUS=self.softplus,
            EXACT=self.x.dtype == torch.float32,
            WIDE=self.wide,
            num_warps=1,
        )


def _forward_channels(work: _Work) -> int:
    return 64 if work.states == 1 and work.dim % 64 == 0 else 32


def _scan(call: _Call, states: Tensor | None) -> Tensor:
    """Outputs of every step, (B, rows, D); fills `states`."""
    work = call.work
    y = call.x.new_empty(work.images, work.rows, work.dim, dtype=_step_dtype(call.x))
    channels = _forward_channels(work)
    if work.programs(channels):
        span, rates = work.span(channels), call.A.transpose(1, 2).contiguous()
        launch(
            _scan_2d_forward_kernel, (work.programs(channels) * ceil_div(work.padded, span),),
            call.x, call.delta, rates, call.B, call.C, call.D, call.weight, call.bias,
            call.read.positions, call.entering(channels, rates), y, states,
            *call.strides(), work.dim, work.padded, span,
            STATES=work.states, STATE_BLOCK=power_of_2(work.states),
            KEEP=0 if states is None else work.keep, LAYOUT=call.layout,
            maxnreg=_REGISTERS if work.states == 1 and 0 < work.rank <= 16 else None, **call.constants(channels),
        )  # fmt: skip
    return y


def _empty_states(x: Tensor, work: _Work) -> Tensor:
    kept = ceil_div(work.padded, work.keep * TILE)
    return x.new_empty(work.images, work.routes * work.segments, kept, work.states, work.dim, dtype=torch.float32)


def empty_saved(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read: Tensor, write: Tensor | None,
    dt_weight: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    norm_eps: float, delta_softplus: bool, segment: int | None, merged: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum before the norm, its mean and reciprocal deviation, and the states between tiles of steps."""
    states = _empty_states(x, _work(x, delta, A, read, dt_weight, segment))
    if norm_weight is None:
        return x.new_empty(0), x.new_empty(0), states
    shape = _output_shape(x, read, merged)
    total = x.new_empty(shape, dtype=_step_dtype(x))
    return total, x.new_empty(*shape[:-1], 2, dtype=torch.float32), states


def _output_shape(x: Tensor, read: Tensor, merged: bool) -> tuple[int, ...]:
    if merged:
        return (*x.shape[:2], x.shape[-1])
    return (*x.shape[:2], read.shape[0], x.shape[-1])


def _targets(result: Tensor) -> Tensor:
    """(B, L, D) or (B, L, K, D) as (B, targets, D)."""
    return result.view(result.shape[0], result.shape[1:-1].numel(), result.shape[-1])


def forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read: Tensor, write: Tensor | None,
    dt_weight: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    norm_eps: float, delta_softplus: bool, segment: int | None, merged: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `vision_ssm.ops.scan_2d`. Returns the output and, if `save`, what `empty_saved` allocates."""
    call = _Call(x, delta, A, B, C, D, read, write, dt_weight, dt_bias, delta_softplus, segment)
    saved: tuple[Tensor, ...] = ()
    if save:
        saved = empty_saved(
            x, delta, A, B, C, D, read, write, dt_weight, dt_bias, norm_weight, norm_bias, norm_eps, delta_softplus,
            segment, merged, save,
        )  # fmt: skip
    steps = _scan(call, saved[2] if save else None)
    normed = norm_weight is not None
    out = x.new_empty(_output_shape(x, read, merged), dtype=x.dtype if normed else torch.float32)
    merge(
        steps,
        call.write.merged if merged else call.write.by_route,
        _targets(out),
        total=saved[0] if save and normed else None,
        statistics=saved[1] if save and normed else None,
        weight=None if norm_weight is None else norm_weight.contiguous(),
        bias=None if norm_bias is None else norm_bias.contiguous(),
        eps=norm_eps,
    )
    return (out, *saved)


def backward(
    grad: Tensor, total: Tensor, statistics: Tensor, states: Tensor,
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read: Tensor, write: Tensor | None,
    dt_weight: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    norm_eps: float, delta_softplus: bool, segment: int | None, merged: bool, save: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of all floating-point inputs that are given, by name."""
    call = _Call(x, delta, A, B, C, D, read, write, dt_weight, dt_bias, delta_softplus, segment)
    if not save:  # forward kept nothing
        inputs = (x, delta, A, B, C, D, read, write, dt_weight, dt_bias, norm_weight, norm_bias, norm_eps)
        _, total, statistics, states = forward(*inputs, delta_softplus, segment, merged, True)
    grads: dict[str, Tensor] = {}
    if norm_weight is not None:
        from .layer_norm import normalise_backward

        rows = grad.reshape(-1, grad.shape[-1])
        flat, grads["norm_weight"], grads["norm_bias"] = normalise_backward(
            rows, total.view_as(rows), statistics.view(-1, 2), norm_weight, out_dtype=_step_dtype(x)
        )
        grad = flat.view_as(grad)
    return grads | _scan_backward(call, _rows_contiguous(grad), states)


def _scan_backward(call: _Call, grad: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Gradients of the inputs of a call.

    Args:
        call: the inputs.
        grad: (B, L, D) or (B, L, K, D), of the output before a norm, contiguous in channels.
        states: what forward kept.
    """
    work, x = call.work, call.x
    call.wide |= grad.stride(1) * work.length > _INT32_LIMIT
    parts = _StepGradients(call)
    if work.programs(_BACKWARD_CHANNELS):
        _launch_backward(call, grad, states, parts)
    by_route = call.read.by_route
    grads, low_rank = _empty_projections(call)
    of_rank = None
    if parts.walked is not None:
        of_rank, grads["dt_weight"] = _contract(call, parts.delta, parts.walked)
    merge_projections(parts.projections, by_route, low_rank, grads["B"], grads["C"], of_rank)
    grads["x"] = x.new_empty(x.shape)
    merge(parts.x, call.read.merged if x.dim() == 3 else by_route, _targets(grads["x"]))
    if low_rank is None:
        grads["delta"] = call.delta.new_empty(call.delta.shape)
        merge(parts.delta.view(parts.x.shape), by_route, _targets(grads["delta"]))
    else:
        grads["delta"] = low_rank
    of_decay, of_skip, of_shift, of_weight = sum_parts(parts.sums, parts.weight)
    grads["A"] = of_decay.permute(1, 2, 0)  # (N, K, D) -> (K, D, N)
    if call.D is not None:
        grads["D"] = of_skip
    if call.bias is not None:
        grads["dt_bias"] = of_shift
    if of_weight is not None:
        grads["dt_weight"] = of_weight.view(work.routes, work.dim, work.rank)
    return grads


class _StepGradients:
    """What the backward kernels leave, empty: by step, or by sequence and stretch.

    Attributes:
        span: steps of a stretch.
        contracted: rank of the gradient of low-rank step sizes in `projections`; 0: it is in `delta`, at full width.
        x: (B, rows, D).
        delta: by step, of full step sizes, or None.
        delta_strides: of images and of lines of `delta`, in numbers.
        walked: (K*S, B, padded, R), receives the low-rank step sizes in the order of `delta`, or None.
        projections: (blocks of channels, B, rows, contracted + 2N) float32.
        sums: (N + 2, B, K, S*stretches, D) float32, of A, D and bias.
        weight: (B, K, S*stretches, D*R) float32, or None.
    """

    def __init__(self, call: _Call):
        work, x, dtype = call.work, call.x, _step_dtype(call.x)
        lines, blocks = work.routes * work.segments, ceil_div(work.dim, _BACKWARD_CHANNELS)
        outside = _contracts_outside(work, dtype)
        self.span = work.span(_BACKWARD_CHANNELS)
        self.contracted = 0 if outside else work.rank
        self.x = x.new_empty(work.images, work.rows, work.dim, dtype=dtype)
        self.delta = self.walked = self.weight = None
        self.delta_strides = (work.rows * work.dim, work.padded * work.dim)
        if outside:  # the matrix products, one for each route, want its steps together
            self.delta_strides = (work.padded * work.dim, work.images * work.padded * work.dim)
            self.delta = x.new_empty(lines, work.images, work.padded, work.dim, dtype=dtype)
            self.walked = call.delta.new_empty(lines, work.images, work.padded, work.rank)
        elif not work.rank:
            self.delta = torch.empty_like(self.x)
        width = self.contracted + 2 * work.states
        self.projections = x.new_empty(blocks, work.images, work.rows, width, dtype=torch.float32)
        shares = (work.images, work.routes, work.segments * ceil_div(work.padded, self.span))
        self.sums = x.new_empty(work.states + 2, *shares, work.dim, dtype=torch.float32)
        if self.contracted:
            self.weight = x.new_empty(*shares, work.dim * work.rank, dtype=torch.float32)


def _launch_backward(call: _Call, grad: Tensor, states: Tensor, parts: _StepGradients) -> None:
    work = call.work
    end = call.entering(_BACKWARD_CHANNELS, call.A.transpose(1, 2).contiguous(), grad)
    inputs = (call.x, call.delta, call.A, call.B, call.C, call.D, call.weight, call.bias, call.read.positions)
    outputs = (parts.x, parts.delta, parts.projections, parts.sums, parts.weight)
    strides = (*call.strides(), *_route_strides(grad))
    if work.states > 1:
        scan_2d_states.launch_backward(
            *inputs, call.write.kept, states, grad, end, *outputs, strides, work.steps, TILE, work.keep, parts.span,
            softplus=call.softplus, wide=call.wide,
        )  # fmt: skip
        return
    launch(
        _scan_2d_backward_kernel, (work.programs(_BACKWARD_CHANNELS) * ceil_div(work.padded, parts.span),),
        *inputs, None if call.write is call.read else call.write.positions, states, grad, end, *outputs,
        parts.walked, *strides, *parts.delta_strides, work.padded, parts.span, work.steps,
        parts.projections.stride(0), parts.sums.stride(0),
        CONTRACTED=parts.contracted, COLUMNS=max(16, power_of_2(parts.contracted + 2)),
        TAIL=work.padded != work.steps, LAYOUT=call.layout,
        maxnreg=_REGISTERS if parts.contracted <= 16 else None, **call.constants(_BACKWARD_CHANNELS),
    )  # fmt: skip


def _empty_projections(call: _Call) -> tuple[dict[str, Tensor], Tensor | None]:
    """For the gradients of B and C, and of low-rank delta: parts of one tensor where the inputs are."""
    delta, B, C, rank, states = call.delta, call.B, call.C, call.work.rank, call.work.states
    if call.layout == "apart":
        low_rank = delta.new_empty(delta.shape) if rank else None
        return {"B": B.new_empty(B.shape), "C": C.new_empty(C.shape)}, low_rank
    packed = delta.new_empty(*delta.shape[:3], rank + 2 * states)
    low_rank, of_b, of_c = packed.split([rank, states, states], dim=-1)
    return {"B": of_b, "C": of_c}, low_rank


def _contracts_outside(work: _Work, dtype: torch.dtype) -> bool:
    """Whether gradients of step sizes are better written out, for matrix products over all images.

    Within the scan, the low-rank weight and the sum for its gradient would take most registers.
    """
    return work.states == 1 and work.rank > 16 and dtype == torch.bfloat16


def _contract(call: _Call, grad_delta: Tensor, walked: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of low-rank step sizes, of every step, (K*S, B, padded, R), and of their weight, (K, D, R).

    Args:
        call: the inputs.
        grad_delta: (K*S, B, padded, D), of the full step sizes; 0 behind the end of a sequence.
        walked: (K*S, B, padded, R), the low-rank step sizes.
    """
    work = call.work
    slopes = grad_delta.view(work.routes, -1, work.dim)  # (K, S*B*padded, D)
    of_rank = torch.bmm(slopes, call.weight.to(slopes.dtype)).view(walked.shape)
    # several sums per route, so that the matrix products have enough to do
    pieces = math.gcd(work.images * work.segments, _PIECES)
    slopes, walked = (value.view(work.routes * pieces, -1, value.shape[-1]) for value in (grad_delta, walked))
    of_weight = torch.bmm(slopes.transpose(1, 2), walked.to(slopes.dtype))  # (K*pieces, D, R)
    return of_rank, of_weight.view(work.routes, pieces, work.dim, work.rank).float().sum(1)

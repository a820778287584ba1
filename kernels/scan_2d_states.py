"""Backward of the scan of a map along routes, several states per channel.

One program is one warp: one route of one image, or a stretch of it, for 32 channels, a lane per channel, with the
states of a channel in the registers of its lane. It takes chunks of steps from the end. Each starts from the state that
forward kept; a sweep forwards leaves the state of every few steps in a scratch buffer, and a sweep backwards recomputes
those few steps in registers and carries the gradient through them. Sums over channels, the gradients of B and C, are
matrix products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div, power_of_2
from .tiles import (
    INTERPRETED,
    LN_2,
    LOG2_E,
    dot,
    entries,
    entry,
    precise_dot,
    rounded,
    rows_of,
    softplus_log2,
    softplus_slope,
    softplus_slope_from,
    sum_products,
    task_of,
)

_CHANNELS = 32
_REGISTERS = 168  # 12 warps per multiprocessor


@triton.jit
def _interleaved(a, b, low: tl.constexpr):
    """[R, C] and [R, C] of float32 -> [R, 2 C] of type `low`, columns of `a` and `b` in turns.

    The compiler cannot see through the inline code: it would compute `a` and `b` once more in the layout that a matrix
    product wants, from the start, instead of moving them there.
    """
    pairs = tl.join(a, b)
    if low == tl.bfloat16:
        pairs = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [pairs], tl.bfloat16, is_pure=False, pack=2
        )
    elif not INTERPRETED:
        pairs = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [pairs], tl.float32, is_pure=False, pack=1)
    return tl.reshape(pairs, [a.shape[0], 2 * a.shape[1]])


# Strides of states are not specialised: rows whose alignment is unknown are loaded lane by lane, where the compiler
# would otherwise spread the states over lanes to load several channels at once.
@triton.jit(do_not_specialize=["stride_n", "sum_size", "scratch_size"])
def _scan_2d_states_backward_kernel(
    x, delta, A, B, C, D, weight, bias, positions, written, states, grad, end,
    grad_x, grad_delta, parts, sums, grad_weight, scratch,
    stride_xb, stride_xl, stride_xk, stride_pb, stride_pl, stride_pk,
    stride_bb, stride_bl, stride_bk, stride_cb, stride_cl, stride_ck, stride_gb, stride_gl, stride_gk,
    stride_n, padded, span, part_size, sum_size, scratch_size,
    ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr, STATES: tl.constexpr, STATE_BLOCK: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, SUB: tl.constexpr, KEEP: tl.constexpr, COLUMNS: tl.constexpr,
    TAIL: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = RANK + 2 * STATES
    chunk: tl.constexpr = KEEP * TILE
    # what the scratch buffer has of every step: the step size, or its argument where its slope wants that
    whole: tl.constexpr = SOFTPLUS and not EXACT
    block, k, image, line, stretch, begin, stop = task_of(padded, span, ROUTES, SEGMENTS, DIM, CHANNELS)
    walk = image * ROUTES * SEGMENTS + line
    share = walk * tl.cdiv(padded, span) + stretch  # of what is summed up over programs
    pid = tl.program_id(0)

    lane = tl.arange(0, CHANNELS)
    d = block * CHANNELS + lane
    inside = d < DIM
    mask = tl.zeros([CHANNELS], tl.int32) == 0 if DIM % CHANNELS == 0 else inside
    n = tl.arange(0, STATE_BLOCK)
    kept = (n < STATES)[:, None] & mask[None, :]
    place = k * DIM + d
    decay_rate = tl.load(A + (k * STATES * DIM + d)[None, :] + n[:, None] * stride_n, mask=kept, other=0.0)
    skip = 0.0 if D is None else tl.load(D + place, mask=mask, other=0.0)
    # float16 would not hold every gradient, and the interpreter cuts bfloat16 off instead of rounding
    low = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 and not INTERPRETED else tl.float32
    column = tl.arange(0, COLUMNS)
    turns = tl.arange(0, 2 * CHANNELS) % 2
    x += image * stride_xb + k * stride_xk + d
    B += image * stride_bb + k * stride_bk
    C += image * stride_cb + k * stride_ck
    delta += image * stride_pb + k * stride_pk
    grad += image * stride_gb + k * stride_gk + d
    positions += line * padded
    written += line * padded
    grad_x += walk * padded * DIM + d
    parts += block.to(tl.int64) * part_size + walk * padded * width
    # gradients of B and C of SUB steps: columns of a tile [STATE_BLOCK, COLUMNS], B and C of a step side by side
    part = parts + (column // 2 * width + column % 2 * STATES)[None, :] + (RANK + n)[:, None]
    part_mask = (n < STATES)[:, None] & (column < 2 * SUB)[None, :]
    states += walk * tl.cdiv(padded, chunk) * STATES * DIM + d[None, :] + n[:, None] * stride_n
    t = tl.arange(0, TILE)
    r = tl.arange(0, RANK_BLOCK)
    some = inside[:, None] & (r < RANK)[None, :]
    if RANK > 0:
        weight += place[:, None] * RANK + r[None, :]
        grad_weight += (share * DIM + d)[:, None] * RANK + r[None, :]
    else:
        delta += d
        grad_delta += walk * padded * DIM + d
    size: tl.constexpr = chunk * (CHANNELS + 2 * STATE_BLOCK) + chunk // SUB * STATE_BLOCK * CHANNELS
    steps_of = scratch + pid.to(tl.int64) * size  # [chunk, CHANNELS]
    projections_of = steps_of + chunk * CHANNELS  # [chunk, 2, STATE_BLOCK], B and C
    states_of = scratch + pid.to(tl.int64) * scratch_size + chunk * (CHANNELS + 2 * STATE_BLOCK)
    states_of += n[:, None] * CHANNELS + lane[None, :]  # [chunk / SUB, STATE_BLOCK, CHANNELS]

    back = tl.zeros([STATE_BLOCK, CHANNELS], tl.float32)  # gradient of the state, carried one step back
    if end is not None:
        back += tl.load(end + share * STATES * DIM + d[None, :] + n[:, None] * stride_n, mask=kept, other=0.0)
    sum_decay = tl.zeros([STATE_BLOCK, CHANNELS], tl.float32)
    sum_skip = tl.zeros([CHANNELS], tl.float32)
    sum_shift = tl.zeros([CHANNELS], tl.float32)
    last = tl.cdiv(stop, chunk) - 1
    for turn in tl.range(0, last + 1 - begin // chunk, num_stages=1):
        number = last - turn
        start = number * chunk
        count = tl.minimum(chunk, padded - start)

        shift = 0.0 if bias is None else tl.load(bias + place, mask=mask, other=0.0) * LOG2_E
        for first in tl.range(0, count, TILE, num_stages=1):
            at = positions + start + first
            kept_steps = steps_of + first * CHANNELS + lane
            i = entries(at, WIDE, TILE)
            row = projections_of + (first + t)[:, None] * (2 * STATE_BLOCK) + n[None, :]
            b = tl.load(B + (i * stride_bl)[:, None] + n[None, :], mask=(n < STATES)[None, :], other=0.0)
            c = tl.load(C + (i * stride_cl)[:, None] + n[None, :], mask=(n < STATES)[None, :], other=0.0)
            tl.store(row, b.to(tl.float32))
            tl.store(row + STATE_BLOCK, c.to(tl.float32))
            if RANK > 0:
                low_rank = tl.load(delta + (i * stride_pl)[:, None] + r[None, :], mask=(r < RANK)[None, :], other=0.0)
                expand = tl.load(weight, mask=some, other=0.0) * LOG2_E
                v = precise_dot(expand, tl.trans(low_rank), tl.zeros([CHANNELS, TILE], tl.float32))
                vs = rows_of(v, TILE, CHANNELS)
            for j in tl.static_range(TILE):
                if RANK > 0:
                    v = vs[j]
                else:
                    i = entry(at + j, WIDE)
                    v = tl.load(delta + i * stride_pl, mask=mask, other=0.0).to(tl.float32) * LOG2_E
                v += shift
                if whole:
                    v = softplus_log2(v, EXACT)
                tl.store(kept_steps + j * CHANNELS, v)
        tl.debug_barrier()

        h = tl.load(states + number.to(tl.int64) * (STATES * DIM), mask=kept, other=0.0)
        for first in tl.range(0, count, SUB, num_stages=1):
            tl.store(states_of + first * (STATE_BLOCK * CHANNELS // SUB), h)
            at = positions + start + first
            kept_steps = steps_of + first * CHANNELS + lane
            projections = projections_of + first * (2 * STATE_BLOCK) + n
            for j in tl.static_range(SUB):
                i = entry(at + j, WIDE)
                value = tl.load(x + i * stride_xl, mask=mask, other=0.0).to(tl.float32)
                step = tl.load(kept_steps + j * CHANNELS)
                if SOFTPLUS and not whole:
                    step = softplus_log2(step, EXACT)
                b = tl.load(projections + j * (2 * STATE_BLOCK))
                h = tl.exp2(step[None, :] * decay_rate) * h + (step * value * LN_2)[None, :] * b[:, None]
        tl.debug_barrier()

        for turned in tl.range(0, count, TILE, num_stages=1):
            first_of_tile = count - TILE - turned
            for turned_in_tile in tl.range(0, TILE, SUB, num_stages=1):
                first = first_of_tile + TILE - SUB - turned_in_tile
                row = (start + first).to(tl.int64)
                at = positions + row
                out_at = written + row
                out_x = grad_x + row * DIM
                kept_steps = steps_of + first * CHANNELS + lane
                projections = projections_of + first * (2 * STATE_BLOCK) + n
                if RANK == 0:
                    out_delta = grad_delta + row * DIM
                h = tl.load(states_of + first * (STATE_BLOCK * CHANNELS // SUB))
                hs = (h,)
                decays = ()
                values = ()
                vs = ()
                steps = ()
                dys = ()
                real = ()
                factors = ()  # what g and h are multiplied with, in turns, in their sums over channels
                for j in tl.static_range(SUB):
                    i = entry(at + j, WIDE)
                    value = tl.load(x + i * stride_xl, mask=mask, other=0.0).to(tl.float32)
                    b = tl.load(projections + 2 * j * STATE_BLOCK)
                    o = tl.load(out_at + j)
                    target = tl.maximum(o, 0) if TAIL else o
                    target = target.to(tl.int64) if WIDE else target.to(tl.uint32)
                    dy = tl.load(grad + target * stride_gl, mask=mask, other=0.0).to(tl.float32)
                    v = tl.load(kept_steps + j * CHANNELS)
                    step = softplus_log2(v, EXACT) if SOFTPLUS and not whole else v
                    if TAIL:  # steps behind the end have no output and change no state
                        dy = tl.where(o >= 0, dy, 0.0)
                        step = tl.where(o >= 0, step, 0.0)
                        real = real + (o >= 0,)
                    scaled = step * value * LN_2
                    decay = tl.exp2(step[None, :] * decay_rate)
                    h = decay * h + scaled[None, :] * b[:, None]
                    hs = hs + (h,)
                    decays = decays + (decay,)
                    values = values + (value,)
                    vs = vs + (v,)
                    steps = steps + (step,)
                    dys = dys + (dy,)
                    factors = factors + (tl.reshape(tl.join(scaled, dy), [2 * CHANNELS]),)
                columns = tl.zeros([STATE_BLOCK, COLUMNS], tl.float32)
                for j in tl.static_range(SUB - 1, -1, -1):
                    b = tl.load(projections + 2 * j * STATE_BLOCK)  # again: to keep it would cost registers
                    c = tl.load(projections + (2 * j + 1) * STATE_BLOCK)
                    g = dys[j][None, :] * c[:, None] + back
                    operand = tl.where(column[None, :] == 2 * j + turns[:, None], factors[j][:, None], 0.0).to(low)
                    columns = sum_products(_interleaved(g, hs[j + 1], low), operand, columns, EXACT)
                    back = decays[j] * g
                    exponent = back * hs[j]  # gradient of step size times decay rate
                    along = tl.sum(g * b[:, None], 0)
                    slope = tl.sum(decay_rate * exponent, 0) + along * values[j]  # gradient of the step size
                    if SOFTPLUS:
                        slope *= softplus_slope_from(vs[j]) if whole else softplus_slope(vs[j], steps[j])
                    if TAIL:
                        slope = tl.where(real[j], slope, 0.0)
                    sum_decay += exponent * steps[j][None, :]
                    sum_skip += dys[j] * values[j]
                    sum_shift += slope
                    dx = along * (steps[j] * LN_2) + skip * dys[j]
                    tl.store(out_x + j * DIM, rounded(dx, grad_x.dtype.element_ty), mask=mask)
                    if RANK > 0:
                        tl.store(kept_steps + j * CHANNELS, slope)
                    else:
                        tl.store(out_delta + j * DIM, rounded(slope, grad_delta.dtype.element_ty), mask=mask)
                tl.store(part + row * width, columns, mask=part_mask)
            if RANK > 0:
                tl.debug_barrier()
                row = (start + first_of_tile).to(tl.int64)
                slope = tl.load(steps_of + (first_of_tile + t)[None, :] * CHANNELS + lane[:, None]).to(low)
                contract = tl.trans(tl.load(weight, mask=some, other=0.0)).to(low)
                of_rank = dot(contract, slope, tl.zeros([RANK_BLOCK, TILE], tl.float32))
                of_rank_mask = (r < RANK)[:, None] & (t >= 0)[None, :]
                tl.store(parts + (row + t)[None, :] * width + r[:, None], of_rank, mask=of_rank_mask)
                i = entries(positions + row, WIDE, TILE)
                low_rank = tl.load(delta + (i * stride_pl)[:, None] + r[None, :], mask=(r < RANK)[None, :], other=0.0)
                # summed up in memory: registers are scarce, and nobody else writes there
                earlier = tl.load(grad_weight, mask=some & (turn + turned > 0), other=0.0)
                tl.store(grad_weight, dot(slope, low_rank.to(low), earlier), mask=some)
                tl.debug_barrier()
        tl.debug_barrier()
    sums += share * DIM + d
    tl.store(sums[None, :] + n.to(tl.int64)[:, None] * sum_size, sum_decay * LN_2, mask=kept)
    sums += sum_size.to(tl.int64) * STATES
    tl.store(sums, sum_skip, mask=mask)
    tl.store(sums + sum_size, sum_shift, mask=mask)


def launch_backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, positions: Tensor, written: Tensor, states: Tensor, grad: Tensor, end: Tensor | None,
    grad_x: Tensor, grad_delta: Tensor | None, parts: Tensor, sums: Tensor,
    grad_weight: Tensor | None,
    strides: tuple[int, ...], steps: int, tile: int, keep: int, span: int, softplus: bool, wide: bool,
) -> None:  # fmt: skip
    """Gradients of every step, where a channel has N > 1 states.

    Args:
        x, delta, A, B, C, D, weight, bias: inputs as the forward kernel takes them; A is (K, D, N).
        positions, written: (K, S, padded) int32, where steps read and write; `written` is -1 behind the end.
        states: (B, K*S, chunks, N, D) float32, the state before every `keep` tiles.
        grad: gradient of the output, (B, L, D) or (B, L, K, D).
        end: (B*K*S, stretches, N, D) float32, gradients of the states at the ends of stretches; None: zeros.
        grad_x: receives the gradient of x by step, (B, K*S*padded, D).
        grad_delta: likewise of delta, where it is given whole.
        parts: (D / 32 rounded up, B, K*S*padded, R + 2N) float32, receives those of low-rank delta, B and C.
        sums: (N + 2, B, K*S*stretches, D) float32, receives those of A (first N), D and bias.
        grad_weight: (B, K*S*stretches, D, R) float32, receives that of weight.
        strides: three each, of image, position and route: of x, delta, B, C and grad.
        steps, tile, keep: steps of a sequence, of a tile, and tiles of a chunk.
        span: steps of a stretch, whole chunks.
        softplus: whether step sizes are a softplus.
        wide: whether offsets need 64 bits.
    """
    routes, segments, padded = positions.shape
    images, dim, count = x.shape[0], x.shape[-1], A.shape[2]
    rank = 0 if weight is None else weight.shape[2]
    blocks = ceil_div(dim, _CHANNELS)
    programs = images * routes * segments * blocks * ceil_div(padded, span)
    if not programs:
        return
    state_block = max(16, power_of_2(count))
    sub = max(1, 64 // state_block)  # the states of so many steps, and their decays, are in registers at once
    chunk = keep * tile
    scratch_size = chunk * (_CHANNELS + 2 * state_block) + chunk // sub * state_block * _CHANNELS
    scratch = states.new_empty(programs * scratch_size)
    launch(
        _scan_2d_states_backward_kernel, (programs,),
        x, delta, A.transpose(1, 2).contiguous(), B, C, D, weight, bias, positions, written, states, grad, end,
        grad_x, grad_delta, parts, sums, grad_weight, scratch,
        *strides, dim, padded, span, parts.stride(0), sums.stride(0), scratch_size,
        ROUTES=routes, SEGMENTS=segments, DIM=dim, STATES=count, STATE_BLOCK=state_block,
        RANK=rank, RANK_BLOCK=max(16, power_of_2(rank) if rank else 0), CHANNELS=_CHANNELS,
        TILE=tile, SUB=sub, KEEP=keep, COLUMNS=max(8, 2 * sub),
        TAIL=padded != steps, SOFTPLUS=softplus, EXACT=x.dtype == torch.float32, WIDE=wide,
        num_warps=1, maxnreg=_REGISTERS if x.element_size() == 2 and count <= 16 else None,
    )  # fmt: skip

"""The selective scan over 1-D sequences, time last in memory: Mamba (arXiv 2312.00752), forward and backward.

The lanes of a warp share the states of its channels: a lane has OWN states of one channel, and SHARE lanes have all of
them. Few states per lane make many warps of few channels, which one long sequence needs. What depends on channel and
step alone, such as the softplus of the step sizes, is computed with a lane per channel and step, and then spread over
the lanes of the channel through shared memory; outputs come back the same way and are added up there. Backward walks
the tiles from the end, starting from the states that forward kept, and leaves gradients of B and C per block of
channels, which are added up afterwards. Where even that makes few warps, sequences are cut into stretches: a first pass
finds what every stretch adds to what enters it, and so what enters the next.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .carry import hand_on
from .launch import launch
from .sizes import ceil_div, power_of_2
from .sums import sum_parts
from .tiles import LN_2, LOG2_E, pinned, prefetch, rounded, rows_of, softplus_log2, softplus_slope, tile_of


@triton.jit
def _spread(step, drive, SHARE: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Two tiles [CHANNELS, TILE] -> tuple of their rows [CHANNELS * SHARE] in turns, the same for a channel's lanes."""
    if SHARE == 1:
        steps = rows_of(step, TILE, CHANNELS)
        drives = rows_of(drive, TILE, CHANNELS)
        rows = ()
        for j in tl.static_range(TILE):
            rows = rows + (steps[j], drives[j])
        return rows
    else:
        both = tl.reshape(tl.join(pinned(step), pinned(drive)), [CHANNELS, 2 * TILE])  # one exchange for both
        both = tl.broadcast_to(both[:, None, :], [CHANNELS, SHARE, 2 * TILE])
        return rows_of(tl.reshape(both, [CHANNELS * SHARE, 2 * TILE]), 2 * TILE, CHANNELS * SHARE)


@triton.jit
def _load_matrix(matrix, SHARE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """B or C of TILE steps, as `_blocked` lays them out: tuple of rows [CHANNELS * SHARE], step after step.

    Every lane loads 16 bytes at a time, and a warp whole lines of the cache.
    """
    width: tl.constexpr = 128 // matrix.dtype.element_ty.primitive_bitwidth
    lanes: tl.constexpr = CHANNELS * SHARE
    share = (tl.arange(0, lanes) % SHARE)[:, None] * width + tl.arange(0, width)[None, :]
    rows = ()
    for part in tl.static_range(TILE * STATES // width):
        rows = rows + rows_of(tl.load(matrix + part * (SHARE * width) + share), width, lanes)
    return rows


@triton.jit
def _sum_last(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> [ROWS]: every lane gets whole rows, and no sum goes from lane to lane."""
    terms = rows_of(tile, COLUMNS, ROWS)
    total = terms[0]
    for i in tl.static_range(1, COLUMNS):
        total += terms[i]
    return total


@triton.jit
def _sum_share(rows, SHARE: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    """Tuple of STEPS rows [CHANNELS * SHARE], added up over the lanes of every channel -> [CHANNELS, STEPS]."""
    tile = tile_of(rows, 0, 1, STEPS, CHANNELS * SHARE)
    if SHARE == 1:
        return tile
    else:
        tile = tl.permute(tl.reshape(tile, [CHANNELS, SHARE, STEPS]), [0, 2, 1])
        total = _sum_last(tl.reshape(tile, [CHANNELS * STEPS, SHARE]), CHANNELS * STEPS, SHARE)
        return tl.reshape(total, [CHANNELS, STEPS])


@triton.jit
def _sum_channels(rows, SHARE: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuple of COLUMNS rows [CHANNELS * SHARE], added up over channels -> [SHARE, COLUMNS]."""
    tile = tile_of(rows, 0, 1, COLUMNS, CHANNELS * SHARE)
    if CHANNELS == 1:
        return tl.reshape(tile, [SHARE, COLUMNS])
    else:
        tile = tl.permute(tl.reshape(tile, [CHANNELS, SHARE, COLUMNS]), [1, 2, 0])
        total = _sum_last(tl.reshape(tile, [SHARE * COLUMNS, CHANNELS]), SHARE * COLUMNS, CHANNELS)
        return tl.reshape(total, [SHARE, COLUMNS])


@triton.jit
def _load_steps(
    u, delta, shift, mask, CHANNELS: tl.constexpr, SHARE: tl.constexpr, TILE: tl.constexpr,
    WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of inputs, of arguments of step sizes and of step sizes in units of log2, and rows of steps and drives.

    The drive of a step is its input times its step size.
    """
    value = tl.load(u, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(delta, mask=mask, other=0.0).to(tl.float32) * LOG2_E + shift[:, None]
    step = v
    if SOFTPLUS:
        step = softplus_log2(v, EXACT)
    if not WHOLE:
        step = tl.where(mask, step, 0.0)  # steps behind the end leave the state as it is
    return value, v, step, _spread(step, step * value * LN_2, SHARE, CHANNELS, TILE)


@triton.jit
def _ask_for_rows(rows, first, length, STEPS: tl.constexpr):
    """Bring steps of the rows that start at `rows`, pointers [CHANNELS], into the cache. None: no rows."""
    if rows is not None:
        sector: tl.constexpr = 256 // rows.dtype.element_ty.primitive_bitwidth
        count: tl.constexpr = (STEPS + sector - 1) // sector
        ends = first + (tl.arange(0, count) + 1) * (STEPS // count) - 1  # what comes before is there if rows are uneven
        prefetch(rows[:, None] + tl.minimum(ends, length - 1)[None, :])


@triton.jit
def _ask_for_matrix(matrix, first, ROW: tl.constexpr, STEPS: tl.constexpr):
    """Bring steps of B or C, of ROW numbers each, into the cache."""
    sector: tl.constexpr = 256 // matrix.dtype.element_ty.primitive_bitwidth
    count: tl.constexpr = (STEPS * ROW + sector - 1) // sector
    prefetch(matrix + first * ROW + tl.arange(0, count) * sector)


@triton.jit
def _load_rows(pointers, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] in memory -> tuple of COLUMNS rows [ROWS]; zeros where there is nothing to load."""
    if pointers is None:
        zeros = ()
        for _ in tl.static_range(COLUMNS):
            zeros = zeros + (tl.zeros([ROWS], tl.float32),)
        return zeros
    else:
        return rows_of(tl.load(pointers, mask=mask, other=0.0), COLUMNS, ROWS)


@triton.jit
def _task(stretches, BLOCKS: tl.constexpr, GROUPS: tl.constexpr):
    """Block of channels, group, image and stretch of a program."""
    pid = tl.program_id(0)
    image = (pid // (BLOCKS * stretches * GROUPS)).to(tl.int64)
    return pid % BLOCKS, (pid // (BLOCKS * stretches)) % GROUPS, image, (pid // BLOCKS) % stretches


@triton.jit
def _states_of(
    block, group, GROUP: tl.constexpr, STATES: tl.constexpr, SHARE: tl.constexpr, OWN: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Places in (dim, N) of the states that lanes own, [CHANNELS * SHARE, OWN], and which of them exist."""
    lane = tl.arange(0, CHANNELS * SHARE)
    n = (lane % SHARE * OWN)[:, None] + tl.arange(0, OWN)[None, :]
    within = (block * CHANNELS + lane // SHARE)[:, None]
    return (group * GROUP + within) * STATES + n, (n < STATES) & (within < GROUP)


@triton.jit
def _channels_of(block, group, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels of a program, [CHANNELS], and which of them exist."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    return (group * GROUP + channel).to(tl.int64), channel < GROUP


@triton.jit
def _selective_scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, begin, y, ungated, last, states,
    stride_ub, stride_ud, stride_db, stride_dd, stride_zb, stride_zd, length, padded, span,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, STATES: tl.constexpr, SHARE: tl.constexpr, OWN: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    lanes: tl.constexpr = CHANNELS * SHARE
    dim: tl.constexpr = GROUPS * GROUP
    stretches = tl.cdiv(length, span)
    block, group, image, stretch = _task(stretches, (GROUP + CHANNELS - 1) // CHANNELS, GROUPS)
    start = stretch * span
    stop = tl.minimum(start + span, length)
    ends = (image * stretches + stretch) * (dim * STATES)

    # a lane has OWN states of a channel
    place, some = _states_of(block, group, GROUP, STATES, SHARE, OWN, CHANNELS)
    rates = _load_rows(A + place, some, lanes, OWN)
    hs = _load_rows(None if begin is None else begin + ends + place, some, lanes, OWN)
    B += (image * GROUPS + group) * padded * (SHARE * OWN)
    C += (image * GROUPS + group) * padded * (SHARE * OWN)
    if CHUNK > 0:
        states += (image * tl.cdiv(length, CHUNK) + start // CHUNK) * (dim * STATES) + place
    # a lane has a channel and some steps
    d, inside = _channels_of(block, group, GROUP, CHANNELS)
    skip = tl.zeros([CHANNELS], tl.float32) if D is None else tl.load(D + d, mask=inside, other=0.0)
    shift = tl.zeros([CHANNELS], tl.float32) if bias is None else tl.load(bias + d, mask=inside, other=0.0) * LOG2_E
    t = tl.arange(0, TILE)
    near = tl.minimum(d, group * GROUP + GROUP - 1)  # a channel that exists
    u_rows = u + image * stride_ub + near * stride_ud
    delta_rows = delta + image * stride_db + near * stride_dd
    z_rows = None if z is None else z + image * stride_zb + near * stride_zd
    u += image * stride_ub + d[:, None] * stride_ud + t[None, :]
    delta += image * stride_db + d[:, None] * stride_dd + t[None, :]
    row = (image * dim + d)[:, None] * length + t[None, :]

    for first in range(start, stop, TILE):
        following = first + TILE
        if following < stop:
            _ask_for_rows(u_rows, following, length, TILE)
            _ask_for_rows(delta_rows, following, length, TILE)
            _ask_for_rows(z_rows, following, length, TILE)
            _ask_for_matrix(B, following, SHARE * OWN, TILE)
            _ask_for_matrix(C, following, SHARE * OWN, TILE)
        if CHUNK >= TILE:
            if first % CHUNK == 0:
                tl.store(states, tile_of(hs, 0, 1, OWN, lanes), mask=some)
                states += dim * STATES
        mask = inside[:, None] & (first + t < length)[None, :]
        if z is not None:
            gate = tl.load(
                z + image * stride_zb + d[:, None] * stride_zd + (first + t)[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        value, v, step, rows = _load_steps(
            u + first, delta + first, shift, mask, CHANNELS, SHARE, TILE, WHOLE, SOFTPLUS, EXACT
        )
        bs = _load_matrix(B + first * (SHARE * OWN), SHARE, OWN, CHANNELS, TILE)
        cs = _load_matrix(C + first * (SHARE * OWN), SHARE, OWN, CHANNELS, TILE)
        outs = ()
        for j in tl.static_range(TILE):
            if CHUNK > 0 and CHUNK < TILE and j % CHUNK == 0:
                if first + j < stop:
                    tl.store(states, tile_of(hs, 0, 1, OWN, lanes), mask=some)
                states += dim * STATES
            after = ()
            out = tl.zeros([lanes], tl.float32)
            for r in tl.static_range(OWN):
                h = tl.exp2(rows[2 * j] * rates[r]) * hs[r] + rows[2 * j + 1] * bs[j * OWN + r].to(tl.float32)
                out += h * cs[j * OWN + r].to(tl.float32)
                after = after + (h,)
            hs = after
            outs = outs + (out,)
        out = _sum_share(outs, SHARE, CHANNELS, TILE) + skip[:, None] * value
        if z is not None:
            if ungated is not None:
                tl.store(ungated + row + first, rounded(out, ungated.dtype.element_ty), mask=mask)
            out *= gate / (1.0 + tl.exp2(-gate * LOG2_E))
        tl.store(y + row + first, rounded(out, y.dtype.element_ty), mask=mask)
    if stretch == stretches - 1:
        tl.store(last + image * (dim * STATES) + place, tile_of(hs, 0, 1, OWN, lanes), mask=some)


@triton.jit
def _selective_scan_backward_kernel(
    u, delta, A, B, C, D, z, bias, ungated, states, grad, end,
    grad_u, grad_delta, grad_z, parts, grad_A, sums,
    stride_ub, stride_ud, stride_db, stride_dd, stride_zb, stride_zd, stride_gb, stride_gd,
    length, padded, span, part_size, sum_size,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, STATES: tl.constexpr, SHARE: tl.constexpr, OWN: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    lanes: tl.constexpr = CHANNELS * SHARE
    state_block: tl.constexpr = SHARE * OWN
    blocks: tl.constexpr = (GROUP + CHANNELS - 1) // CHANNELS
    dim: tl.constexpr = GROUPS * GROUP
    tiles: tl.constexpr = CHUNK // TILE
    stretches = tl.cdiv(length, span)
    block, group, image, stretch = _task(stretches, blocks, GROUPS)
    start = stretch * span
    stop = tl.minimum(start + span, length)
    ends = (image * stretches + stretch) * (dim * STATES)

    place, some = _states_of(block, group, GROUP, STATES, SHARE, OWN, CHANNELS)
    rates = _load_rows(A + place, some, lanes, OWN)
    # gradients of the states, carried one step back
    backs = _load_rows(None if end is None else end + ends + place, some, lanes, OWN)
    sum_decays = _load_rows(None, some, lanes, OWN)
    B += (image * GROUPS + group) * padded * state_block
    C += (image * GROUPS + group) * padded * state_block
    d, inside = _channels_of(block, group, GROUP, CHANNELS)
    skip = tl.zeros([CHANNELS], tl.float32) if D is None else tl.load(D + d, mask=inside, other=0.0)
    shift = tl.zeros([CHANNELS], tl.float32) if bias is None else tl.load(bias + d, mask=inside, other=0.0) * LOG2_E
    sum_skip = tl.zeros([CHANNELS, TILE], tl.float32)
    sum_shift = tl.zeros([CHANNELS, TILE], tl.float32)
    t = tl.arange(0, TILE)
    u += image * stride_ub + d[:, None] * stride_ud + t[None, :]
    delta += image * stride_db + d[:, None] * stride_dd + t[None, :]
    grad += image * stride_gb + d[:, None] * stride_gd + t[None, :]
    row = (image * dim + d)[:, None] * length + t[None, :]
    # gradients of B and C of a tile, laid out as B and C are: [SHARE, TILE * OWN]
    part = block.to(tl.int64) * part_size + (image * GROUPS + group) * padded * state_block
    column = tl.arange(0, TILE * OWN)
    width: tl.constexpr = 128 // B.dtype.element_ty.primitive_bitwidth
    part += tl.arange(0, SHARE)[:, None] * width + (column // width * (SHARE * width) + column % width)[None, :]
    part_c = blocks * part_size.to(tl.int64)
    states += image * tl.cdiv(length, CHUNK) * (dim * STATES) + place

    for turn in range(0, tl.cdiv(stop - start, CHUNK)):
        number = tl.cdiv(stop, CHUNK) - 1 - turn
        chunk_start = number * CHUNK
        kept = states + number.to(tl.int64) * (dim * STATES)
        hs = _load_rows(kept, some, lanes, OWN)
        before = (hs,)  # every tile of the chunk
        for earlier in tl.static_range(tiles - 1):
            first = chunk_start + earlier * TILE
            mask = inside[:, None] & (first + t < length)[None, :]
            _, _, _, rows = _load_steps(
                u + first, delta + first, shift, mask, CHANNELS, SHARE, TILE, WHOLE, SOFTPLUS, EXACT
            )
            bs = _load_matrix(B + first * state_block, SHARE, OWN, CHANNELS, TILE)
            for j in tl.static_range(TILE):
                after = ()
                for r in tl.static_range(OWN):
                    decay = tl.exp2(rows[2 * j] * rates[r])
                    after = after + (decay * hs[r] + rows[2 * j + 1] * bs[j * OWN + r].to(tl.float32),)
                hs = after
            before = before + (hs,)
        for turned in tl.static_range(tiles):
            first = chunk_start + (tiles - 1 - turned) * TILE
            mask = inside[:, None] & (first + t < length)[None, :]
            dy = tl.load(grad + first, mask=mask, other=0.0).to(tl.float32)
            if z is not None:
                gate = tl.load(
                    z + image * stride_zb + d[:, None] * stride_zd + (first + t)[None, :], mask=mask, other=0.0
                ).to(tl.float32)
                out = tl.load(ungated + row + first, mask=mask, other=0.0).to(tl.float32)
                sigmoid = 1.0 / (1.0 + tl.exp2(-gate * LOG2_E))
                dz = dy * out * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
                tl.store(grad_z + row + first, rounded(dz, grad_z.dtype.element_ty), mask=mask)
                dy *= gate * sigmoid
            value, v, step, rows = _load_steps(
                u + first, delta + first, shift, mask, CHANNELS, SHARE, TILE, WHOLE, SOFTPLUS, EXACT
            )
            if SHARE == 1:
                dys = rows_of(dy, TILE, CHANNELS)
            else:
                wide = tl.broadcast_to(pinned(dy)[:, None, :], [CHANNELS, SHARE, TILE])
                dys = rows_of(tl.reshape(wide, [lanes, TILE]), TILE, lanes)
            bs = _load_matrix(B + first * state_block, SHARE, OWN, CHANNELS, TILE)
            cs = _load_matrix(C + first * state_block, SHARE, OWN, CHANNELS, TILE)
            hs = before[tiles - 1 - turned]  # before the first step, and after every step
            decays = ()
            for j in tl.static_range(TILE):
                for r in tl.static_range(OWN):
                    decay = tl.exp2(rows[2 * j] * rates[r])
                    hs = hs + (decay * hs[j * OWN + r] + rows[2 * j + 1] * bs[j * OWN + r].to(tl.float32),)
                    decays = decays + (decay,)
            products = ()
            of_b = ()
            of_c = ()
            for j in tl.static_range(TILE - 1, -1, -1):
                along_decay = tl.zeros([lanes], tl.float32)
                along = tl.zeros([lanes], tl.float32)
                next_backs = ()
                next_decays = ()
                step_b = ()
                step_c = ()
                for r in tl.static_range(OWN):
                    g = dys[j] * cs[j * OWN + r].to(tl.float32) + backs[r]
                    back = decays[j * OWN + r] * g
                    exponent = back * hs[j * OWN + r]  # gradient of step size times decay rate
                    next_backs = next_backs + (back,)
                    next_decays = next_decays + (sum_decays[r] + exponent * rows[2 * j],)
                    along_decay += exponent * rates[r]
                    along += g * bs[j * OWN + r].to(tl.float32)
                    step_b = step_b + (g * rows[2 * j + 1],)
                    step_c = step_c + (dys[j] * hs[(j + 1) * OWN + r],)
                backs = next_backs
                sum_decays = next_decays
                products = (along_decay, along) + products
                of_b = step_b + of_b
                of_c = step_c + of_c
            both = _sum_share(products, SHARE, CHANNELS, 2 * TILE)
            along_decay, along = tl.split(tl.reshape(both, [CHANNELS, TILE, 2]))
            slope = along_decay + along * value  # gradient of the step size
            if SOFTPLUS:
                slope *= softplus_slope(v, step)
            if not WHOLE:
                slope = tl.where(mask, slope, 0.0)
            sum_skip += dy * value
            sum_shift += slope
            dx = along * (step * LN_2) + skip[:, None] * dy
            tl.store(grad_u + row + first, rounded(dx, grad_u.dtype.element_ty), mask=mask)
            tl.store(grad_delta + row + first, rounded(slope, grad_delta.dtype.element_ty), mask=mask)
            tl.store(parts + part + first * state_block, _sum_channels(of_b, SHARE, CHANNELS, TILE * OWN))
            tl.store(parts + part + part_c + first * state_block, _sum_channels(of_c, SHARE, CHANNELS, TILE * OWN))
    tl.store(grad_A + ends + place, tile_of(sum_decays, 0, 1, OWN, lanes) * LN_2, mask=some)
    d += (image * stretches + stretch) * dim
    tl.store(sums + d, tl.sum(sum_skip, 1), mask=inside)
    tl.store(sums + sum_size + d, tl.sum(sum_shift, 1), mask=inside)


@triton.jit
def _selective_scan_summary_kernel(
    u, delta, A, matrix, z, bias, carry, totals,
    stride_ub, stride_ud, stride_db, stride_dd, stride_zb, stride_zd, length, padded, span,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, STATES: tl.constexpr, SHARE: tl.constexpr, OWN: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """What a stretch does to what enters it: adds `carry` to it, after a decay for the sum of step sizes in `totals`.

    What is carried are states, driven by u and B, or if TURNED gradients of states, from the end of the stretch to its
    start, where `u` is the gradient of the output and `matrix` is C.
    """
    lanes: tl.constexpr = CHANNELS * SHARE
    dim: tl.constexpr = GROUPS * GROUP
    stretches = tl.cdiv(length, span)
    block, group, image, stretch = _task(stretches, (GROUP + CHANNELS - 1) // CHANNELS, GROUPS)
    start = stretch * span
    stop = tl.minimum(start + span, length)
    ends = (image * stretches + stretch) * (dim * STATES)

    place, some = _states_of(block, group, GROUP, STATES, SHARE, OWN, CHANNELS)
    rates = _load_rows(A + place, some, lanes, OWN)
    hs = _load_rows(None, some, lanes, OWN)
    matrix += (image * GROUPS + group) * padded * (SHARE * OWN)
    d, inside = _channels_of(block, group, GROUP, CHANNELS)
    shift = tl.zeros([CHANNELS], tl.float32) if bias is None else tl.load(bias + d, mask=inside, other=0.0) * LOG2_E
    total = tl.zeros([CHANNELS, TILE], tl.float32)
    t = tl.arange(0, TILE)
    near = tl.minimum(d, group * GROUP + GROUP - 1)  # a channel that exists
    u_rows = u + image * stride_ub + near * stride_ud
    delta_rows = delta + image * stride_db + near * stride_dd
    z_rows = None if z is None else z + image * stride_zb + near * stride_zd
    u += image * stride_ub + d[:, None] * stride_ud + t[None, :]
    delta += image * stride_db + d[:, None] * stride_dd + t[None, :]

    for turn in range(0, tl.cdiv(stop - start, TILE)):
        first = (tl.cdiv(stop, TILE) - 1 - turn if TURNED else tl.cdiv(start, TILE) + turn) * TILE
        if turn + 1 < tl.cdiv(stop - start, TILE):
            following = first - TILE if TURNED else first + TILE
            _ask_for_rows(u_rows, following, length, TILE)
            _ask_for_rows(delta_rows, following, length, TILE)
            if TURNED:
                _ask_for_rows(z_rows, following, length, TILE)
            _ask_for_matrix(matrix, following, SHARE * OWN, TILE)
        mask = inside[:, None] & (first + t < length)[None, :]
        value = tl.load(u + first, mask=mask, other=0.0).to(tl.float32)
        step = tl.load(delta + first, mask=mask, other=0.0).to(tl.float32) * LOG2_E + shift[:, None]
        if SOFTPLUS:
            step = softplus_log2(step, EXACT)
        if not WHOLE:
            step = tl.where(mask, step, 0.0)
        total += step
        if TURNED:
            if z is not None:
                gate = tl.load(
                    z + image * stride_zb + d[:, None] * stride_zd + (first + t)[None, :], mask=mask, other=0.0
                ).to(tl.float32)
                value *= gate / (1.0 + tl.exp2(-gate * LOG2_E))
        else:
            value *= step * LN_2
        rows = _spread(step, value, SHARE, CHANNELS, TILE)
        ms = _load_matrix(matrix + first * (SHARE * OWN), SHARE, OWN, CHANNELS, TILE)
        for j in tl.static_range(TILE - 1 if TURNED else 0, -1 if TURNED else TILE, -1 if TURNED else 1):
            after = ()
            for r in tl.static_range(OWN):
                decay = tl.exp2(rows[2 * j] * rates[r])
                drive = rows[2 * j + 1] * ms[j * OWN + r].to(tl.float32)
                after = after + (decay * (hs[r] + drive) if TURNED else decay * hs[r] + drive,)
            hs = after
    tl.store(carry + ends + place, tile_of(hs, 0, 1, OWN, lanes), mask=some)
    tl.store(totals + (image * stretches + stretch) * dim + d, tl.sum(total, 1), mask=inside)


def _chunk(states: int) -> int:
    """Steps between the states that forward keeps: 16 states then take as much memory as a bfloat16 tensor."""
    return 16 if states == 1 else 32


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _time_last(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


class _Cut(NamedTuple):
    """How a kernel is cut: states that a lane has of a channel, steps of a tile, warps of a program.

    `registers` per lane at most, where there are more warps than would fit without that limit.
    """

    own: int
    tile: int
    warps: int
    registers: int | None = None


_FEW_WARPS = 1024
_MANY_WARPS = 4096  # more than an H200 holds at a time
_SHORTEST_STRETCH = 256  # steps
_RESIDENT_WARPS = 1584  # that an H200 holds at a time without a limit of registers


def _forward_cut(states: int, dtype: torch.dtype) -> _Cut:
    """Two states per lane cost the fewest instructions; registers hold 32 steps of one state in half precision."""
    if states == 1:
        return _Cut(own=1, tile=32 if dtype.itemsize == 2 else 16, warps=1)
    return _Cut(own=2, tile=16, warps=1)


def _backward_cut(states: int, dtype: torch.dtype) -> _Cut:
    """Programs of many channels leave fewer shares of the gradients of B and C to add up."""
    if states == 1:
        return _Cut(own=1, tile=16, warps=1)
    return _Cut(own=2, tile=8, warps=4, registers=128 if dtype.itemsize == 2 else None)


class _Call:
    """Inputs of a call as the kernels take them."""

    def __init__(
        self, cut: _Cut, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool,
    ):  # fmt: skip
        self.cut = cut
        self.batch, self.dim, self.length = u.shape
        self.groups, self.states = B.shape[1], A.shape[1]
        self.chunk = _chunk(self.states)
        unit = max(self.chunk, cut.tile)  # stretches are whole chunks and whole tiles
        self.padded = ceil_div(self.length, unit) * unit
        self.share = max(1, power_of_2(self.states) // cut.own)
        self.channels = max(1, 32 * cut.warps // self.share)
        self.u, self.delta, self.z = _time_last(u), _time_last(delta), _time_last(z)
        self.A, self.D, self.bias = _float32(A), _float32(D), _float32(delta_bias)
        self.B, self.C = self._blocked(B), self._blocked(C)
        self.softplus = delta_softplus
        # a few long sequences are cut into stretches, whose entering states are found first
        warps = ceil_div(self.batch * self.dim * power_of_2(self.states), 32 * cut.own)
        self.span = self.padded
        if 0 < warps < _FEW_WARPS:
            stretches = min(_MANY_WARPS // warps, self.length // _SHORTEST_STRETCH)
            self.span = ceil_div(self.padded // unit, max(stretches, 1)) * unit
        self.stretches = ceil_div(self.padded, self.span)
        self.registers = cut.registers if warps * self.stretches > _RESIDENT_WARPS else None

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.groups * self.stretches * self.programs,)

    @property
    def programs(self) -> int:
        """Per image, group and stretch."""
        return ceil_div(self.dim // self.groups, self.channels)

    def _blocked(self, matrix: Tensor) -> Tensor:
        """(batch, G, N, L) -> (batch, G, L / W, SHARE, W, OWN) in whole tiles, where W steps of OWN are 16 bytes."""
        own, share = self.cut.own, self.share
        width = 16 // matrix.element_size() // own
        if (self.padded, own * share) != (self.length, self.states):
            matrix = F.pad(matrix, (0, self.padded - self.length, 0, own * share - self.states))
        matrix = matrix.unflatten(3, (-1, width)).unflatten(2, (share, own))
        return matrix.permute(0, 1, 4, 2, 5, 3).contiguous()

    def unblocked(self, matrix: Tensor) -> Tensor:
        """The inverse of `_blocked`, as a view of (..., padded * SHARE * OWN) numbers."""
        own, share = self.cut.own, self.share
        width = 16 // self.B.element_size() // own
        matrix = matrix.view(self.batch, self.groups, self.padded // width, share, width, own).permute(0, 1, 3, 5, 2, 4)
        return matrix.reshape(self.batch, self.groups, own * share, self.padded)[:, :, : self.states, : self.length]

    def entering(self, turned: bool, u: Tensor, matrix: Tensor, z: Tensor | None, outer: Tensor | None) -> Tensor:
        """What enters every stretch, (batch, stretches, dim, N): states, or if `turned` their gradients."""
        carry = u.new_empty(self.batch, self.stretches, self.dim, self.states, dtype=torch.float32)
        totals = u.new_empty(carry.shape[:3], dtype=torch.float32)
        constants = self.constants() | dict(TILE=16)
        launch(
            _selective_scan_summary_kernel, self.grid,
            u, self.delta, self.A, matrix, z, self.bias, carry, totals,
            *_strides(u), *_strides(self.delta), *_strides(z), self.length, self.padded, self.span,
            TURNED=turned, **constants,
        )  # fmt: skip
        return hand_on(carry, totals, self.A, outer, turned=turned)

    def strides(self) -> tuple[int, ...]:
        return *_strides(self.u), *_strides(self.delta), *_strides(self.z)

    def constants(self) -> dict:
        return dict(
            GROUPS=self.groups,
            GROUP=self.dim // self.groups,
            STATES=self.states,
            SHARE=self.share,
            OWN=self.cut.own,
            CHANNELS=self.channels,
            TILE=self.cut.tile,
            WHOLE=self.padded == self.length,
            SOFTPLUS=self.softplus,
            EXACT=self.u.dtype == torch.float32,
            num_warps=self.cut.warps,
            maxnreg=self.registers,
        )


def empty_saved(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output before the gate, if there is one, and the states between chunks of steps."""
    batch, dim, length = u.shape
    states = A.shape[1]
    ungated = u.new_empty(u.shape if z is not None else 0)
    return ungated, u.new_empty(batch, ceil_div(length, _chunk(states)), dim, states, dtype=torch.float32)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `vision_ssm.ops.selective_scan`. Returns y, the last state and, if `save`, what `empty_saved` allocates."""
    cut = _forward_cut(A.shape[1], u.dtype)
    call = _Call(cut, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y = u.new_empty(u.shape)
    last = u.new_empty(call.batch, call.dim, call.states, dtype=torch.float32)
    ungated, kept = empty_saved(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save) if save else (None, None)
    if u.numel():
        begin = call.entering(False, call.u, call.B, None, None) if call.stretches > 1 else None
        launch(
            _selective_scan_forward_kernel, call.grid,
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.bias, begin,
            y, None if z is None else ungated, last, kept,
            *call.strides(), call.length, call.padded, call.span,
            CHUNK=call.chunk if save else 0, **call.constants(),
        )  # fmt: skip
    return (y, last, ungated, kept) if save else (y, last)


def backward(
    grad_y: Tensor, grad_last: Tensor, ungated: Tensor, states: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of all floating-point inputs that are given, by name; empty gradients of outputs stand for zeros."""
    if not save:  # forward kept nothing
        _, _, ungated, states = forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    cut = _backward_cut(A.shape[1], u.dtype)
    call = _Call(cut, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    grad = u.new_zeros(u.shape) if not grad_y.numel() else _time_last(grad_y)
    end = grad_last.float().contiguous() if grad_last.numel() else None
    grads = {"u": u.new_empty(u.shape), "delta": delta.new_empty(u.shape)}
    if z is not None:
        grads["z"] = z.new_empty(u.shape)
    parts = u.new_empty(2, call.programs, call.B.numel(), dtype=torch.float32)  # of B and of C, per program
    by_stretch = u.new_empty(call.batch, call.stretches, call.dim, call.states, dtype=torch.float32)
    sums = u.new_empty(2, call.batch, call.stretches, call.dim, dtype=torch.float32)  # of D and of delta_bias
    if u.numel():
        if call.stretches > 1:
            end = call.entering(True, grad, call.C, call.z, end)
        launch(
            _selective_scan_backward_kernel, call.grid,
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.bias,
            None if z is None else ungated, states, grad, end,
            grads["u"], grads["delta"], grads.get("z"), parts, by_stretch, sums,
            *call.strides(), *_strides(grad),
            call.length, call.padded, call.span, parts.stride(1), sums.stride(0),
            CHUNK=call.chunk, **call.constants(),
        )  # fmt: skip
    grads["B"], grads["C"] = (call.unblocked(part) for part in parts.sum(1))
    # parts of all images and stretches: (2, parts, 1, 1, dim) and (parts, 1, 1, dim * N)
    _, of_skip, of_bias, of_decay = sum_parts(sums.view(2, -1, 1, 1, call.dim), by_stretch.view(-1, 1, 1, A.numel()))
    grads["A"] = of_decay.view(A.shape)
    if D is not None:
        grads["D"] = of_skip.view(call.dim)
    if delta_bias is not None:
        grads["delta_bias"] = of_bias.view(call.dim)
    return grads

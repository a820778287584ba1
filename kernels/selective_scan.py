"""The selective scan over 1-D sequences, time last in memory: Mamba (arXiv 2312.00752).

Forward reads (batch, dim, L) as it is: a program walks one sequence for a block of channels, a lane per channel, with
16 consecutive steps of every channel at a time. Backward is that of the channel-last scan along a single route per
group of channels, on transposed copies.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scan_2d
from .launch import launch
from .sizes import ceil_div, power_of_2
from .tiles import LN_2, LOG2_E, rows_of, softplus_log2, tile_of

_TILE = scan_2d.TILE
_CHANNELS = 32


@triton.jit(do_not_specialize=["stride_n"])  # or states would be spread over lanes, for wider loads of A
def _forward_kernel(
    u, delta, A, B, C, D, z, bias, y, ungated, last, states,
    stride_ub, stride_ud, stride_db, stride_dd, stride_zb, stride_zd, stride_n, length,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, STATES: tl.constexpr, STATE_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (GROUP + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    block = pid % blocks
    group = (pid // blocks) % GROUPS
    image = (pid // (blocks * GROUPS)).to(tl.int64)
    line = image * GROUPS + group

    within = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = within < GROUP
    d = (group * GROUP + within).to(tl.int64)
    n = tl.arange(0, STATE_BLOCK)
    some = (n < STATES)[:, None] & inside[None, :]
    if STATES == 1:
        decay_rate = tl.load(A + d, mask=inside, other=0.0)
        h = tl.zeros([CHANNELS], tl.float32)
    else:
        decay_rate = tl.load(A + d[None, :] + n[:, None] * stride_n, mask=some, other=0.0)
        h = tl.zeros([STATE_BLOCK, CHANNELS], tl.float32)
    skip = 0.0 if D is None else tl.load(D + d, mask=inside, other=0.0)
    shift = 0.0 if bias is None else tl.load(bias + d, mask=inside, other=0.0) * LOG2_E
    steps = tl.arange(0, TILE)
    u += image * stride_ub + d[:, None] * stride_ud + steps[None, :]
    delta += image * stride_db + d[:, None] * stride_dd + steps[None, :]
    row = (image * GROUPS * GROUP + d) * length
    y += row[:, None] + steps[None, :]
    if z is not None:
        z += image * stride_zb + d[:, None] * stride_zd + steps[None, :]
    if ungated is not None:
        ungated += row[:, None] + steps[None, :]
    B += line * length * STATES
    C += line * length * STATES
    if KEEP > 0:
        states += line * tl.cdiv(length, KEEP * TILE) * STATES * GROUP + within

    for first in range(0, length, TILE):
        if KEEP > 0:
            if first % (KEEP * TILE) == 0:
                if STATES == 1:
                    tl.store(states, h, mask=inside)
                else:
                    tl.store(states[None, :] + n[:, None] * GROUP, h, mask=some)
                states += STATES * GROUP
        mask = inside[:, None] & (first + steps < length)[None, :]
        values = rows_of(tl.load(u, mask=mask, other=0.0), TILE, CHANNELS)
        vs = rows_of(tl.load(delta, mask=mask, other=0.0), TILE, CHANNELS)
        outs = ()
        for j in tl.static_range(TILE):
            step = vs[j].to(tl.float32) * LOG2_E + shift
            if SOFTPLUS:
                step = softplus_log2(step, EXACT)
            if WHOLE:
                source = first + j
            else:
                step = tl.where(first + j < length, step, 0.0)  # the last state stays as it is
                source = tl.minimum(first + j, length - 1)
            value = values[j].to(tl.float32)
            if STATES == 1:
                b = tl.load(B + source).to(tl.float32) * LN_2
                c = tl.load(C + source).to(tl.float32)
                h = tl.exp2(step * decay_rate) * h + (step * value) * b
                out = h * c
            else:
                b = tl.load(B + source * STATES + n, mask=n < STATES, other=0.0).to(tl.float32) * LN_2
                c = tl.load(C + source * STATES + n, mask=n < STATES, other=0.0).to(tl.float32)
                h = tl.exp2(step[None, :] * decay_rate) * h + (step * value)[None, :] * b[:, None]
                out = tl.sum(h * c[:, None], 0)
            outs = outs + (out + skip * value,)
        out = tile_of(outs, 0, 1, TILE, CHANNELS)
        if z is not None:
            if ungated is not None:
                tl.store(ungated, out.to(ungated.dtype.element_ty), mask=mask)
                ungated += TILE
            gate = tl.load(z, mask=mask, other=0.0).to(tl.float32)
            out *= gate / (1.0 + tl.exp2(-gate * LOG2_E))
            z += TILE
        tl.store(y, out.to(y.dtype.element_ty), mask=mask)
        u += TILE
        delta += TILE
        y += TILE
    if STATES == 1:
        tl.store(last + image * GROUPS * GROUP + d, h, mask=inside)
    else:
        tl.store(last + ((image * GROUPS * GROUP + d) * STATES)[None, :] + n[:, None], h, mask=some)


def _time_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def empty_saved(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output before the gate, if there is one, and the states between chunks of steps."""
    batch, dim, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    kept = ceil_div(length, _TILE * scan_2d.tiles_per_state(states))
    ungated = u.new_empty(u.shape if z is not None else 0)
    return ungated, u.new_empty(batch, groups, kept, states, dim // groups, dtype=torch.float32)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `vision_ssm.ops.selective_scan`. Returns y, the last state and, if `save`, what `empty_saved` allocates."""
    batch, dim, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    y = u.new_empty(u.shape)
    last = u.new_empty(batch, dim, states, dtype=torch.float32)
    ungated, kept = empty_saved(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save) if save else (None, None)
    group = dim // groups
    grid = batch * groups * ceil_div(group, _CHANNELS)
    if grid:
        u, delta = _time_last(u), _time_last(delta)
        z = None if z is None else _time_last(z)
        launch(
            _forward_kernel, (grid,),
            u, delta, _float32(A.t()), B.transpose(2, 3).contiguous(), C.transpose(2, 3).contiguous(), _float32(D), z,
            _float32(delta_bias), y, None if z is None else ungated, last, kept,
            *u.stride()[:2], *delta.stride()[:2], *((0, 0) if z is None else z.stride()[:2]), dim, length,
            GROUPS=groups, GROUP=group, STATES=states, STATE_BLOCK=power_of_2(states), CHANNELS=_CHANNELS, TILE=_TILE,
            WHOLE=length % _TILE == 0, SOFTPLUS=delta_softplus, EXACT=u.dtype == torch.float32,
            KEEP=scan_2d.tiles_per_state(states) if save else 0, num_warps=1,
        )  # fmt: skip
    return (y, last, ungated, kept) if save else (y, last)


@functools.lru_cache(maxsize=32)
def _route(groups: int, length: int, device: torch.device) -> Tensor:
    """Every group walks its sequence from the start; kept, so that what is planned for it is kept too."""
    with torch.inference_mode(False):
        return torch.arange(length, device=device).repeat(groups, 1)


def backward(
    grad_y: Tensor, grad_last: Tensor, ungated: Tensor, states: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, save: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of all floating-point inputs that are given, by name; empty gradients of outputs stand for zeros."""
    if not grad_y.numel():
        grad_y = u.new_zeros(u.shape)
    if not save:  # forward kept nothing
        _, _, ungated, states = forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    groups = B.shape[1]
    grads: dict[str, Tensor] = {}
    if z is not None:
        gate, wide = z.float(), grad_y.float()
        slope = torch.sigmoid(gate)
        grads["z"] = wide * ungated * (slope * (1 + gate * (1 - slope)))
        grad_y = (wide * (gate * slope)).to(u.dtype)

    def channels_last(tensor: Tensor) -> Tensor:  # (batch, dim, L) -> (batch, L, G, dim / G)
        return tensor.unflatten(1, (groups, -1)).permute(0, 3, 1, 2).contiguous()

    def time_last(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1).flatten(1, 2)

    def by_group(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (groups, -1))

    call = scan_2d.Call(
        channels_last(u), channels_last(delta), A.unflatten(0, (groups, -1)),
        B.permute(0, 3, 1, 2).contiguous(), C.permute(0, 3, 1, 2).contiguous(), by_group(D),
        _route(groups, u.shape[2], u.device), None, None, by_group(delta_bias), delta_softplus, None,
    )  # fmt: skip
    end = None
    if grad_last.numel():
        end = grad_last.float().unflatten(1, (groups, -1)).transpose(2, 3).contiguous()  # (batch, G, N, dim / G)
    of_scan = scan_2d.scan_backward(call, channels_last(grad_y), states, end)
    grads["u"], grads["delta"] = time_last(of_scan["x"]), time_last(of_scan["delta"])
    grads["A"] = of_scan["A"].flatten(0, 1)
    grads["B"], grads["C"] = (of_scan[name].permute(0, 2, 3, 1) for name in ("B", "C"))
    for name, source in (("D", "D"), ("delta_bias", "dt_bias")):
        if source in of_scan:
            grads[name] = of_scan[source].flatten(0, 1)
    return grads

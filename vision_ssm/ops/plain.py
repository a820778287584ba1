"""Operators as few plain tensor functions, for graphs that must do without nodes of this library.

Each function here takes the arguments of an operator's schema and returns its outputs. Nothing is changed in place,
nothing is cut into blocks, no size is read but those that a graph may fix: the number of images stays free, the numbers
of steps, routes, channels and states do not. Routes are looked into while the graph is made, so it gathers and adds,
and never scatters. A recurrence of T steps takes some ``24 * log(T) / log(8)`` nodes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

from . import (
    torch_depthwise_conv,
    torch_hidden_state_mixer,
    torch_layer_norm,
    torch_noncausal_ssd,
    torch_state_fusion,
)
from .chunked import work_dtype
from .plain_plstm import plstm2d
from .torch_dcnv4 import _Options, _Points, _table

STEPS = 8  # of a chunk: fewer make more levels, more make longer ones


def _pad_steps(values: Tensor, before: int, behind: int, axis: int = -3) -> Tensor:
    """Zeros before and behind the steps, which lie along `axis`, counted from the last."""
    return F.pad(values, (0, 0) * (-axis - 1) + (before, behind))


def _states(exponents: Tensor, values: Tensor) -> Tensor:
    """``h[t] = exp(exponents[t]) * h[t-1] + values[t]`` from 0, for all steps t of axis -3.

    Chunks are stepped at once, from zero. Their last states are a recurrence of their own, of as many steps as there
    are chunks, and what enters a chunk decays by the exponential of a sum. `exponents` may be of size 1 where `values`
    are larger.
    """
    length = values.shape[-3]
    steps = min(length, STEPS)
    chunks = -(-length // steps)
    padding = chunks * steps - length
    exponents, values = (_pad_steps(part, 0, padding) if padding else part for part in (exponents, values))
    exponents, values = (part.unflatten(-3, (chunks, steps)) for part in (exponents, values))
    state, *others = values.unbind(-3)
    states = [state]
    for decay, value in zip(exponents.exp().unbind(-3)[1:], others):
        state = decay * state + value
        states.append(state)
    within = torch.stack(states, -3)
    if chunks > 1:
        reach = exponents.cumsum(-3)
        last = _states(reach[..., -1, :, :], state)
        within = within + reach.exp() * _pad_steps(last[..., :-1, :, :], 1, 0).unsqueeze(-3)
    states_of_all = within.flatten(-4, -3)
    return states_of_all[..., :length, :, :] if padding else states_of_all


def _selective(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, segment: int | None = None
) -> tuple[Tensor, Tensor]:
    """The selective scan of K sequences per image, which may start anew every `segment` steps.

    x, delta: (b, K, T, D); A: (K, D, N); B, C: (b, K, T, N); D: (K, D). Returns y like x, and the last states,
    (b, K, N, D), of a scan without segments.
    """
    exponents = delta.unsqueeze(3) * A.mT.unsqueeze(1)  # (b, K, T, N, D)
    values = (delta * x).unsqueeze(3) * B.unsqueeze(4)
    if segment is None:
        states = _states(exponents, values)
    else:
        exponents, values = (part.unflatten(2, (-1, segment)) for part in (exponents, values))
        states = _states(exponents, values).flatten(2, 3)
    y = (states * C.unsqueeze(4)).sum(3)
    return (y if D is None else y + D.unsqueeze(1) * x), states[:, :, -1]


def _widened(like: Tensor, *tensors: Tensor | None) -> list[Any]:
    work = work_dtype(like)
    return [None if tensor is None else tensor.to(work) for tensor in tensors]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    dtype, groups = u.dtype, B.shape[1]
    u, delta, A, B, C, D, z, delta_bias = _widened(u, u, delta, A, B, C, D, z, delta_bias)
    delta = delta if delta_bias is None else delta + delta_bias.unsqueeze(1)
    delta = F.softplus(delta) if delta_softplus else delta
    x, delta = (part.unflatten(1, (groups, -1)).mT for part in (u, delta))  # (b, G, L, d)
    A, D = (None if part is None else part.unflatten(0, (groups, -1)) for part in (A, D))
    y, last = _selective(x, delta, A, B.mT, C.mT, D)
    y = y.mT.flatten(1, 2)
    return (y if z is None else y * F.silu(z)).to(dtype), last.mT.flatten(1, 2)


def _walk(values: Tensor, read: Tensor) -> Tensor:
    """values (b, L, K, C), or (b, L, C) for all routes, at the steps of the routes: (b, K, T, C)."""
    if values.dim() == 4:
        read = read * len(read) + torch.arange(len(read), device=read.device).unsqueeze(1)
        values = values.flatten(1, 2)
    return values.index_select(1, read.flatten()).unflatten(1, tuple(read.shape))


def _visits(targets: Tensor, count: int) -> Tensor:
    """For each of `count` targets the places of `targets` that name it, then `len(targets)`, (most, count)."""
    order = targets.argsort(stable=True)
    found = targets[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(found, found)
    visits = order.new_full((int(rank.max()) + 1, count), len(order))
    return visits.index_put((rank, found), order)


def add_up(values: Tensor, write: Tensor, length: int, merge: bool) -> Tensor:
    """values (b, K, T, D) at the positions that they are written to: (b, L, D), or (b, L, K, D) if not `merge`."""
    count = write.shape[0]
    with disable_current_modes():
        if merge:
            visits = _visits(write.long().flatten(), length)
        else:
            route = torch.arange(count, device=write.device).unsqueeze(1)
            visits = _visits((write.long() * count + route).flatten(), length * count)
        never = bool((visits == write.numel()).any())
    values = values.flatten(1, 2)
    if never:
        values = _pad_steps(values, 0, 1, -2)
    total = values.index_select(1, visits.flatten()).unflatten(1, tuple(visits.shape)).sum(1)
    return total if merge else total.unflatten(1, (length, count))


def scan_2d(
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    delta_softplus: bool,
    segment: int | None,
    merge: bool,
    *_: Any,
) -> Tensor:
    dtype, length = x.dtype, x.shape[1]
    x, delta, A, B, C, D, dt_weight, dt_bias = _widened(x, x, delta, A, B, C, D, dt_weight, dt_bias)
    read, write = read.long(), read if write is None else write
    x, delta, B, C = (_walk(part, read) for part in (x, delta, B, C))
    y, _ = _selective(x, _step_sizes(delta, dt_weight, dt_bias, delta_softplus), A, B, C, D, segment)
    out = add_up(y, write, length, merge)
    if norm_weight is None:
        return out
    norm_weight, norm_bias = _widened(x, norm_weight, norm_bias)
    return F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias, norm_eps).to(dtype)


def _step_sizes(delta: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """delta (b, K, T, R or D) -> (b, K, T, D)."""
    delta = delta if dt_weight is None else delta @ dt_weight.mT
    delta = delta if dt_bias is None else delta + dt_bias.unsqueeze(1)
    return F.softplus(delta) if delta_softplus else delta


def local_selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    delta_softplus: bool,
    window: int,
    reverse: bool,
) -> Tensor:
    length = x.shape[1]
    x, delta, A, B, C, D, dt_weight, dt_bias = _widened(x, x, delta, A, B, C, D, dt_weight, dt_bias)
    x, delta, B, C = (part.transpose(1, 2) for part in (x, delta, B, C))  # (b, K, L, ...)
    delta = _step_sizes(delta, dt_weight, dt_bias, delta_softplus)
    parts = [part.flip(2) if reverse else part for part in (x, delta, B, C)]
    y, _ = _selective(parts[0], parts[1], A, parts[2], parts[3], D)
    if window > 1:
        ahead = [_turn_windows(F.pad(part, (0, 0, 0, -length % window)), window) for part in parts]
        seen, _ = _selective(ahead[0], ahead[1], A, ahead[2], ahead[3], None, window)
        x, delta, B, C = parts
        y = y + _turn_windows(seen, window)[:, :, :length] - (B * C).sum(-1, keepdim=True) * delta * x
    return (y.flip(2) if reverse else y).transpose(1, 2)


def _turn_windows(values: Tensor, window: int) -> Tensor:
    """(b, K, T, C) with the steps of every window in reverse."""
    return values.unflatten(2, (-1, window)).flip(3).flatten(2, 3)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """As `chunked_ssd`: c chunks of q steps, g groups of r heads of p channels, n states."""
    x, dt, A, B, C, D, dt_bias, initial_states = _widened(x, x, dt, A, B, C, D, dt_bias, initial_states)
    length, groups = x.shape[1], B.shape[2]
    chunk = min(chunk_size, length)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    padding = -length % chunk
    parts = (x, dt, B, C)
    padded, dt, B, C = (_pad_steps(part, 0, padding, 1 - part.dim()) if padding else part for part in parts)
    value = padded.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).permute(0, 3, 4, 1, 2, 5)  # (b, g, r, c, q, p)
    delta = dt.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).permute(0, 3, 4, 1, 2)  # (b, g, r, c, q)
    B, C = (part.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).unsqueeze(2) for part in (B, C))  # (b, g, 1, c, q, n)
    exponents = delta * A.view(groups, -1, 1, 1)
    entering = value * delta.unsqueeze(-1)
    since_start = exponents.cumsum(-1).unsqueeze(-1)  # (b, g, r, c, q, 1)
    # summed from each step on, see `chunked_ssd`; [j, i] is from step j to step i
    decays = exponents.unsqueeze(-2).expand(*exponents.shape[:-1], chunk, chunk).triu(1).cumsum(-1).exp().triu()
    added = (entering * decays[..., -1:]).mT @ B  # (b, g, r, c, p, n), what a chunk adds to the state at its end
    if initial_states is None:
        start = torch.zeros_like(added[:, :, :, :1])
    else:
        start = initial_states.unflatten(1, (groups, -1)).unsqueeze(3)
    totals = _pad_steps(since_start[..., -1:, :], 1, 0)
    states = _states(totals, torch.cat([start, added], 3))
    y = (C @ states[:, :, :, :-1].mT) * since_start.exp() + ((B @ C.mT) * decays).mT @ entering
    y = y.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(1, 2)[:, :length]  # (b, L, heads, p)
    return (y if D is None else y + D * x), states[:, :, :, -1].flatten(1, 2)


def dcnv4(value: Tensor, offset_mask: Tensor, *options: Any) -> Tensor:
    given = _Options(*options)
    points = _Points.locate(offset_mask.to(work_dtype(value)), 0, value.shape, given)
    weights = (points.weight.unsqueeze(-1) * points.shares).flatten(-2)  # (b, H', W', G, 4 P)
    entries = points.entries.flatten(-2)
    found = _table(value, given.groups).index_select(0, entries.flatten()).unflatten(0, entries.shape)
    return (weights.unsqueeze(-1) * found).sum(-2).flatten(-2).to(value.dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "selective_scan": selective_scan,
    "scan_2d": scan_2d,
    "local_selective_scan": local_selective_scan,
    "ssd": ssd,
    "dcnv4": dcnv4,
    "plstm2d": plstm2d,
    "noncausal_ssd": torch_noncausal_ssd.forward,
    "hidden_state_mixer": torch_hidden_state_mixer.forward,
    "layer_norm": torch_layer_norm.forward,
    "depthwise_conv": torch_depthwise_conv.forward,
    "state_fusion": torch_state_fusion.forward,
}
"""For `replaced_operators`."""

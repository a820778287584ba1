"""Floating-point operations of the operators.

The functions named ``*_shapes`` take the inputs of a registered operator with shapes in place of tensors; they are what
`torch.utils.flop_counter` calls.

Convention: `FlopCounterMode` counts 2 FLOPs per multiply-accumulate, and so does the expansion of step sizes here. The
scan itself is counted as the literature of vision state-space models does: 9 FLOPs per step, channel and state (the
exponential, its argument, the input term, the recurrence and the read-out), plus one per step and channel for the skip
connection and one for the gate. VMamba's published figures add this number to multiply-accumulates of the rest. A
backward pass counts twice its forward pass; recomputation is not counted.
"""

from typing import Any

_Shape = tuple[int, ...]


def selective_scan_flops(
    batch: int, length: int, dim: int, states: int, *, skip: bool = True, gate: bool = False
) -> int:
    """FLOPs of a selective scan of `batch` sequences of `length` steps with `dim` channels of `states` states each."""
    return batch * length * dim * (9 * states + skip + gate)


def local_selective_scan_flops(
    batch: int, length: int, dim: int, states: int, window: int, *, rank: int = 0, skip: bool = True
) -> int:
    """FLOPs of a scan that looks ahead in windows: a selective scan of all steps, and a second one if there are any.

    The step sizes, of rank `rank`, are counted once.
    """
    ahead = 0 if window == 1 else selective_scan_flops(batch, length, dim, states, skip=False)
    return selective_scan_flops(batch, length, dim, states, skip=skip) + ahead + 2 * batch * length * dim * rank


def scan_2d_flops(
    batch: int, steps: int, routes: int, dim: int, states: int, *, rank: int = 0, skip: bool = True
) -> int:
    """FLOPs of a scan along `routes` routes of `steps` steps, with the expansion of step sizes of rank `rank`."""
    scan = selective_scan_flops(batch, routes * steps, dim, states, skip=skip)
    return scan + 2 * batch * routes * steps * dim * rank


def ssd_flops(
    batch: int, length: int, heads: int, width: int, states: int, *, skip: bool = True, gate: bool = False
) -> int:
    """FLOPs of an SSD scan, as of the selective scan it computes: independent of how it is cut into chunks."""
    return selective_scan_flops(batch, length, heads * width, states, skip=skip, gate=gate)


def selective_scan_shapes(
    u: _Shape, delta: _Shape, A: _Shape, B: _Shape, C: _Shape, D: _Shape | None, z: _Shape | None, *_: Any
) -> int:
    batch, dim, length = u
    return selective_scan_flops(batch, length, dim, A[1], skip=D is not None, gate=z is not None)


def local_selective_scan_shapes(
    x: _Shape,
    delta: _Shape,
    A: _Shape,
    B: _Shape,
    C: _Shape,
    D: _Shape | None,
    dt_weight: _Shape | None,
    dt_bias: _Shape | None,
    delta_softplus: bool,
    window: int,
    *_: Any,
) -> int:
    batch, length, groups, dim = x
    rank = 0 if dt_weight is None else dt_weight[2]
    return local_selective_scan_flops(batch, length, groups * dim, A[2], window, rank=rank, skip=D is not None)


def scan_2d_shapes(
    x: _Shape,
    delta: _Shape,
    A: _Shape,
    B: _Shape,
    C: _Shape,
    D: _Shape | None,
    read: _Shape,
    write: _Shape | None,
    dt_weight: _Shape | None,
    *_: Any,
) -> int:
    rank = 0 if dt_weight is None else dt_weight[2]
    return scan_2d_flops(x[0], read[1], read[0], x[-1], A[2], rank=rank, skip=D is not None)


def ssd_shapes(x: _Shape, dt: _Shape, A: _Shape, B: _Shape, C: _Shape, D: _Shape | None, *_: Any) -> int:
    batch, length, heads, width = x
    return ssd_flops(batch, length, heads, width, B[3], skip=D is not None)


def noncausal_ssd_flops(batch: int, length: int, heads: int, width: int, states: int, *, skip: bool = True) -> int:
    """FLOPs of non-causal SSD: writing and reading are a matrix product each."""
    return batch * length * heads * width * (4 * states + skip)


def noncausal_ssd_shapes(x: _Shape, dt: _Shape, A: _Shape, B: _Shape, C: _Shape, D: _Shape | None, *_: Any) -> int:
    batch, length, heads, width = x
    return noncausal_ssd_flops(batch, length, heads, width, B[3], skip=D is not None)


def hidden_state_mixer_flops(batch: int, length: int, dim: int, states: int, inner: int) -> int:
    """FLOPs of a hidden state mixer: gathering and reading, and the two projections of the hidden states."""
    return batch * states * (4 * length * dim + 6 * dim * inner)


def hidden_state_mixer_shapes(
    x: _Shape, dt: _Shape, B: _Shape, C: _Shape, in_weight: _Shape, out_weight: _Shape, *_: Any
) -> int:
    batch, length, dim = x
    return hidden_state_mixer_flops(batch, length, dim, dt[2], out_weight[1])


def dcnv4_flops(elements: int, points: int) -> int:
    """FLOPs for `elements` outputs: 4 cells around each of `points` points; their shares serve many channels and are
    not counted."""
    return elements * points * 4 * 2


def dcnv4_shapes(value: _Shape, offset_mask: _Shape, groups: int, kernel_size: int, *options: Any) -> int:
    batch, rows, columns, _ = offset_mask
    remove_center = options[-1]
    return dcnv4_flops(batch * rows * columns * value[3], kernel_size**2 - remove_center)

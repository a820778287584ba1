"""Chunked selective scans in plain PyTorch: the path of every device without a kernel of its own.

The recurrence ``h[t] = a[t] * h[t-1] + b[t]`` of T steps is cut into chunks that are stepped at once. A first sweep
from zero gives the end state of every chunk; carrying those over the chunks gives every chunk its true start state,
and a second sweep in place turns b into h. That is exact, takes ``2 * steps + chunks`` small vectorised operations
instead of T, and needs no logarithm of a sum, so nothing overflows that a plain loop would not overflow.

Tensors of the core are step-major "rows": (B, K, S, M, D) with S steps per chunk and M = segments * chunks, so that
one step of all chunks touches whole rows of channels. States are an outermost axis and are processed in blocks.
The backward sweeps run the adjoint recurrence the other way; they recompute everything from the inputs.

Work is cut into blocks of images, routes and channels, and buffers are reused in place: on a CPU, fresh memory costs
about as much as the arithmetic on it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_LOG2_E = math.log2(math.e)
# Most elements of one buffer. Fewer cost more calls, more fall out of the caches and cost more fresh memory.
_FORWARD_ELEMENTS = 1 << 21
_BACKWARD_ELEMENTS = 1 << 21
_SOFTPLUS_LINEAR = 20.0  # softplus(v) is v above this, as in torch


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Scans compute in float32, whatever autocast says, and in float64 for float64 input."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Layout:
    """How `segments` independent sequences of `length` steps are cut into chunks of `steps` steps."""

    length: int
    segments: int
    steps: int

    @classmethod
    def choose(cls, length: int, segments: int = 1) -> "Layout":
        """The layout with the fewest operations: 2 * steps + length / steps is least at sqrt(length / 2)."""
        return cls(length, segments, max(1, round(math.sqrt(length / 2))))

    @property
    def chunks(self) -> int:
        return -(-self.length // self.steps)

    @property
    def columns(self) -> int:
        return self.segments * self.chunks

    @property
    def rows(self) -> int:
        return self.steps * self.columns

    @property
    def padding(self) -> int:
        return self.steps * self.chunks - self.length

    def zero_padding(self, rows: Tensor) -> None:
        """Zero the rows (B, K, S, M, ...) that belong to no step: with a step size of 0 they keep the state."""
        if self.padding:
            last = rows.unflatten(3, (self.segments, self.chunks)).select(4, self.chunks - 1)
            last[:, :, self.steps - self.padding :].zero_()

    def carries(self, columns: Tensor) -> Sequence[Tensor]:
        """(..., M, D) as one (..., segments, D) view per chunk."""
        return columns.unflatten(-2, (self.segments, self.chunks)).unbind(-2)


def _sweep(values: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """values[t] += decays[t] * values[t-1], in place, for t >= 1; decays[0] is not used."""
    for t in range(1, len(values)):
        torch.addcmul(values[t], decays[t], values[t - 1], out=values[t])


def _sweep_end(values: Sequence[Tensor], decays: Sequence[Tensor]) -> Tensor:
    """The last value that `_sweep` would leave, without changing anything."""
    end = values[0].clone()
    for t in range(1, len(values)):
        torch.addcmul(values[t], decays[t], end, out=end)
    return end


def _carry(starts: Sequence[Tensor], ends: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """starts[c] = ends[c-1] + decays[c-1] * starts[c-1] for c >= 1; starts[0] is given."""
    for c in range(1, len(starts)):
        torch.addcmul(ends[c - 1], decays[c - 1], starts[c - 1], out=starts[c])


def _per_state(rows: Tensor, block: slice) -> Tensor:
    """(B, K, S, M, N) -> (n, B, K, S, M, 1): the states of a block outermost."""
    return rows[..., block].movedim(-1, 0).unsqueeze(-1)


class _Scan:
    """One block of rows: x, delta (B, K, S, M, D); B, C (B, K, S, M, N); A (K, D, N); D (K, D) or None.

    Padded rows of delta are 0, so that they keep the state.
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, layout: Layout):
        self.x, self.delta, self.B, self.C, self.layout = x, delta, B, C, layout
        self.A = A.permute(2, 0, 1)[:, None, :, None, None]  # (N, 1, K, 1, 1, D)
        self.D = None if D is None else D[:, None, None]  # (K, 1, 1, D)

    @cached_property
    def delta_sum(self) -> Tensor:
        """Sum of the step sizes of each chunk, (B, K, M, D)."""
        return self.delta.sum(2)

    def state_blocks(self, elements: int) -> Iterator[slice]:
        count = self.A.shape[0]
        size = max(1, elements // max(1, self.x.numel()))
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def total_decay(self, block: slice) -> Tensor:
        """Decay over each whole chunk, (n, B, K, M, D). Kept finite, so that a state of 0 stays 0."""
        total = torch.exp2(self.delta_sum * (self.A[block].squeeze(3) * _LOG2_E))
        return total.clamp_(max=torch.finfo(total.dtype).max)

    def decay(self, block: slice, out: Tensor) -> Tensor:
        """Decay of each step, (n, B, K, S, M, D)."""
        return torch.mul(self.delta[None], self.A[block] * _LOG2_E, out=out).exp2_()

    def run(self, block: slice, values: Tensor, decay: Tensor, total: Tensor | None, start: Tensor) -> None:
        """Turn the inputs of every step, `values` (n, B, K, S, M, D), into states; `start` becomes the start states."""
        steps, decays = values.unbind(3), decay.unbind(3)
        starts = self.layout.carries(start)
        starts[0].zero_()
        if total is not None:
            _carry(starts, self.layout.carries(_sweep_end(steps, decays)), self.layout.carries(total))
        _sweep((start, *steps), (start, *decays))

    def run_adjoint(self, grad: Tensor, decay: Tensor, total: Tensor | None, last: Tensor | None) -> None:
        """Turn the gradients that each step's output gives its state, `grad`, into the states' whole gradients.

        `last` (n, B, K, segments, D) is the gradient of the last state.
        """
        steps, decays = grad.unbind(3)[::-1], decay.unbind(3)[::-1]
        enter = torch.zeros_like(steps[0])
        enters = self.layout.carries(enter)[::-1]
        if last is not None:
            enters[0].copy_(last)
        shifted = (enter, *decays[:-1])  # a gradient is decayed by the step it goes back through
        if total is not None:
            leaves = _sweep_end(steps, shifted).mul_(decays[-1])
            _carry(enters, self.layout.carries(leaves)[::-1], self.layout.carries(total)[::-1])
        steps[0].add_(enter)
        _sweep(steps, shifted)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Outputs (B, K, S, M, D) and last states (N, B, K, segments, D). Overwrites x and delta."""
        x, delta = self.x, self.delta
        y = torch.zeros_like(x) if self.D is None else x * self.D
        chunked = self.layout.chunks > 1
        if chunked:
            self.delta_sum  # before delta is overwritten
        entering = x.mul_(delta)
        last = []
        for block in self.state_blocks(_FORWARD_ELEMENTS):
            count = block.stop - block.start
            total = self.total_decay(block) if chunked else None
            if count == 1 and block.stop == self.A.shape[0]:  # the last state may use up its inputs
                decay, states = delta[None], entering[None]
            else:
                decay, states = (x.new_empty(count, *x.shape) for _ in range(2))
            self.decay(block, out=decay)
            torch.mul(entering[None], _per_state(self.B, block), out=states)
            self.run(block, states, decay, total, torch.empty_like(states.select(3, 0)))
            for state, weight in zip(states, _per_state(self.C, block)):
                y.addcmul_(state, weight)
            last.append(self.layout.carries(states.select(3, -1))[-1].clone())
        return y, torch.cat(last)

    def backward(self, grad_y: Tensor, grad_last: Tensor | None) -> dict[str, Tensor]:
        """Gradients of x, delta, A, B, C and D, by these names; `grad_y` is 0 in padded rows.

        Padded rows of the gradients of x, delta, B and C have no meaning.
        """
        x, delta = self.x, self.delta
        entering = delta * x
        grad_entering, grad_delta = torch.zeros_like(x), torch.zeros_like(x)
        grads = {"A": torch.empty_like(self.A[:, 0, :, 0, 0]), "B": torch.empty_like(self.B)}
        grads["C"] = torch.empty_like(self.C)
        for block in self.state_blocks(_BACKWARD_ELEMENTS):
            count = block.stop - block.start
            total = self.total_decay(block) if self.layout.chunks > 1 else None
            decay = self.decay(block, out=x.new_empty(count, *x.shape))
            states = x.new_empty(*decay.shape[:3], decay.shape[3] + 1, *decay.shape[4:])  # of the step before, and after
            before, after = states[:, :, :, :-1], states[:, :, :, 1:]
            torch.mul(entering, _per_state(self.B, block), out=after)
            self.run(block, after, decay, total, states.select(3, 0))
            grad = after * grad_y
            grads["C"][..., block] = grad.sum(-1).movedim(0, -1)
            torch.mul(grad_y, _per_state(self.C, block), out=grad)
            self.run_adjoint(grad, decay, total, None if grad_last is None else grad_last[block])
            exponent = decay.mul_(before).mul_(grad)  # gradient of delta * A
            grads["A"][block] = torch.mul(exponent, delta, out=after).sum((1, 3, 4))
            grads["B"][..., block] = torch.mul(grad, entering, out=after).sum(-1).movedim(0, -1)
            for i, weight in enumerate(_per_state(self.B, block)):
                grad_delta.addcmul_(exponent[i], self.A[block][i])
                grad_entering.addcmul_(grad[i], weight)
        grads["A"] = grads["A"].permute(1, 2, 0)  # (K, D, N)
        grads["delta"] = grad_delta.addcmul_(grad_entering, x)
        grads["x"] = grad_entering.mul_(delta)
        if self.D is not None:
            grads["D"] = (grad_y * x).sum((0, 2, 3))
            grads["x"].addcmul_(grad_y, self.D)
        return grads


def softplus_(values: Tensor) -> Tensor:
    """softplus in place, rounded as `F.softplus` does it; twice as fast where nothing is large."""
    if values.device.type == "cpu" and values.numel() and values.max() <= _SOFTPLUS_LINEAR:
        return values.exp_().log1p_()
    return values.copy_(F.softplus(values, threshold=_SOFTPLUS_LINEAR))


def softplus_backward(grad: Tensor, values: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward(grad, values, 1.0, _SOFTPLUS_LINEAR)


def _blocks(batch: int, groups: int, dim: int, rows: int, elements: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images, groups and channels with at most about `elements` elements each; channels innermost."""
    width = min(dim, max(1, elements // rows))
    count = min(groups, max(1, elements // (rows * width)))
    images = min(batch, max(1, elements // (rows * width * count)))
    for group in range(0, groups, count):
        for image in range(0, batch, images):
            for channel in range(0, dim, width):
                yield (
                    slice(image, min(image + images, batch)),
                    slice(group, min(group + count, groups)),
                    slice(channel, min(channel + width, dim)),
                )


# Selective scan of (batch, dim, L) sequences. Dimensions: b images, g groups that share B and C, d channels of a group.


class _Sequences:
    """Cuts the inputs of a selective scan into rows, block by block."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ):
        self.work, self.groups = work_dtype(u), B.shape[1]
        self.layout = Layout.choose(u.shape[2])
        self.u, self.delta, self.B, self.C = self.grouped(u), self.grouped(delta), B, C
        self.A, self.D, self.delta_bias = (self.parameter(value) for value in (A, D, delta_bias))
        self.delta_softplus = delta_softplus

    def grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (self.groups, -1))  # (b, g, d, L)

    def parameter(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(self.work).unflatten(0, (self.groups, -1))  # (g, d, ...)

    def blocks(self, elements: int) -> Iterator[tuple[slice, slice, slice]]:
        batch, groups, dim, _ = self.u.shape
        return _blocks(batch, groups, dim, self.layout.rows, elements)

    def to_rows(self, values: Tensor) -> Tensor:
        """(b, g, d, L) -> (b, g, S, M, d), contiguous, padded with zeros."""
        values = F.pad(values.to(self.work), (0, self.layout.padding))
        return values.unflatten(3, (self.layout.chunks, self.layout.steps)).permute(0, 1, 4, 3, 2).contiguous()

    def from_rows(self, rows: Tensor) -> Tensor:
        """(b, g, S, M, d) -> (b, g, d, L)."""
        return rows.permute(0, 1, 4, 3, 2).flatten(3)[..., : self.layout.length]

    def raw_delta(self, images: slice, groups: slice, channels: slice) -> Tensor:
        rows = self.to_rows(self.delta[images, groups, channels])
        return rows if self.delta_bias is None else rows.add_(self.delta_bias[groups, channels][:, None, None])

    def scan(self, images: slice, groups: slice, channels: slice) -> _Scan:
        delta = self.raw_delta(images, groups, channels)
        if self.delta_softplus:
            delta = softplus_(delta)
        if self.delta_softplus or self.delta_bias is not None:
            self.layout.zero_padding(delta)
        return _Scan(
            self.to_rows(self.u[images, groups, channels]),
            delta,
            self.A[groups, channels],
            self.to_rows(self.B[images, groups]),
            self.to_rows(self.C[images, groups]),
            None if self.D is None else self.D[groups, channels],
            self.layout,
        )


def selective_scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """u, delta (batch, dim, L); A (dim, N); B, C (batch, G, N, L); D, delta_bias (dim).

    Returns y (batch, dim, L) and the last state (batch, dim, N), both float32 (float64 for float64 u).
    """
    sequences = _Sequences(u, delta, A, B, C, D, delta_bias, delta_softplus)
    out = torch.empty_like(sequences.u, dtype=sequences.work, memory_format=torch.contiguous_format)
    last = out.new_empty(*out.shape[:3], A.shape[1])  # (b, g, d, N)
    for block in sequences.blocks(_FORWARD_ELEMENTS):
        y, states = sequences.scan(*block).forward()
        out[block] = sequences.from_rows(y)
        last[block] = states.squeeze(3).permute(1, 2, 3, 0)
    return out.flatten(1, 2), last.flatten(1, 2)


def selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u, delta, A, B, C, D, delta_bias, in the dtypes of these; None for those not given."""
    sequences = _Sequences(u, delta, A, B, C, D, delta_bias, delta_softplus)
    grad_y, grad_last = sequences.grouped(grad_y), sequences.grouped(grad_last)
    grad_u, grad_delta = torch.empty_like(sequences.u), torch.empty_like(sequences.delta)
    grad_A = torch.zeros_like(sequences.A)
    grad_B, grad_C = torch.zeros_like(B, dtype=sequences.work), torch.zeros_like(C, dtype=sequences.work)
    grad_D, grad_bias = (
        None if value is None else torch.zeros_like(value) for value in (sequences.D, sequences.delta_bias)
    )
    for block in sequences.blocks(_BACKWARD_ELEMENTS):
        images, groups, channels = block
        states = grad_last[block].to(sequences.work).permute(3, 0, 1, 2).unsqueeze(3)  # (N, b, g, 1, d)
        grads = sequences.scan(*block).backward(sequences.to_rows(grad_y[block]), states)
        if delta_softplus:
            grads["delta"] = softplus_backward(grads["delta"], sequences.raw_delta(*block))
        sequences.layout.zero_padding(grads["delta"])
        grad_u[block] = sequences.from_rows(grads["x"])
        grad_delta[block] = sequences.from_rows(grads["delta"])
        grad_A[groups, channels] += grads["A"]
        grad_B[images, groups] += sequences.from_rows(grads["B"])
        grad_C[images, groups] += sequences.from_rows(grads["C"])
        if grad_D is not None:
            grad_D[groups, channels] += grads["D"]
        if grad_bias is not None:
            grad_bias[groups, channels] += grads["delta"].sum((0, 2, 3))
    return (
        grad_u.flatten(1, 2),
        grad_delta.flatten(1, 2),
        grad_A.flatten(0, 1).to(A.dtype),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        None if D is None else grad_D.flatten().to(D.dtype),
        None if delta_bias is None else grad_bias.flatten().to(delta_bias.dtype),
    )


# Scan of a map along routes. The tables say which position each step reads and writes.


@dataclass(frozen=True)
class _Bags:
    """For every target, the rows that are added to it, in a fixed order: a sum without atomics."""

    rows: Tensor
    offsets: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """values (rows, width) -> (targets, width)."""
        return F.embedding_bag(self.rows, values, self.offsets, mode="sum", include_last_offset=True)


class _Plan:
    """Index tables of some routes: row order of `table` (K, T), and the way back to its positions."""

    def __init__(self, table: Tensor, length: int, layout: Layout):
        routes, steps = table.shape
        table = table.long()
        route = torch.arange(routes, device=table.device)[:, None]
        step = torch.arange(steps, device=table.device)
        chunk, inside = (step % layout.length) // layout.steps, (step % layout.length) % layout.steps
        column = (step // layout.length) * layout.chunks + chunk
        row = (route * layout.rows + inside * layout.columns + column).flatten()  # of step t of route k
        order = torch.zeros(routes * layout.rows, dtype=torch.long, device=table.device)
        self.positions = order.index_copy(0, row, table.flatten())  # padded rows read position 0
        self.pointwise = self.positions * routes + route.expand(-1, layout.rows).flatten()  # rows of (L * K, ...)
        targets = (table * routes + route).flatten()
        targets, sorting = torch.sort(targets, stable=True)
        bounds = torch.searchsorted(targets, torch.arange(length * routes + 1, device=table.device))
        self.by_route = _Bags(row[sorting], bounds)  # sums over the visits of one route, to (L * K, ...)
        self.merged = _Bags(row[sorting], bounds[::routes].contiguous())  # sums over all routes, to (L, ...)


_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _plan(table: Tensor, routes: slice, length: int, layout: Layout) -> _Plan:
    """The plan of `table[routes]`, remembered as long as the table lives and is not changed."""
    if table.is_inference():  # has no version by which a change could be seen
        return _Plan(_checked(table, length)[routes], length, layout)
    key = (table._version, routes.start, routes.stop, length, layout)
    plans = _PLANS.setdefault(table, {})
    if key not in plans:
        if any(version != table._version for version, *_ in plans):
            plans.clear()
        with torch.inference_mode(False):
            plans[key] = _Plan(_checked(table, length)[routes], length, layout)
    return plans[key]


def _checked(table: Tensor, length: int) -> Tensor:
    low, high = (int(value) for value in table.aminmax())
    if low < 0 or high >= length:
        raise IndexError(f"scan_2d: a route visits position {low if low < 0 else high}, but x has {length} positions")
    return table


class _Routes:
    """Gathers the inputs of a scan along routes into rows, block by block."""

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
        steps = read.shape[1]
        self.layout = Layout.choose(segment or steps, steps // (segment or steps))
        self.work = work_dtype(x)
        self.x, self.delta, self.A, self.B, self.C = (value.to(self.work) for value in (x, delta, A, B, C))
        self.D, self.dt_weight, self.dt_bias = (
            None if value is None else value.to(self.work) for value in (D, dt_weight, dt_bias)
        )
        self.read, self.write, self.delta_softplus = read, read if write is None else write, delta_softplus

    def blocks(self, elements: int) -> Iterator[tuple[slice, slice, slice]]:
        return _blocks(self.x.shape[0], self.read.shape[0], self.x.shape[2], self.layout.rows, elements)

    def plans(self, routes: slice) -> tuple[_Plan, _Plan]:
        """Plans of reading and of writing."""
        return tuple(_plan(table, routes, self.x.shape[1], self.layout) for table in (self.read, self.write))

    def rows(self, values: Tensor, index: Tensor, routes: int) -> Tensor:
        """values (b, L, ..., width) gathered to (b, routes, S, M, width)."""
        batch, width = values.shape[0], values.shape[-1]
        values = values.reshape(batch, -1, width)
        rows = values.new_empty(batch, index.numel(), width)
        for source, target in zip(values, rows):
            torch.index_select(source, 0, index, out=target)
        return rows.view(batch, routes, self.layout.steps, self.layout.columns, width)

    def low_rank(self, images: slice, routes: slice) -> Tensor:
        """Projections at the steps, (b, k, S * M, R)."""
        index = self.plans(routes)[0].pointwise
        return self.rows(self.delta[images, :, routes], index, routes.stop - routes.start).flatten(2, 3)

    def raw_delta(self, images: slice, routes: slice, channels: slice) -> Tensor:
        """(b, k, S, M, d), before softplus."""
        bias = None if self.dt_bias is None else self.dt_bias[routes, channels][:, None]  # (k, 1, d)
        if self.dt_weight is None:
            index = self.plans(routes)[0].pointwise
            delta = self.rows(self.delta[images, :, routes, channels], index, routes.stop - routes.start)
            return delta if bias is None else delta.add_(bias[:, None])
        low_rank = self.low_rank(images, routes)
        batch, count = low_rank.shape[:2]
        weight = self.dt_weight[routes, channels].mT.expand(batch, -1, -1, -1).flatten(0, 1)  # (b * k, R, d)
        if bias is None:
            delta = torch.bmm(low_rank.flatten(0, 1), weight)
        else:
            delta = torch.baddbmm(bias.expand(batch, -1, -1, -1).flatten(0, 1), low_rank.flatten(0, 1), weight)
        return delta.view(batch, count, self.layout.steps, self.layout.columns, -1)

    def scan(self, images: slice, routes: slice, channels: slice) -> _Scan:
        read, count = self.plans(routes)[0], routes.stop - routes.start
        delta = self.raw_delta(images, routes, channels)
        if self.delta_softplus:
            delta = softplus_(delta)
        self.layout.zero_padding(delta)
        return _Scan(
            self.rows(self.x[images, :, channels], read.positions, count),
            delta,
            self.A[routes, channels],
            self.rows(self.B[images, :, routes], read.pointwise, count),
            self.rows(self.C[images, :, routes], read.pointwise, count),
            None if self.D is None else self.D[routes, channels],
            self.layout,
        )


def scan_2d_forward(x: Tensor, *inputs: Any) -> Tensor:
    """Arguments of `_Routes`. Returns (B, L, D), float32 (float64 for float64 x)."""
    scan = _Routes(x, *inputs)
    out = scan.x.new_zeros(x.shape)
    for images, routes, channels in scan.blocks(_FORWARD_ELEMENTS):
        y = scan.scan(images, routes, channels).forward()[0]
        for target, rows in zip(out[images, :, channels], y):
            target.add_(scan.plans(routes)[1].merged.sum(rows.flatten(0, 2)))
    return out


def scan_2d_backward(grad_out: Tensor, x: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """Gradients of x, delta, A, B, C and, if given, D, dt_weight, dt_bias, by these names, in the dtype of the work."""
    scan = _Routes(x, *inputs)
    grad_out = grad_out.to(scan.work)
    given = {"A": scan.A, "D": scan.D, "dt_weight": scan.dt_weight, "dt_bias": scan.dt_bias}
    grads = {name: torch.zeros_like(value) for name, value in given.items() if value is not None}
    for name in ("x", "delta", "B", "C"):
        grads[name] = torch.zeros_like(getattr(scan, name), memory_format=torch.contiguous_format)
    for images, routes, channels in scan.blocks(_BACKWARD_ELEMENTS):
        read, write = scan.plans(routes)
        count = routes.stop - routes.start
        grad_y = scan.rows(grad_out[images, :, channels], write.positions, count)
        scan.layout.zero_padding(grad_y)
        part = scan.scan(images, routes, channels).backward(grad_y, None)
        if scan.delta_softplus:
            part["delta"] = softplus_backward(part["delta"], scan.raw_delta(images, routes, channels))
        scan.layout.zero_padding(part["delta"])
        grads["A"][routes, channels] += part["A"]
        if scan.D is not None:
            grads["D"][routes, channels] += part["D"]
        if scan.dt_bias is not None:
            grads["dt_bias"][routes, channels] += part["delta"].sum((0, 2, 3))
        if scan.dt_weight is not None:
            delta = part["delta"].flatten(2, 3)  # (b, k, S * M, d)
            grads["dt_weight"][routes, channels] += (delta.mT @ scan.low_rank(images, routes)).sum(0)
            part["delta"] = (delta @ scan.dt_weight[routes, channels]).view(*part["B"].shape[:-1], -1)
        for target, rows in zip(grads["x"][images, :, channels], part["x"]):
            target.add_(read.merged.sum(rows.flatten(0, 2)))
        for name in ("delta", "B", "C"):
            targets = grads[name][images, :, routes]
            if name == "delta" and scan.dt_weight is None:
                targets = targets[..., channels]
            for target, rows in zip(targets, part[name]):
                target.add_(read.by_route.sum(rows.flatten(0, 2)).view(target.shape))
    return grads

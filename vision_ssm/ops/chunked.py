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

import torch
from torch import Tensor

from .workspace import scratch

_LOG2_E = math.log2(math.e)
_ONE_CHUNK = 64  # steps up to which the carry over chunks costs more than it saves
_SOFTPLUS_LINEAR = 20.0  # softplus(v) is v above this, as in torch


def block_elements(device: torch.device) -> int:
    """Most elements of one buffer. Fewer cost more calls, more fall out of a CPU's caches and cost more memory."""
    return 1 << 21 if device.type == "cpu" else 1 << 24


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
        """One chunk for short sequences, else about sqrt(length) steps: few operations, no padding for square maps."""
        return cls(length, segments, length if length <= _ONE_CHUNK else math.ceil(math.sqrt(length)))

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


def sum_rows(rows: Tensor) -> Tensor:
    """(..., B, K, S, M, D) -> (..., K, D); in two steps, which is many times faster than in one."""
    return rows.flatten(-3, -2).sum(-2).sum(-3)


class RowScan:
    """One block of rows: x, delta (B, K, S, M, D); B, C (B, K, S, M, N); A (K, D, N); D (K, D) or None.

    Padded rows of delta are 0, so that they keep the state.
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, layout: Layout):
        self.x, self.delta, self.B, self.C, self.layout = x, delta, B, C, layout
        self.A = A.permute(2, 0, 1)[:, None, :, None, None]  # (N, 1, K, 1, 1, D)
        self.D = None if D is None else D[:, None, None]  # (K, 1, 1, D)
        self.delta_sum = delta.sum(2) if layout.chunks > 1 else None  # of each chunk, (B, K, M, D)

    def state_blocks(self) -> Iterator[slice]:
        """Slices of the N states."""
        count = self.A.shape[0]
        size = max(1, block_elements(self.x.device) // self.x.numel())
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def total_decay(self, block: slice) -> Tensor | None:
        """Decay over each whole chunk, (n, B, K, M, D), if there are several."""
        if self.delta_sum is None:
            return None
        return (self.delta_sum * (self.A[block].squeeze(3) * _LOG2_E)).exp2_()

    def decay(self, block: slice, out: Tensor) -> Tensor:
        """Decay of each step, (n, B, K, S, M, D)."""
        return torch.mul(self.delta[None], self.A[block] * _LOG2_E, out=out).exp2_()

    def run(self, values: Tensor, decay: Tensor, total: Tensor | None, start: Tensor) -> None:
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
        """Outputs (B, K, S, M, D), in scratch memory, and last states (N, B, K, segments, D).

        Overwrites x and delta.
        """
        x, delta = self.x, self.delta
        y = scratch("y", x.shape, x)
        if self.D is None:
            y.zero_()
        else:
            torch.mul(x, self.D, out=y)
        entering = x.mul_(delta)
        last = []
        for block in self.state_blocks():
            count = block.stop - block.start
            total = self.total_decay(block)
            if count == 1 and block.stop == self.A.shape[0]:  # the last state may use up its inputs
                decay, states = delta[None], entering[None]
            else:
                decay, states = (scratch(name, (count, *x.shape), x) for name in ("decay", "states"))
            self.decay(block, out=decay)
            torch.mul(entering[None], _per_state(self.B, block), out=states)
            self.run(states, decay, total, torch.empty_like(states.select(3, 0)))
            for state, weight in zip(states, _per_state(self.C, block)):
                y.addcmul_(state, weight)
            last.append(self.layout.carries(states.select(3, -1))[-1].clone())
        return y, torch.cat(last)

    def backward(self, grad_y: Tensor, grad_last: Tensor | None) -> dict[str, Tensor]:
        """Gradients of x, delta, A, B, C and D, by these names; `grad_y` is 0 in padded rows.

        Padded rows of the gradients of x, delta, B and C have no meaning; those of x and delta are in scratch memory.
        """
        x, delta = self.x, self.delta
        entering = torch.mul(delta, x, out=scratch("entering", x.shape, x))
        grad_entering, grad_delta = (scratch(name, x.shape, x) for name in ("grad_entering", "grad_delta"))
        grads = {"A": torch.empty_like(self.A[:, 0, :, 0, 0]), "B": torch.empty_like(self.B)}
        grads["C"] = torch.empty_like(self.C)
        for block in self.state_blocks():
            count = block.stop - block.start
            total = self.total_decay(block)
            decay = self.decay(block, out=scratch("decay", (count, *x.shape), x))
            shape = (*decay.shape[:3], decay.shape[3] + 1, *decay.shape[4:])
            states = scratch("states", shape, x)
            before, after = states[:, :, :, :-1], states[:, :, :, 1:]
            torch.mul(entering, _per_state(self.B, block), out=after)
            self.run(after, decay, total, states.select(3, 0))
            grad = torch.mul(after, grad_y, out=scratch("grad", decay.shape, x))
            grads["C"][..., block] = grad.sum(-1).movedim(0, -1)
            torch.mul(grad_y, _per_state(self.C, block), out=grad)
            self.run_adjoint(grad, decay, total, None if grad_last is None else grad_last[block])
            exponent = decay.mul_(before).mul_(grad)  # gradient of delta * A
            grads["A"][block] = sum_rows(torch.mul(exponent, delta, out=after))
            grads["B"][..., block] = torch.mul(grad, entering, out=after).sum(-1).movedim(0, -1)
            for i, weight in enumerate(_per_state(self.B, block)):
                if block.start + i == 0:
                    torch.mul(exponent[i], self.A[block][i], out=grad_delta)
                    torch.mul(grad[i], weight, out=grad_entering)
                else:
                    grad_delta.addcmul_(exponent[i], self.A[block][i])
                    grad_entering.addcmul_(grad[i], weight)
        grads["A"] = grads["A"].permute(1, 2, 0)  # (K, D, N)
        grads["delta"] = grad_delta.addcmul_(grad_entering, x)
        grads["x"] = grad_entering.mul_(delta)
        if self.D is not None:
            grads["D"] = sum_rows(torch.mul(grad_y, x, out=scratch("grad", x.shape, x)))
            grads["x"].addcmul_(grad_y, self.D)
        return grads


def softplus_(values: Tensor) -> Tensor:
    """softplus in place, rounded as `F.softplus` does it; faster where nothing is large."""
    if values.device.type == "cpu" and values.numel() and values.max() <= _SOFTPLUS_LINEAR:
        return values.exp_().log1p_()
    return torch.ops.aten.softplus.out(values, 1.0, _SOFTPLUS_LINEAR, out=values)


def softplus_backward_(grad: Tensor, values: Tensor) -> Tensor:
    """Turn `grad` from the gradient of softplus(values) into that of `values`, in place."""
    return torch.ops.aten.softplus_backward(grad, values, 1.0, _SOFTPLUS_LINEAR, grad_input=grad)


def cut_blocks(batch: int, groups: int, dim: int, rows: int, elements: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images, groups and channels of about `elements` elements; groups outermost, channels innermost."""
    width = min(dim, max(1, elements // rows))
    count = min(groups, max(1, elements // (rows * width)))
    images = max(1, elements // (rows * width * count))
    for group in range(0, groups, count):
        for image in range(0, batch, images):
            for channel in range(0, dim, width):
                yield (
                    slice(image, min(image + images, batch)),
                    slice(group, min(group + count, groups)),
                    slice(channel, min(channel + width, dim)),
                )

"""Chunked selective scan in plain PyTorch: the path of every device without a kernel of its own.

The recurrence ``h[t] = a[t] * h[t-1] + b[t]`` of T steps is cut into chunks that are stepped at once. A first sweep
from zero gives the end state of every chunk; carrying those over the chunks gives every chunk its true start state,
and a second sweep in place turns b into h. That is exact, takes ``2 * steps + chunks`` small vectorised operations
instead of T, and needs no logarithm of a sum, so nothing overflows that a plain loop would not overflow.

Tensors of the core are step-major "rows": (B, K, S, M, D) with S steps per chunk and M = segments * chunks, so that
one step of all chunks touches whole rows of channels. States are an outermost axis and are processed in blocks.
The backward sweeps run the adjoint recurrence the other way; they recompute everything from the inputs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Elements of the largest intermediate. Small enough to stay in a shared cache, large enough to hide call overhead.
_BLOCK_ELEMENTS = 1 << 21
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Layout:
    """How `segments` independent sequences of `length` steps are cut into chunks of `steps` steps."""

    length: int
    segments: int
    steps: int

    @classmethod
    def choose(cls, length: int, segments: int = 1) -> "Layout":
        if length * segments < 1:
            raise ValueError(f"a scan needs at least one step, got {length}")
        return cls(length, segments, max(1, min(length, round(math.sqrt(length / 2)))))

    @property
    def chunks(self) -> int:
        return -(-self.length // self.steps)

    @property
    def columns(self) -> int:
        return self.segments * self.chunks

    @property
    def padding(self) -> int:
        return self.steps * self.chunks - self.length

    def zero_padding(self, rows: Tensor) -> None:
        """Zero the rows (B, K, S, M, ...) that belong to no step: with a step size of 0 they keep the state."""
        if self.padding:
            last = rows.unflatten(3, (self.segments, self.chunks)).select(4, self.chunks - 1)
            last[:, :, self.steps - self.padding :].zero_()

    def carries(self, columns: Tensor) -> list[Tensor]:
        """(..., M, D) as one (..., segments, D) view per chunk."""
        return list(columns.unflatten(-2, (self.segments, self.chunks)).unbind(-2))


def _sweep(values: Sequence[Tensor], decays: Sequence[Tensor]) -> None:
    """values[t] += decays[t] * values[t-1], in place, for t >= 1."""
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
    """One block of rows of a selective scan: x, delta (B, K, S, M, D); B, C (B, K, S, M, N); A (K, D, N)."""

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, layout: Layout):
        self.x, self.delta, self.B, self.C, self.layout = x, delta, B, C, layout
        self.A = A.permute(2, 0, 1)[:, None, :, None, None]  # (N, 1, K, 1, 1, D)
        self.input = delta * x

    @cached_property
    def delta_sum(self) -> Tensor:
        return self.delta.sum(2)  # (B, K, M, D)

    def blocks(self) -> Iterator[slice]:
        count = self.A.shape[0]
        size = max(1, min(count, _BLOCK_ELEMENTS // max(1, self.x.numel())))
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))

    def total_decay(self, block: slice) -> Tensor:
        """Decay over each whole chunk, (n, B, K, M, D). Finite, so that a state of 0 stays 0."""
        total = torch.exp2(self.delta_sum * (self.A[block].squeeze(3) * _LOG2_E))
        return total.clamp_(max=torch.finfo(total.dtype).max)

    def states(self, block: slice) -> tuple[Tensor, Tensor]:
        """Decays a (n, B, K, S, M, D) and states h (n, B, K, S + 1, M, D); h[..., 0, :, :] enters the chunk."""
        layout = self.layout
        decay = (self.delta * (self.A[block] * _LOG2_E)).exp2_()
        shape = list(decay.shape)
        shape[3] += 1
        states = decay.new_empty(shape)
        torch.mul(self.input, _per_state(self.B, block), out=states[:, :, :, 1:])
        start, *values = states.unbind(3)
        decays = decay.unbind(3)
        if layout.chunks == 1:
            start.zero_()
        else:
            starts = layout.carries(start)
            starts[0].zero_()
            _carry(starts, layout.carries(_sweep_end(values, decays)), layout.carries(self.total_decay(block)))
        _sweep((start, *values), (decays[0], *decays))
        return decay, states

    def adjoint(self, block: slice, grad_y: Tensor, grad_last: Tensor | None, decay: Tensor) -> Tensor:
        """Gradient of every state, (n, B, K, S, M, D), given those of the outputs and of the last state."""
        layout = self.layout
        grad = grad_y * _per_state(self.C, block)
        values, decays = grad.unbind(3)[::-1], (None, *decay.unbind(3)[:0:-1])
        enter = torch.zeros_like(values[0])  # from the chunk that follows
        enters = layout.carries(enter)[::-1]
        if grad_last is not None:
            enters[0].copy_(grad_last[block].unsqueeze(-2))  # (n, B, K, 1, D)
        if layout.chunks > 1:
            ends = _sweep_end(values, decays) * decay.select(3, 0)
            _carry(enters, layout.carries(ends)[::-1], layout.carries(self.total_decay(block))[::-1])
        values[0].add_(enter)
        _sweep(values, decays)
        return grad

    def forward(self, D: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, K, S, M, D) and, for each segment, the last state (N, B, K, segments, D)."""
        y = torch.zeros_like(self.x) if D is None else self.x * D[:, None, None]
        last = []
        for block in self.blocks():
            states = self.states(block)[1]
            for state, weight in zip(states[:, :, :, 1:], _per_state(self.C, block)):
                y.addcmul_(state, weight)
            last.append(self.layout.carries(states.select(3, -1))[-1].clone())
        return y, torch.cat(last)

    def backward(self, D: Tensor | None, grad_y: Tensor, grad_last: Tensor | None) -> dict[str, Tensor]:
        """Gradients of x, delta, A, B, C and D, named so; padded rows of those of x, B and C are meaningless."""
        grad_input, grad_delta = torch.zeros_like(self.x), torch.zeros_like(self.x)
        grad_B, grad_C = torch.empty_like(self.B), torch.empty_like(self.C)
        grad_A = []
        for block in self.blocks():
            decay, states = self.states(block)
            grad = self.adjoint(block, grad_y, grad_last, decay)
            grad_C[..., block] = (states[:, :, :, 1:] * grad_y).sum(-1).movedim(0, -1)
            grad_B[..., block] = (grad * self.input).sum(-1).movedim(0, -1)
            decay.mul_(states[:, :, :, :-1]).mul_(grad)  # gradient of the exponent
            grad_A.append((decay * self.delta).sum((1, 3, 4)))  # (n, K, D)
            for exponent, A, state, weight in zip(decay, self.A[block], grad, _per_state(self.B, block)):
                grad_delta.addcmul_(exponent, A)
                grad_input.addcmul_(state, weight)
        grads = {"A": torch.cat(grad_A).permute(1, 2, 0), "B": grad_B, "C": grad_C}
        grads["delta"] = grad_delta.addcmul_(grad_input, self.x)
        grads["x"] = grad_input.mul_(self.delta)
        if D is not None:
            grads["D"] = (grad_y * self.x).sum((0, 2, 3))
            grads["x"].addcmul_(grad_y, D[:, None, None])
        return grads

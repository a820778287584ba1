"""Chunked SSD (Mamba-2) in plain PyTorch: matrix products inside chunks, a recurrence of states between them.

Within a chunk, y = (C B^T * decays) (delta x), where the decay between two steps is exp of the sum of the exponents
between them; across chunks, only the states at chunk ends are stepped. These sums are <= 0 for decaying heads, so
nothing overflows. Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6. The backward pass is written out
by hand and recomputes everything from the inputs.

Dimensions: b images, c chunks, q steps of a chunk, g groups sharing B and C, r heads of a group, p channels of a head,
n states.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked
from .chunked import softplus_, softplus_backward_, work_dtype


class _Heads:
    """The inputs of an SSD cut into chunks, and the states that enter each chunk."""

    def __init__(
        self,
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
    ):
        self.work, self.length, self.groups = work_dtype(x), x.shape[1], B.shape[2]
        self.chunk = min(chunk_size, self.length)
        self.x = self.chunks(x).unflatten(-2, (self.groups, -1)).transpose(2, 3)  # (b, c, g, q, r, p)
        self.B, self.C = (self.chunks(matrix).transpose(2, 3) for matrix in (B, C))  # (b, c, g, q, n)
        raw = dt.to(self.work)
        self.raw_delta = raw if dt_bias is None else raw + dt_bias.to(self.work)  # (b, L, heads)
        delta = softplus_(self.raw_delta.clone()) if dt_softplus else self.raw_delta
        delta = self.chunks(delta).unflatten(-1, (self.groups, -1)).movedim(2, -1)  # (b, c, g, r, q)
        self.A = A.to(self.work).view(self.groups, -1, 1)  # (g, r, 1)
        self.D = None if D is None else D.to(self.work).view(self.groups, 1, A.shape[0] // self.groups, -1)
        self.delta = delta
        self.exponents = delta * self.A
        since_start = torch.cumsum(self.exponents, dim=-1)
        until_end = torch.cumsum(F.pad(self.exponents[..., 1:], (0, 1)).flip(-1), dim=-1).flip(-1)
        self.decay_in, self.decay_out = (self.per_channel(torch.exp(sums)) for sums in (since_start, until_end))
        self.total = torch.exp(since_start[..., -1])[:, :, :, None, :, None]  # (b, c, g, 1, r, 1)
        self.input = self.x * self.per_channel(delta)
        states = self.B.mT @ (self.input * self.decay_out).flatten(-2)
        self.states = states.unflatten(-1, self.x.shape[-2:])  # (b, c, g, n, r, p): each chunk's own contribution
        start = torch.zeros_like(self.states[:, 0])
        if initial_states is not None:
            start.copy_(initial_states.unflatten(1, (self.groups, -1)).permute(0, 1, 4, 2, 3))
        self.final = self.carry(self.states.unbind(1), self.total.unbind(1), start)  # states now enter their chunk

    def chunks(self, values: Tensor) -> Tensor:
        """(b, L, ...) -> (b, c, q, ...), padded with zeros; a step size of 0 keeps the state."""
        padding = -self.length % self.chunk
        values = F.pad(values.to(self.work), (0, 0) * (values.dim() - 2) + (0, padding))
        return values.unflatten(1, (-1, self.chunk))

    def steps(self, values: Tensor) -> Tensor:
        """(b, c, q, ...) -> (b, L, ...)."""
        return values.flatten(1, 2)[:, : self.length]

    @staticmethod
    def per_channel(values: Tensor) -> Tensor:
        """(b, c, g, r, q) -> (b, c, g, q, r, 1)."""
        return values.mT.unsqueeze(-1)

    @staticmethod
    def carry(states: Sequence[Tensor], decays: Sequence[Tensor], start: Tensor) -> Tensor:
        """Replace what each chunk adds to the state by the state that enters it; returns what leaves the last one."""
        for added, decay in zip(states, decays):
            leaving = torch.addcmul(added, decay, start)
            added.copy_(start)
            start = leaving
        return start

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """Slices of images and chunks."""
        batch, chunks, groups, steps, heads, _ = self.x.shape
        count = max(1, chunked.block_elements(self.x.device) // (groups * heads * steps * steps))
        images = max(1, count // chunks)
        for image in range(0, batch, images):
            for chunk in range(0, chunks, count):
                yield slice(image, min(image + images, batch)), slice(chunk, min(chunk + count, chunks))

    def mixing(self, block: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        """B C^T (b, c, g, 1, q, q) and the decays from step j to step i >= j, else 0, (b, c, g, r, q, q); [j, i].

        The exponents are summed from each j on: differences of one cumulative sum would lose small decays that follow
        a large one.
        """
        exponents = self.exponents[block].unsqueeze(-2).expand(-1, -1, -1, -1, self.chunk, -1).triu(1)
        decays = torch.cumsum(exponents, dim=-1, out=exponents).exp_().triu_()
        return (self.B[block] @ self.C[block].mT).unsqueeze(3), decays


def forward(
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
    """x (B, L, heads, P); dt (B, L, heads); B, C (B, L, groups, N); D (heads, P or 1); states (B, heads, P, N).

    Returns y like x and the final states, both float32 (float64 for float64 x).
    """
    heads = _Heads(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size)
    y = (heads.C @ heads.states.flatten(-2)).view_as(heads.x).mul_(heads.decay_in)  # of the states that enter
    for block in heads.blocks():
        products, decays = heads.mixing(block)
        y[block] += (decays.mul_(products).mT @ heads.input[block].transpose(-3, -2)).transpose(-3, -2)
    if heads.D is not None:
        y.addcmul_(heads.x, heads.D)
    return heads.steps(y.transpose(2, 3)).flatten(2, 3), heads.final.permute(0, 1, 3, 4, 2).flatten(1, 2)


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
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
) -> dict[str, Tensor]:
    """Gradients of x, dt, A, B, C and, if given, D, dt_bias, initial_states, by these names, in the work's dtype."""
    heads = _Heads(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size)
    if not grad_y.numel():
        grad_y = x.new_zeros(x.shape, dtype=heads.work)
    if not grad_final.numel():
        grad_final = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=heads.work)
    grad_y = heads.chunks(grad_y).unflatten(-2, (heads.groups, -1)).transpose(2, 3)  # (b, c, g, q, r, p)
    grad_in = grad_y * heads.decay_in
    # What a chunk's outputs give its start state, and then, carried backwards, the gradient of its end state.
    adjoint = (heads.C.mT @ grad_in.flatten(-2)).unflatten(-1, heads.x.shape[-2:])  # (b, c, g, n, r, p)
    end = grad_final.to(heads.work).unflatten(1, (heads.groups, -1)).permute(0, 1, 4, 2, 3)
    grad_start = heads.carry(adjoint.unbind(1)[::-1], heads.total.unbind(1)[::-1], end)

    # Across chunks: the start state decays up to a step i, what a step j adds decays from there to the chunk's end.
    leaving = heads.input * heads.decay_out
    from_start = (heads.C @ heads.states.flatten(-2)).view(grad_in.shape)
    to_end = (heads.B @ adjoint.flatten(-2)).view(grad_in.shape)
    grad_C = grad_in.flatten(-2) @ heads.states.flatten(-2).mT
    grad_B = leaving.flatten(-2) @ adjoint.flatten(-2).mT
    grad_input = to_end * heads.decay_out
    ones = torch.ones(heads.chunk, heads.chunk, dtype=heads.work, device=x.device)
    upto, before = ones.tril(), ones.triu(1)  # [i, t] is 1 where t <= i, [j, t] where j < t
    grad_decay = (from_start.mul_(grad_in).sum(-1).mT @ upto).add_(to_end.mul_(leaving).sum(-1).mT @ before)
    grad_decay += ((heads.states * adjoint).sum((3, 5)) * heads.total.flatten(3)).unsqueeze(-1)  # (b, c, g, r, q)

    # Inside chunks: the decay of step t lies between j < t and i >= t.
    for block in heads.blocks():
        products, decays = heads.mixing(block)
        grad, value = grad_y[block].transpose(-3, -2), heads.input[block].transpose(-3, -2)  # (b, c, g, r, q, p)
        weights = value @ grad.mT
        shared = (weights * decays).sum(3)  # (b, c, g, q, q)
        grad_B[block] += shared @ heads.C[block]
        grad_C[block] += shared.mT @ heads.B[block]
        decays.mul_(products)
        grad_input[block] += (decays @ grad).transpose(-3, -2)
        grad_decay[block] += (before.mT @ weights.mul_(decays).triu_(1)).triu_().sum(-1)

    per_channel = heads.per_channel(heads.delta)
    grad_delta = (grad_input * heads.x).sum(-1).mT + grad_decay * heads.A  # (b, c, g, r, q)
    grad_delta = heads.steps(grad_delta.movedim(-1, 2)).flatten(2).contiguous()  # (b, L, heads)
    if dt_softplus:
        softplus_backward_(grad_delta, heads.raw_delta)
    grads = {"dt": grad_delta, "A": (grad_decay * heads.delta).sum((0, 1, 4)).flatten()}
    grads["B"], grads["C"] = (heads.steps(grad.transpose(2, 3)) for grad in (grad_B, grad_C))
    if heads.D is not None:
        grads["D"] = (grad_y * heads.x).sum((0, 1, 3)).sum_to_size(heads.D.squeeze(1).shape).flatten(0, 1)
    if dt_bias is not None:
        grads["dt_bias"] = grad_delta.sum((0, 1))
    if initial_states is not None:
        grads["initial_states"] = grad_start.permute(0, 1, 3, 4, 2).flatten(1, 2)
    grad_x = grad_input.mul_(per_channel)
    if heads.D is not None:
        grad_x.addcmul_(grad_y, heads.D)
    grads["x"] = heads.steps(grad_x.transpose(2, 3)).flatten(2, 3)
    return grads

"""Chunked selective scan of (batch, dim, L) sequences.

Dimensions: b images, g groups that share B and C, d channels of a group.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked
from .chunked import (
    Layout,
    RowScan,
    cut_blocks,
    softplus_,
    softplus_backward_,
    sum_rows,
    work_dtype,
)
from .workspace import scratch


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
        self.A = self.parameter(A)
        self.D, self.delta_bias = (None if value is None else self.parameter(value) for value in (D, delta_bias))
        self.delta_softplus = delta_softplus

    def grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (self.groups, -1))  # (b, g, d, L)

    def parameter(self, values: Tensor) -> Tensor:
        return values.to(self.work).unflatten(0, (self.groups, -1))  # (g, d, ...)

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        batch, groups, dim, _ = self.u.shape
        return cut_blocks(batch, groups, dim, self.layout.rows, chunked.block_elements(self.u.device))

    def to_rows(self, name: str, values: Tensor) -> Tensor:
        """(b, g, d, L) -> (b, g, S, M, d), padded with zeros, in scratch memory of that name."""
        layout, (batch, groups, dim, _) = self.layout, values.shape
        rows = scratch(name, (batch, groups, layout.steps, layout.chunks, dim), self.A)
        chunks = rows.permute(0, 1, 4, 3, 2)  # (b, g, d, M, S)
        whole = layout.chunks - bool(layout.padding)
        if whole:
            chunks[..., :whole, :] = values[..., : whole * layout.steps].unflatten(3, (whole, layout.steps))
        if layout.padding:
            chunks[..., whole, :] = F.pad(values[..., whole * layout.steps :], (0, layout.padding))
        return rows

    def from_rows(self, rows: Tensor) -> Tensor:
        """(b, g, S, M, d) -> (b, g, d, L)."""
        return rows.permute(0, 1, 4, 3, 2).flatten(3)[..., : self.layout.length]

    def raw_delta(self, name: str, images: slice, groups: slice, channels: slice) -> Tensor:
        """Step sizes before softplus, in scratch memory of that name."""
        rows = self.to_rows(name, self.delta[images, groups, channels])
        return rows if self.delta_bias is None else rows.add_(self.delta_bias[groups, channels][:, None, None])

    def scan(self, images: slice, groups: slice, channels: slice) -> RowScan:
        delta = self.raw_delta("delta", images, groups, channels)
        if self.delta_softplus:
            delta = softplus_(delta)
        if self.delta_softplus or self.delta_bias is not None:
            self.layout.zero_padding(delta)
        return RowScan(
            self.to_rows("x", self.u[images, groups, channels]),
            delta,
            self.A[groups, channels],
            self.to_rows("B", self.B[images, groups]),
            self.to_rows("C", self.C[images, groups]),
            None if self.D is None else self.D[groups, channels],
            self.layout,
        )


def empty_saved(u: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The output before the gate, if there is one; no states."""
    return u.new_empty(0 if inputs[5] is None else u.shape, dtype=work_dtype(u)), u.new_empty(0)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """u, delta, z (batch, dim, L); A (dim, N); B, C (batch, G, N, L); D, delta_bias (dim).

    Returns y (batch, dim, L) in the dtype of u, the last state (batch, dim, N) in float32 (float64 for float64 u) and,
    if `save`, what `empty_saved` allocates.
    """
    sequences = _Sequences(u, delta, A, B, C, D, delta_bias, delta_softplus)
    out = torch.empty_like(sequences.u, dtype=sequences.work, memory_format=torch.contiguous_format)
    last = out.new_empty(*out.shape[:3], A.shape[1])  # (b, g, d, N)
    for block in sequences.blocks():
        y, states = sequences.scan(*block).forward()
        out[block] = sequences.from_rows(y)
        last[block] = states.squeeze(3).permute(1, 2, 3, 0)
    y, last = out.flatten(1, 2), last.flatten(1, 2)
    gated = y if z is None else y * F.silu(z.to(y.dtype))
    saved = (y.new_empty(0) if z is None else y, u.new_empty(0)) if save else ()
    return (gated.to(u.dtype), last, *saved)


def backward(
    grad_y: Tensor,
    grad_last: Tensor,
    ungated: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save: bool,
) -> dict[str, Tensor]:
    """Gradients of all floating-point inputs that are given, by name, in the dtype of the work."""
    work, of_gate = work_dtype(u), {}
    grad_y = (grad_y if grad_y.numel() else grad_y.new_zeros(u.shape)).to(work)
    if not grad_last.numel():
        grad_last = u.new_zeros(*u.shape[:2], A.shape[1], dtype=work)
    if z is not None:
        if not save:  # forward kept nothing
            ungated = forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)[2]
        gate = z.to(work)
        of_gate["z"] = torch.ops.aten.silu_backward(grad_y * ungated, gate)
        grad_y = grad_y * F.silu(gate)
    sequences = _Sequences(u, delta, A, B, C, D, delta_bias, delta_softplus)
    grad_y, grad_last = sequences.grouped(grad_y), sequences.grouped(grad_last)
    given = {"A": sequences.A, "D": sequences.D, "delta_bias": sequences.delta_bias}
    given |= {"u": sequences.u, "delta": sequences.delta, "B": B, "C": C}
    grads = {
        name: torch.zeros_like(value, dtype=sequences.work, memory_format=torch.contiguous_format)
        for name, value in given.items()
        if value is not None
    }
    for block in sequences.blocks():
        images, groups, channels = block
        last = grad_last[block].to(sequences.work).permute(3, 0, 1, 2).unsqueeze(3)  # (N, b, g, 1, d)
        part = sequences.scan(*block).backward(sequences.to_rows("grad_y", grad_y[block]), last)
        if delta_softplus:
            softplus_backward_(part["delta"], sequences.raw_delta("entering", *block))
        sequences.layout.zero_padding(part["delta"])
        grads["u"][block] = sequences.from_rows(part["x"])
        grads["delta"][block] = sequences.from_rows(part["delta"])
        grads["A"][groups, channels] += part["A"]
        grads["B"][images, groups] += sequences.from_rows(part["B"])
        grads["C"][images, groups] += sequences.from_rows(part["C"])
        if D is not None:
            grads["D"][groups, channels] += part["D"]
        if delta_bias is not None:
            grads["delta_bias"][groups, channels] += sum_rows(part["delta"])
    for name in ("u", "delta"):
        grads[name] = grads[name].flatten(1, 2)
    for name in given.keys() & {"A", "D", "delta_bias"} & grads.keys():
        grads[name] = grads[name].flatten(0, 1)
    return grads | of_gate

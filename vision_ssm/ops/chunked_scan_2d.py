"""Chunked selective scan of a map along routes, merged.

Dimensions: b images, k routes, d channels, L positions of the map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .chunked import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    Layout,
    RowScan,
    cut_blocks,
    softplus_,
    softplus_backward,
    work_dtype,
)


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
        return cut_blocks(self.x.shape[0], self.read.shape[0], self.x.shape[2], self.layout.rows, elements)

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

    def scan(self, images: slice, routes: slice, channels: slice) -> RowScan:
        read, count = self.plans(routes)[0], routes.stop - routes.start
        delta = self.raw_delta(images, routes, channels)
        if self.delta_softplus:
            delta = softplus_(delta)
        self.layout.zero_padding(delta)
        return RowScan(
            self.rows(self.x[images, :, channels], read.positions, count),
            delta,
            self.A[routes, channels],
            self.rows(self.B[images, :, routes], read.pointwise, count),
            self.rows(self.C[images, :, routes], read.pointwise, count),
            None if self.D is None else self.D[routes, channels],
            self.layout,
        )


def forward(x: Tensor, *inputs: Any) -> Tensor:
    """Arguments of `_Routes`. Returns (B, L, D), float32 (float64 for float64 x)."""
    scan = _Routes(x, *inputs)
    out = scan.x.new_zeros(x.shape)
    for images, routes, channels in scan.blocks(FORWARD_ELEMENTS):
        y = scan.scan(images, routes, channels).forward()[0]
        for target, rows in zip(out[images, :, channels], y):
            target.add_(scan.plans(routes)[1].merged.sum(rows.flatten(0, 2)))
    return out


def backward(grad_out: Tensor, x: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """Gradients of x, delta, A, B, C and, if given, D, dt_weight, dt_bias, by these names, in the dtype of the work."""
    scan = _Routes(x, *inputs)
    grad_out = grad_out.to(scan.work)
    given = {"A": scan.A, "D": scan.D, "dt_weight": scan.dt_weight, "dt_bias": scan.dt_bias}
    grads = {name: torch.zeros_like(value) for name, value in given.items() if value is not None}
    for name in ("x", "delta", "B", "C"):
        grads[name] = torch.zeros_like(getattr(scan, name), memory_format=torch.contiguous_format)
    for images, routes, channels in scan.blocks(BACKWARD_ELEMENTS):
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

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


def _for_images(index: Tensor, images: int, stride: int) -> Tensor:
    """`index` for each of several images that lie `stride` rows apart."""
    if images == 1:
        return index
    first = torch.arange(0, images * stride, stride, device=index.device)
    return (first[:, None] + index).flatten()


@dataclass(frozen=True)
class _Bags:
    """For every target, the rows that are added to it, in a fixed order: a sum without atomics."""

    rows: Tensor
    offsets: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """values (b, k, S, M, width) -> (b, targets, width)."""
        images, width = values.shape[0], values.shape[-1]
        rows = _for_images(self.rows, images, values[0].numel() // width)
        offsets = _for_images(self.offsets[:-1], images, self.rows.numel())
        return F.embedding_bag(rows, values.flatten(0, 3), offsets, mode="sum").view(images, -1, width)


class _Plan:
    """Index tables of some routes: the positions in row order of `table` (K, T), and the way back."""

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
        self.pointwise = self.positions * routes + route.expand(-1, layout.rows).flatten()  # of the L * K projections
        targets, sorting = torch.sort((table * routes + route).flatten(), stable=True)
        bounds = torch.searchsorted(targets, torch.arange(length * routes + 1, device=table.device))
        self.by_route = _Bags(row[sorting], bounds)  # sums over the visits of one route, to L * K targets
        self.merged = _Bags(row[sorting], bounds[::routes].contiguous())  # sums over all routes, to L targets


_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _plan(table: Tensor, routes: slice, length: int, layout: Layout) -> _Plan:
    """The plan of `table[routes]`, remembered as long as the table lives and is not changed."""
    if table.is_inference():  # has no version by which a change could be seen
        return _Plan(_checked(table, length)[routes], length, layout)
    key = (table._version, routes.start, routes.stop, length, layout)
    plans = _PLANS.setdefault(table, {})
    if key not in plans:
        if any(version != table._version for version, *_ in list(plans)):
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
        merge: bool,
    ):
        steps = read.shape[1]
        self.layout = Layout.choose(segment or steps, steps // (segment or steps))
        self.work = work_dtype(x)
        self.x, self.delta, self.A, self.B, self.C = (value.to(self.work) for value in (x, delta, A, B, C))
        self.D, self.dt_weight, self.dt_bias = (
            None if value is None else value.to(self.work) for value in (D, dt_weight, dt_bias)
        )
        self.read, self.write, self.delta_softplus = read, read if write is None else write, delta_softplus
        self.shared, self.merge = x.dim() == 3, merge

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        batch, dim = self.x.shape[0], self.x.shape[-1]
        return cut_blocks(batch, self.read.shape[0], dim, self.layout.rows, chunked.block_elements(self.x.device))

    def plans(self, routes: slice) -> tuple[_Plan, _Plan]:
        """Plans of reading and of writing."""
        length = self.x.shape[1]
        return _plan(self.read, routes, length, self.layout), _plan(self.write, routes, length, self.layout)

    def rows(self, name: str, values: Tensor, index: Tensor) -> Tensor:
        """values (b, L, ..., width) gathered to (b, k, S, M, width), in scratch memory of that name."""
        images, width = values.shape[0], values.shape[-1]
        values = values.reshape(-1, width)
        rows = scratch(name, (images * index.numel(), width), values)
        torch.index_select(values, 0, _for_images(index, images, len(values) // images), out=rows)
        return rows.view(images, -1, self.layout.steps, self.layout.columns, width)

    def x_rows(self, images: slice, routes: slice, channels: slice) -> Tensor:
        """The map, or each route's own, at the steps: (b, k, S, M, d)."""
        plan = self.plans(routes)[0]
        if self.shared:
            return self.rows("x", self.x[images, :, channels], plan.positions)
        return self.rows("x", self.x[images, :, routes, channels], plan.pointwise)

    def low_rank(self, images: slice, routes: slice) -> Tensor:
        """Projections at the steps, (b, k, S * M, R)."""
        index = self.plans(routes)[0].pointwise
        return self.rows("low_rank", self.delta[images, :, routes], index).flatten(2, 3)

    def raw_delta(self, name: str, images: slice, routes: slice, channels: slice) -> Tensor:
        """Step sizes before softplus, (b, k, S, M, d), in scratch memory of that name."""
        bias = None if self.dt_bias is None else self.dt_bias[routes, channels].unsqueeze(1)  # (k, 1, d)
        if self.dt_weight is None:
            index = self.plans(routes)[0].pointwise
            delta = self.rows(name, self.delta[images, :, routes, channels], index)
            return delta if bias is None else delta.add_(bias.unsqueeze(1))
        low_rank = self.low_rank(images, routes).flatten(0, 1)  # (b * k, S * M, R)
        count = images.stop - images.start
        weight = self.dt_weight[routes, channels].mT.expand(count, -1, -1, -1).flatten(0, 1)  # (b * k, R, d)
        delta = scratch(name, (*low_rank.shape[:2], weight.shape[2]), low_rank)
        if bias is None:
            torch.bmm(low_rank, weight, out=delta)
        else:
            torch.baddbmm(bias.expand(count, -1, -1, -1).flatten(0, 1), low_rank, weight, out=delta)
        return delta.view(count, -1, self.layout.steps, self.layout.columns, weight.shape[2])

    def scan(self, images: slice, routes: slice, channels: slice) -> RowScan:
        read = self.plans(routes)[0]
        delta = self.raw_delta("delta", images, routes, channels)
        if self.delta_softplus:
            delta = softplus_(delta)
        self.layout.zero_padding(delta)
        return RowScan(
            self.x_rows(images, routes, channels),
            delta,
            self.A[routes, channels],
            self.rows("B", self.B[images, :, routes], read.pointwise),
            self.rows("C", self.C[images, :, routes], read.pointwise),
            None if self.D is None else self.D[routes, channels],
            self.layout,
        )


def empty_saved(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The sum before the norm, its mean and reciprocal deviation, both empty without a norm; no states."""
    read, norm_weight, merge = inputs[5], inputs[9], inputs[14]
    nothing = x.new_empty(0)
    if norm_weight is None:
        return nothing, nothing.clone(), nothing.clone()
    out = x.new_empty(output_shape(x, read, merge), dtype=work_dtype(x))
    return out, out.new_empty(*out.shape[:-1], 2), nothing


def output_shape(x: Tensor, read: Tensor, merge: bool) -> tuple[int, ...]:
    """(B, L, D), or (B, L, K, D) for routes that are kept apart."""
    return (*x.shape[:2], x.shape[-1]) if merge else (*x.shape[:2], read.shape[0], x.shape[-1])


def forward(x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Arguments of the operator. Returns the output and, where it is to be kept, what `empty_saved` allocates."""
    scan = _Routes(x, *inputs[:9], *inputs[12:15])
    norm_weight, norm_bias, norm_eps, save = *inputs[9:12], inputs[15]
    out = scan.x.new_empty(output_shape(x, scan.read, scan.merge))
    for images, routes, channels in scan.blocks():
        y = scan.scan(images, routes, channels).forward()[0]
        bags = scan.plans(routes)[1]
        if scan.merge:
            _collect(out[images, :, channels], bags.merged.sum(y), routes.start == 0)
        else:
            target = out[images, :, routes, channels]
            target.copy_(bags.by_route.sum(y).view(target.shape))
    if norm_weight is None:
        return (out, *(empty_saved(x, *inputs) if save else ()))
    bias = None if norm_bias is None else norm_bias.to(scan.work)
    normed, mean, scale = torch.native_layer_norm(out, out.shape[-1:], norm_weight.to(scan.work), bias, norm_eps)
    saved = (out, torch.cat([mean, scale], dim=-1), x.new_empty(0)) if save else ()
    return (normed.to(x.dtype), *saved)


def _collect(target: Tensor, part: Tensor, first: bool) -> None:
    if first:
        target.copy_(part)
    else:
        target.add_(part)


def backward(
    grad_out: Tensor, total: Tensor, statistics: Tensor, states: Tensor, x: Tensor, *inputs: Any
) -> dict[str, Tensor]:
    """Gradients of all floating-point inputs that are given, by name, in the dtype of the work."""
    scan = _Routes(x, *inputs[:9], *inputs[12:15])
    grad_out = grad_out.to(scan.work)
    norm_weight, norm_bias = inputs[9:11]
    given = {"A": scan.A, "D": scan.D, "dt_weight": scan.dt_weight, "dt_bias": scan.dt_bias}
    grads = {name: torch.zeros_like(value) for name, value in given.items() if value is not None}
    if norm_weight is not None:
        if not inputs[15]:  # forward kept nothing
            _, total, statistics, states = forward(x, *inputs[:15], True)
        mean, scale = (part.contiguous() for part in statistics.split(1, dim=-1))
        norm_weight, bias = norm_weight.to(scan.work), None if norm_bias is None else norm_bias.to(scan.work)
        grad_out, grads["norm_weight"], grads["norm_bias"] = torch.ops.aten.native_layer_norm_backward(
            grad_out, total, total.shape[-1:], mean, scale, norm_weight, bias, [True, True, bias is not None]
        )
    for name in ("x", "delta", "B", "C"):
        grads[name] = torch.empty_like(getattr(scan, name), memory_format=torch.contiguous_format)
    for images, routes, channels in scan.blocks():
        read, write = scan.plans(routes)
        if scan.merge:
            grad_y = scan.rows("grad_y", grad_out[images, :, channels], write.positions)
        else:
            grad_y = scan.rows("grad_y", grad_out[images, :, routes, channels], write.pointwise)
        scan.layout.zero_padding(grad_y)
        part = scan.scan(images, routes, channels).backward(grad_y, None)
        if scan.delta_softplus:
            softplus_backward_(part["delta"], scan.raw_delta("entering", images, routes, channels))
        scan.layout.zero_padding(part["delta"])
        grads["A"][routes, channels] += part["A"]
        if scan.D is not None:
            grads["D"][routes, channels] += part["D"]
        if scan.dt_bias is not None:
            grads["dt_bias"][routes, channels] += sum_rows(part["delta"])
        if scan.dt_weight is not None:
            # Narrow products, each in the order that is fast.
            delta, weight = part["delta"].flatten(2, 3), scan.dt_weight[routes, channels]  # (b, k, S * M, d), (k, d, R)
            grads["dt_weight"][routes, channels] += (scan.low_rank(images, routes).mT @ delta).sum(0).mT
            part["delta"] = (weight.mT @ delta.mT).mT.reshape(*part["B"].shape[:-1], -1)
        if scan.shared:
            _collect(grads["x"][images, :, channels], read.merged.sum(part["x"]), routes.start == 0)
        for name in ("delta", "B", "C", "x"):
            if name == "x" and scan.shared:
                continue
            target = grads[name][images, :, routes]
            by_channel = name == "x" or (name == "delta" and scan.dt_weight is None)
            target = target[..., channels] if by_channel else target
            first = by_channel or channels.start == 0
            _collect(target, read.by_route.sum(part[name]).view(target.shape), first)
    return grads

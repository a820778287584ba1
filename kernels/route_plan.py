"""Index tables of routes as the kernels want them, made once per table."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Bags:
    """The rows that are added up for every target, in a fixed order.

    Attributes:
        rows: (count) int32, rows of a buffer of steps, target after target.
        offsets: (targets + 1) int32, where the rows of each target begin; None: every target has `uniform` rows.
        uniform: number of rows of every target, or the number that most have.
    """

    rows: Tensor
    offsets: Tensor | None
    uniform: int


@dataclass(frozen=True)
class Plan:
    """A table (K, T) cut into segments and padded to whole tiles.

    Attributes:
        positions: (K, segments, padded) int32; padding repeats the last position.
        kept: the same with -1 in the padding.
        merged: rows of (K, segments, padded) by position, over all routes.
        by_route: the same by position and route, L * K targets.
        segments, steps, padded: sequences per route, their length, and that length rounded up to whole tiles.
    """

    positions: Tensor
    kept: Tensor
    merged: Bags
    by_route: Bags
    segments: int
    steps: int
    padded: int


def _bags(keys: Tensor, rows: Tensor, targets: int) -> Bags:
    ordered, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(targets + 1, device=keys.device))
    counts = offsets.diff()
    most = max(int(counts.max()), 1)
    whole = bool((counts == most).all())
    return Bags(rows[order].int(), None if whole else offsets.int(), most)


def _make(table: Tensor, segments: int, tile: int, length: int) -> Plan:
    low, high = (int(value) for value in table.aminmax())
    if low < 0 or high >= length:
        raise IndexError(f"scan_2d: a route visits position {low if low < 0 else high}, but x has {length} positions")
    routes, total = table.shape
    steps = total // segments
    padded = -(-steps // tile) * tile
    table = table.long().view(routes, segments, steps)
    positions = torch.cat([table, table[..., -1:].expand(-1, -1, padded - steps)], dim=-1)
    kept = torch.nn.functional.pad(table, (0, padded - steps), value=-1)
    row = torch.arange(routes * segments * padded, device=table.device).view_as(positions)[..., :steps].flatten()
    route = torch.arange(routes, device=table.device)[:, None, None]
    return Plan(
        positions.int().contiguous(),
        kept.int().contiguous(),
        _bags(table.flatten(), row, length),
        _bags((table * routes + route).flatten(), row, length * routes),
        segments,
        steps,
        padded,
    )


_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan(table: Tensor, segments: int, tile: int, length: int) -> Plan:
    """The plan of a table (K, T) of positions below `length`; remembered while the table lives and is not changed.

    Raises:
        IndexError: a position outside of [0, length).
    """
    if table.is_inference():  # has no version by which a change could be seen
        return _make(table, segments, tile, length)
    key = (table._version, segments, tile, length)
    plans = _PLANS.setdefault(table, {})
    if key not in plans:
        if any(version != table._version for version, *_ in plans):
            plans.clear()
        with torch.inference_mode(False):
            plans[key] = _make(table, segments, tile, length)
    return plans[key]

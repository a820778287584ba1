"""What there is to draw of a scan: its walks over the grid, or the wave in which its states spread."""

from dataclasses import dataclass

import torch
from torch import nn


class NoRouteError(ValueError):
    """A token mixer that visits its cells in no order; the message says what it does instead."""


@dataclass(frozen=True)
class Walk:
    """One sequence of cells.

    Attributes:
        title: name of the walk.
        height, width: of the grid; cell (row, column) has number ``row * width + column``.
        order: (T,) int64, the cell of each step. Numbers from ``height * width`` on are steps of padding.
        segment: the state starts anew every `segment` steps; None: one sequence of T steps.
    """

    title: str
    height: int
    width: int
    order: torch.Tensor
    segment: int | None = None


@dataclass(frozen=True)
class Wave:
    """States that spread over the edges of a directed grid: a cell is reached by paths, none of which is longer.

    Attributes:
        title: name of the wave.
        steps: (H, W) int64, length of the paths from where the wave starts to each cell.
        directions: the edges, as (rows, columns) from a cell to the next.
    """

    title: str
    steps: torch.Tensor
    directions: tuple[tuple[int, int], ...]


def raster_walk(height: int, width: int, reverse: bool = False) -> Walk:
    """The raster, or its reverse, as the walk of a mixer without a route family."""
    order = torch.arange(height * width)
    return Walk("backwards" if reverse else "forwards", height, width, order.flip(0) if reverse else order)


def walks_of(mixer: nn.Module, height: int, width: int) -> list[Walk | Wave]:
    """What a token mixer does on a map of `height` x `width` cells.

    That is the answer of its method ``walks(height, width)``, or else that of the routes of its ``core``.

    Raises:
        NoRouteError: it visits its cells in no order.
        ValueError: the map has no cell.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a route needs a grid of at least 1 x 1 cells, got {height} x {width}")
    routes = getattr(getattr(mixer, "core", None), "routes", None)
    walks = getattr(mixer, "walks", None) or getattr(routes, "walks", None)
    if walks is None:
        raise NoRouteError(f"{type(mixer).__name__} names no route")
    return walks(height, width)



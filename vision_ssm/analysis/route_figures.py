"""Pictures of the routes that families scan along."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..registry import suggest
from ..scans import build_routes, describe_routes, list_routes
from ..scans.windowed import DirectionRoutes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REVERSED_COLUMN = dict(type="reversed", of="column")


@dataclass(frozen=True)
class RouteFigure:
    """A picture of routes.

    Attributes:
        caption: what it shows, for readers who do not see it.
        spec: the routes, for `build_routes`, or what draws the picture for a grid.
        size: rows and columns of the grid.
    """

    caption: str
    spec: "str | dict | list | DirectionRoutes | Callable[[int, int], Figure]"
    size: tuple[int, int] = (6, 8)

    @property
    def description(self) -> str:
        """Caption, routes and grid: what changes when the picture does."""
        spec = self.spec.__name__ if callable(self.spec) else str(self.spec)
        return f"{self.caption}: {spec} on {self.size[0]} x {self.size[1]} cells"

    def draw(self) -> "Figure":
        """The picture."""
        if callable(self.spec):
            return self.spec(*self.size)
        return build_routes(self.spec).draw(*self.size)


def draw_orientations(height: int, width: int) -> "Figure":
    """The edges of a grid of nodes as the four orientations of pLSTM walk them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10 / 4 * height / width + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = ("as it is", "rows flipped", "columns flipped", "both flipped")
    for number, (axis, name) in enumerate(zip(figure.subplots(1, 4), names)):
        down, right = (-1 if number & 1 else 1), (-1 if number & 2 else 1)
        for row in range(height):
            for column in range(width):
                axis.plot(column, row, "o", color="#440154", markersize=5, zorder=3)
                for to_row, to_column, colour in ((row + down, column, "#1f6fb4"), (row, column + right, "#e3a60b")):
                    if 0 <= to_row < height and 0 <= to_column < width:
                        arrow = dict(arrowstyle="->", color=colour, lw=1.3, shrinkA=3, shrinkB=4)
                        axis.annotate("", xy=(to_column, to_row), xytext=(column, row), arrowprops=arrow)
        axis.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6), aspect="equal")
        axis.set_title(f"orientation {number}: {name}", fontsize=9)
        axis.set_axis_off()
    return figure


FIGURES: dict[str, RouteFigure] = {
    "bidirectional": RouteFigure("the raster and its reverse", dict(type="bidirectional", repeats=1)),
    "grid_edges": RouteFigure("edges of a grid in four orientations", draw_orientations, (4, 5)),
    "heads": RouteFigure(
        "snakes, diagonals, spirals and rasters, each there and back",
        ["snake_pair", "diagonal_pair", "spiral_pair", "raster_pair"],
    ),
    "raster_and_reverse": RouteFigure("the raster, and the raster from its end", ["raster", "reversed"]),
    "two_scales": RouteFigure(
        "the raster, the reversed raster, columns, and reversed columns",
        ["raster", "reversed", "column", _REVERSED_COLUMN],
    ),
    "windows": RouteFigure(
        "rows, columns, and windows of 2 x 2 and of 7 x 7 cells",
        DirectionRoutes(("raster", "column", "window2", "window7"), "exact"),
        (14, 14),
    ),
}
"""The pictures of the model cards that are not one family of routes as it is."""


def find_figure(key: str) -> RouteFigure:
    """A picture of `FIGURES`, or of a family of routes by its name; `KeyError` with suggestions if there is none."""
    if key in FIGURES:
        return FIGURES[key]
    if key not in list_routes():
        raise KeyError(f"unknown picture {key!r} of routes.{suggest(key, [*FIGURES, *list_routes()])}")
    return RouteFigure(describe_routes(key), key)


def figures_of(page: str) -> dict[str, RouteFigure]:
    """The pictures that a card asks for, ``<!-- figures NAME ... -->``, by name; none where it walks no route."""
    match = re.search(r"<!-- figures ([\w ]+) -->", page)
    return {key: find_figure(key) for key in match[1].split()} if match else {}

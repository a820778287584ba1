"""Still pictures of walks and waves. matplotlib is imported when something is drawn."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .walks import Walk, Wave

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST, LAST, CELL, INK = "#440154", "#e3a60b", "#c9ccd3", "#333333"
_MOST_COLUMNS = 4
_PANEL = 3.1  # inches
_MOST_NUMBERED = 16  # columns of a wave whose cells carry their numbers


def panel_grid(count: int) -> tuple[int, int]:
    """Rows and columns in which `count` panels are laid out."""
    columns = min(_MOST_COLUMNS, count)
    return math.ceil(count / columns), columns


def parts(walk: Walk) -> list[list[tuple[int, int, float]]]:
    """The walk as sequences of (column, row, place from 0 at its start to 1 at its end), one per start of the state.

    Steps of padding are left out.
    """
    order, cells = walk.order.tolist(), walk.height * walk.width
    length = walk.segment or len(order)
    sequences = []
    for start in range(0, len(order), length):
        steps = list(enumerate(order[start : start + length]))
        last = max(len(steps) - 1, 1)
        sequences.append([(cell % walk.width, cell // walk.width, t / last) for t, cell in steps if cell < cells])
    return [sequence for sequence in sequences if sequence]


def draw_walks(walks: Sequence[Walk | Wave], title: str) -> "Figure":
    """A matplotlib figure with one panel per walk, coloured from its first to its last step; thin lines are jumps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = panel_grid(len(walks))
    ratio = max(_size(walk)[0] / _size(walk)[1] for walk in walks)
    figure = Figure(figsize=(_PANEL * columns, _PANEL * rows * ratio + 1.0), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, walk in zip(axes.flat, walks):
        if isinstance(walk, Walk):
            _draw_walk(axis, walk)
        else:
            _draw_wave(axis, walk)
        height, width = _size(walk)
        axis.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7), aspect="equal")
        axis.set_title(walk.title, fontsize=9, color=INK)
    figure.suptitle(title, fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _size(walk: Walk | Wave) -> tuple[int, int]:
    if isinstance(walk, Walk):
        return walk.height, walk.width
    height, width = walk.steps.shape
    return height, width


def _draw_walk(axis: "Axes", walk: Walk) -> None:
    from matplotlib.collections import LineCollection

    pairs, places, starts, ends = [], [], [], []
    for sequence in parts(walk):
        starts.append(sequence[0][:2])
        ends.append(sequence[-1][:2])
        for (x0, y0, place), (x1, y1, _) in zip(sequence, sequence[1:]):
            pairs.append([(x0, y0), (x1, y1)])
            places.append(place)
    widths = [2.4 if abs(x1 - x0) + abs(y1 - y0) == 1 else 0.9 for (x0, y0), (x1, y1) in pairs]  # jumps are thin
    path = LineCollection(pairs, cmap="viridis", linewidths=widths, capstyle="round")
    path.set_array(places)
    path.set_clim(0, 1)
    axis.add_collection(path)
    cells = [(column, row) for row in range(walk.height) for column in range(walk.width)]  # a route may leave some out
    axis.scatter(*zip(*cells), s=14, color=CELL, zorder=2, linewidths=0)
    axis.scatter(*zip(*starts), s=46, color=FIRST, zorder=3, label="start")
    axis.scatter(*zip(*ends), s=46, color=LAST, marker="s", zorder=3, label="end")


def _draw_wave(axis: "Axes", wave: Wave) -> None:
    height, width = wave.steps.shape
    last = max(int(wave.steps.max()), 1)
    arrow = dict(arrowstyle="->", color=INK, linewidth=0.7, shrinkA=0, shrinkB=0)
    axis.imshow(wave.steps, cmap="viridis", alpha=0.55, vmin=0, vmax=last)
    for row in range(height):
        for column in range(width):
            for down, right in wave.directions:
                if 0 <= row + down < height and 0 <= column + right < width:
                    tail, head = ((column + share * right, row + share * down) for share in (0.28, 0.72))
                    axis.annotate("", head, tail, arrowprops=arrow)
            if width <= _MOST_NUMBERED:
                text = str(int(wave.steps[row, column]))
                axis.text(column, row, text, fontsize=7, ha="center", va="center", color=INK)

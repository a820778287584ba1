"""What the benchmarks print and write: tables for the terminal and for Markdown pages, JSON, a plot over image size."""

import datetime
import json
import math
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .benchmark import Measurement
from .benchmark_ops import QUANTITIES, OperatorMeasurement
from .sweep import Point
from .timing import Timing, describe_machine, describe_versions

if TYPE_CHECKING:
    import rich.table
    from matplotlib.axes import Axes

_PAGE_WIDTH = 120
_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
# blue and orange as in the pictures of a training run, then Okabe and Ito's and ink: told apart with any colour vision
_COLOURS = ("#1f6fb4", "#d9710f", "#009e73", "#cc79a7", "#56b4e9", "#8c510a", "#1f2933")
_MARKERS = "os^Dv<>PX"
_MOST_LABELLED_LINES = 6


@dataclass
class Run:
    """What the figures of one run depend on.

    Attributes:
        command: the command line.
        setting: what was timed how, in words.
        machine, versions: by name.
        date: ISO date.
        copy_bandwidth: bytes read and written per second by a large copy in the same run; None if not measured.
        remarks: anything else a reader should know.
    """

    command: str
    setting: str
    machine: dict[str, str]
    versions: dict[str, str]
    date: str
    copy_bandwidth: float | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tool: str, arguments: Sequence[str], setting: str, device: torch.device) -> "Run":
        """The run of `tool` with `arguments` on `device`, now."""
        command = f"python {tool} {shlex.join(arguments)}"
        today = datetime.date.today().isoformat()
        return cls(command, setting, describe_machine(device), describe_versions(), today)

    def sentences(self) -> list[str]:
        """The setting, the machine with its versions, and the remarks."""
        machine = self.machine | self.versions
        device = machine.pop("device")
        facts = ", ".join(f"{key} {value}" for key, value in machine.items())
        copied = []
        if self.copy_bandwidth is not None:
            copied = [f"Copy ceiling of this run: {self.copy_bandwidth / 1e9:.0f} GB/s read and written."]
        return [f"{self.setting}.", f"{device}; {facts}; {self.date}.", *copied, *self.remarks]


@dataclass
class Table:
    """Cells as text. The first `left` columns are words, the others numbers."""

    headings: list[str]
    rows: list[list[str]]
    left: int = 1

    def markdown(self) -> str:
        """The table as lines of Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def rich(self, title: str) -> "rich.table.Table":
        """The table for the terminal."""
        import rich.box
        import rich.table

        table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def milliseconds(seconds: float) -> str:
    """Seconds as ms, with at least three significant digits and one decimal."""
    value = 1000 * seconds
    return f"{value:.1f}" if value >= 100 else _significant(value)


def _significant(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


def _timing(timing: Timing | None, note: str = "-") -> str:
    if timing is None:
        return note
    spread = f"{milliseconds(timing.lower)} - {milliseconds(timing.upper)}"
    return f"{milliseconds(timing.median)} ({spread})"


def _memory(size: int | None, unit: int, digits: int) -> str:
    return "-" if size is None else f"{size / unit:.{digits}f}"


def model_table(rows: Sequence[Measurement]) -> Table:
    """One line per model, with the time over that of the last model and, where it was looked for, the slowest line."""
    headings = [
        "model", "scan backend", "parameters", "median ms (quartiles)", "images/s", "peak GiB", "ratio",
    ]  # fmt: skip
    profiled = any(row.slowest for row in rows)
    cells = []
    last = rows[-1].median
    for row in rows:
        line = [row.name, row.backend, f"{row.parameters / 1e6:.1f} M"]
        if row.median is None or row.lower is None or row.upper is None:
            cells.append([*line, row.note, "-", "-", "-", *["-"] * profiled])
            continue
        cells.append([
            *line,
            _timing(Timing(row.median, row.lower, row.upper)),
            f"{row.images_per_second:.1f}",
            _memory(row.peak_memory, 2**30, 2),
            "-" if last is None else f"{row.median / last:.2f}",
            *[row.slowest or "-"] * profiled,
        ])  # fmt: skip
    return Table(headings + ["slowest line"] * profiled, cells, left=2)


def operator_table(rows: Sequence[OperatorMeasurement]) -> Table:
    """One line per operator and implementation. Rates of several passes stand in the order of the columns of times."""
    quantities = [quantity for quantity in QUANTITIES if any(quantity in row.times for row in rows)] or ["forward"]
    columns = [f"{quantity} ms (quartiles)" for quantity in quantities]
    headings = ["case", "shape", "implementation", "backend", *columns, "floor GB/s", "% of copy", "Gexp/s", "peak MiB"]
    cells = []
    for row in rows:
        times = [_timing(row.times.get(quantity)) for quantity in quantities]
        if row.note:
            times[0] = row.note
        timed = [quantity for quantity in quantities if quantity in row.times]
        bandwidth = " / ".join(_significant(row.bandwidth[quantity] / 1e9) for quantity in timed)
        share = " / ".join(_significant(100 * row.copy_share[quantity]) for quantity in timed)
        forward = row.times.get("forward")
        exponentials = "-" if forward is None else _significant(row.exponentials / forward.median / 1e9)
        rates = [bandwidth or "-", share or "-", exponentials, _memory(row.peak_memory, 2**20, 0)]
        cells.append([row.case, row.shape, row.implementation, row.backend, *times, *rates])
    return Table(headings, cells, left=4)


def sweep_table(points: Sequence[Point]) -> Table:
    """One line per image size, with a time per image for every contender."""
    labels = list(dict.fromkeys(point.label for point in points))
    with_memory = any(point.peak_memory is not None for point in points)
    headings = ["size", "batch"]
    for label in labels:
        headings += [f"{label} ms/image", *([f"{label} peak GiB"] if with_memory else [])]
    cells = []
    for size in dict.fromkeys(point.size for point in points):
        at = {point.label: point for point in points if point.size == size}
        line = [str(size), str(next(iter(at.values())).batch)]
        for label in labels:
            point = at[label]
            line.append(point.note if point.per_image is None else milliseconds(point.per_image))
            if with_memory:
                line.append(_memory(point.peak_memory, 2**30, 2))
        cells.append(line)
    return Table(headings, cells, left=0)


def write_json(path: str | Path, run: Run, rows: Iterable[Any]) -> None:
    """Everything about a run and every figure (seconds, bytes) as JSON."""
    page = asdict(run) | {"rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(page, indent=1) + "\n")


def append_markdown(path: str | Path, run: Run, table: Table) -> None:
    """Append command, circumstances and table to a page, which is begun if there is none."""
    path = Path(path)
    page = path.read_text() if path.exists() else f"# Speed on {run.machine['device'].split(': ', 1)[1]}\n"
    text = textwrap.fill(" ".join(run.sentences()), _PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)
    path.write_text(f"{page.rstrip()}\n\n    {run.command}\n\n{text}\n\n{table.markdown()}\n")


def plot_sweep(path: str | Path, points: Sequence[Point], title: str, subtitle: str = "") -> None:
    """Log-log picture of the time per image over the image's side, and of the memory per image where it is known.

    A dashed line shows the slope of a cost that grows as the number of pixels does.

    Args:
        path: picture to write; the ending says the format.
        points: of `sweep_models` or `sweep_operators`. Those without a time are named at the foot of the picture.
        title, subtitle: lines above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    memory = [(p.label, p.size, p.peak_memory / p.batch / 2**20) for p in points if p.peak_memory and not p.note]
    times = [(p.label, p.size, 1000 * p.per_image) for p in points if p.per_image is not None]
    labels = list(dict.fromkeys(point.label for point in points))
    panels = [("Time", "ms per image", times)] + ([("Peak memory", "MiB per image", memory)] if memory else [])
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(8.2 * len(panels), 5.4), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{subtitle}" if subtitle else title, x=0.012, ha="left", fontsize=11, color=_INK)
    sizes = sorted({point.size for point in points})
    for axes, (heading, unit, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _plot_panel(axes, heading, unit, values, labels, sizes)
    missing = [f"{point.label} at {point.size}: {point.note}" for point in points if point.note]
    if missing:
        text = textwrap.fill("Not shown: " + "; ".join(missing) + ".", 115 * len(panels))
        figure.supxlabel(text, x=0.012, ha="left", fontsize=8, color=_MUTED)
    figure.savefig(path, dpi=130)


def _plot_panel(
    axes: "Axes",
    heading: str,
    unit: str,
    values: Sequence[tuple[str, int, float]],
    labels: Sequence[str],
    sizes: Sequence[int],
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log")
    direct = len(labels) <= _MOST_LABELLED_LINES
    ends = []
    for index, label in enumerate(labels):
        line = sorted((size, value) for name, size, value in values if name == label)
        if not line:
            continue
        colour = _COLOURS[index % len(_COLOURS)]
        marker, dash = _MARKERS[index % len(_MARKERS)], "-" if index < len(_COLOURS) else "--"
        axes.plot(*zip(*line), color=colour, marker=marker, markersize=5, linewidth=1.8, linestyle=dash,
                  label=None if direct else label)  # fmt: skip
        ends.append((line[-1], label, colour))
    widen = (sizes[-1] / sizes[0]) ** 0.04 if len(sizes) > 1 else 1.1
    axes.set_xlim(sizes[0] / widen, sizes[-1] * widen)
    if values:
        low, high = min(value for *_, value in values), max(value for *_, value in values)
        axes.set_ylim(low / 1.6, high * 1.6)
        if len(sizes) > 1:
            start = low * 0.85
            end = min(sizes[-1], sizes[0] * math.sqrt(high * 1.3 / start))
            axes.plot([sizes[0], end], [start, start * (end / sizes[0]) ** 2], color=_MUTED, linewidth=1,
                      linestyle=(0, (4, 4)), label="in proportion to the pixels")  # fmt: skip
    axes.set_title(heading, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.set_xlabel("side of the square image, pixels", color=_MUTED, fontsize=9)
    axes.set_ylabel(unit, color=_MUTED, fontsize=9)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(FixedLocator(_readable(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    span = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 4 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=_MUTED)
    place = None if direct else (1.01, 1)  # a long legend stands beside the panel, not on the lines
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper left", bbox_to_anchor=place)
    if direct:
        _label_ends(axes, ends)


def _readable(sizes: Sequence[int]) -> list[int]:
    """The sizes that have room for a label: neighbours at least a ratio apart, first and last for certain."""
    if len(sizes) < 2:
        return list(sizes)
    ratio = (sizes[-1] / sizes[0]) ** (1 / 16)
    kept = [sizes[0]]
    for size in sizes[1:-1]:
        if size >= kept[-1] * ratio and size * ratio <= sizes[-1]:
            kept.append(size)
    return [*kept, sizes[-1]]


def _label_ends(axes: "Axes", ends: Sequence[tuple[tuple[int, float], str, str]]) -> None:
    """A name behind the last point of each line; names that would touch are moved apart, evenly up and down."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # of the panel, in points
    ordered = sorted(ends, key=lambda end: end[0][1])
    wanted = [(math.log(value) - low) / (high - low) * height for (_, value), *_ in ordered]
    for ((size, value), label, colour), want, place in zip(ordered, wanted, _apart(wanted, gap=15.0)):
        axes.annotate(label, (size, value), xytext=(9, place - want), textcoords="offset points", color=colour,
                      fontsize=9, va="center", annotation_clip=False,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1))  # fmt: skip


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising `places`, moved as little as possible so that neighbours are at least `gap` apart."""
    groups: list[tuple[float, int]] = []  # centre and number of names that touch
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (first, m), (second, n) = groups[-2:]
            groups[-2:] = [((m * first + n * second) / (m + n), m + n)]
    return [centre + gap * (index - (count - 1) / 2) for centre, count in groups for index in range(count)]

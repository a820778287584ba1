"""Several training runs in one picture, from the history.json that each has written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table

from .config import UsageError
from .figures import INK, MUTED, new_canvas, save, style
from .metrics import format_metric

HISTORY = "history.json"
# Colours that stay apart for the colour-blind (Okabe and Ito), then the same ones dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2933")
STYLES = ("solid", "dashed", "dotted")
MOST_RUNS = len(COLORS) * len(STYLES)
MAIN_METRICS = ("top1", "dice", "mIoU", "bbox_mAP", "AP")  # of each task
LOWER_IS_BETTER = ("cross_entropy", "loss", "hd95", "asd")


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: what the picture calls it.
        rows: one per epoch: ``epoch``, ``train_loss`` and, of epochs with a validation, ``val_METRIC``.
    """

    name: str
    rows: list[dict[str, float]]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of its validations, in the order in which they were recorded."""
        found = dict.fromkeys(key for row in self.rows for key in row if key.startswith("val_"))
        return [key.removeprefix("val_") for key in found]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Epochs that have a value, and the values."""
        known = [row for row in self.rows if key in row]
        return [row["epoch"] for row in known], [row[key] for row in known]


def read_runs(places: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Run]:
    """Histories of the runs in these work dirs.

    Args:
        places: work dirs, or their history.json.
        names: of the runs; by default the last parts of the paths that tell them apart.

    Raises:
        FileNotFoundError: no history.json.
        UsageError: a damaged one, another number of names, or too many runs.
    """
    if names is not None and len(names) != len(places):
        raise UsageError(f"--names needs one name per run: {len(places)} runs, {len(names)} names")
    if len(places) > MOST_RUNS:
        raise UsageError(f"{len(places)} runs are too many for one picture; at most {MOST_RUNS} can be told apart")
    files = [_history(Path(place)) for place in places]
    return [Run(name, _rows(file)) for name, file in zip(names or _short_names(files), files, strict=True)]


def _history(place: Path) -> Path:
    file = place / HISTORY if place.is_dir() else place
    if not file.is_file():
        reason = f"has no {HISTORY}" if place.is_dir() else "is no file and no folder"
        raise FileNotFoundError(f"{place} {reason}; name the work dir of a run that has been validated once")
    return file


def _rows(file: Path) -> list[dict[str, float]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{file} is damaged: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "epoch" in row for row in rows):
        raise UsageError(f"{file} is not the history of a run: a list of epochs is expected")
    return rows


def _short_names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ from each other."""
    folders = [file.resolve().parent.parts for file in files]
    for length in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-length:]) for parts in folders]
        if len(set(names)) == len(names):
            return names
    repeated = next(str(file) for number, file in enumerate(files) if file in files[:number])
    raise UsageError(f"{repeated} is given twice; --names tells runs of one folder apart")


def choose_metrics(runs: Sequence[Run], wanted: Sequence[str] | None = None) -> list[str]:
    """Metrics to draw: those wanted, or the main one on every set it was taken on, such as top1 and 384/top1.

    Raises:
        UsageError: a metric that no run has.
    """
    known = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    if wanted is None:
        bases = [metric.rsplit("/", 1)[-1] for metric in known]
        main = next((metric for metric in (*MAIN_METRICS, *bases) if metric in bases), None)
        return [metric for metric, base in zip(known, bases, strict=True) if base == main]
    if unknown := [metric for metric in wanted if metric not in known]:
        raise UsageError(f"no run has {', '.join(unknown)}; their validations have {', '.join(known) or 'nothing'}")
    return list(wanted)


def draw_runs(runs: Sequence[Run], metrics: Sequence[str], path: str | Path, title: str = "", dpi: int = 110) -> None:
    """A panel with the training loss of all runs over epochs (log scale where it spans decades) and one per metric."""
    panels = 1 + len(metrics)
    columns = min(panels, 3)
    lines = -(-panels // columns)
    beside = max(1, int(4.4 * columns * 12 / (max(len(run.name) for run in runs) + 6)))
    figure = new_canvas(4.4 * columns, 3.6 * lines + 0.25 * -(-len(runs) // beside) + 0.5 * bool(title))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    _draw_panel(axes[0], runs, "train_loss", "Training loss")
    losses = [value for run in runs for value in run.series("train_loss")[1] if value > 0]
    if losses and max(losses) > 20 * min(losses):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis, metric in zip(axes[1:], metrics, strict=False):
        _draw_panel(axis, runs, f"val_{metric}", f"Validation, {metric}", marker="o", markersize=3)
    for axis in axes[panels:]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(beside, len(runs)), frameon=False, fontsize=9,
                  labelcolor=INK)  # fmt: skip
    save(figure, path, dpi)


def _draw_panel(axes: Axes, runs: Sequence[Run], key: str, title: str, **options: object) -> None:
    style(axes, title)
    for number, run in enumerate(runs):
        look = dict(color=COLORS[number % len(COLORS)], linestyle=STYLES[number // len(COLORS)])
        epochs, values = run.series(key)
        point = dict(marker="o", markersize=3) if len(epochs) == 1 else {}  # no line goes through one
        axes.plot(epochs, values, label=run.name, linewidth=1.8, **{**point, **look, **options})  # type: ignore[arg-type]
    axes.set_xlabel("epoch", color=MUTED, fontsize=9)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> Table:
    """Epochs done, training loss of the last one, and each metric: of the last validation, and the best with its epoch
    (the highest; the lowest of losses and distances)."""
    table = Table("run", "epochs", "training loss", *metrics)
    for run in runs:
        cells = [run.name, f"{run.rows[-1]['epoch']:g}", f"{run.rows[-1].get('train_loss', float('nan')):.4g}"]
        for metric in metrics:
            epochs, values = run.series(f"val_{metric}")
            if not values:
                cells.append("-")
                continue
            lower = any(name in metric for name in LOWER_IS_BETTER)
            best = (min if lower else max)(range(len(values)), key=values.__getitem__)
            cells.append(f"{format_metric(values[-1])} (best {format_metric(values[best])}, epoch {epochs[best]:g})")
        table.add_row(*cells)
    return table

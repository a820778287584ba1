"""Pictures of a run: curves, confusion matrix, predictions. Drawn on matplotlib's Agg canvas, without a display."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageOps

from .metrics import Evaluation, Prediction, format_metric

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BLUE = "#1f6fb4"
ORANGE = "#d9710f"
GREEN = "#2f855a"
RED = "#c53030"
MOST_LABELLED_CLASSES = 40
MOST_NUMBERED_CLASSES = 20


def new_canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, title: str) -> None:
    """Title, grid and ticks as all pictures of runs have them."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=MUTED)


def save(figure: Figure, path: str | Path, dpi: int = 130) -> None:
    """Write a figure as png."""
    figure.savefig(path, dpi=dpi)


def _end_label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", color=color, fontsize=9, va="center")


@dataclass
class Curves:
    """Numbers of a run so far.

    Attributes:
        epochs: (n,) position of each training iteration, in epochs.
        loss, lr, top1: (n,) training loss, learning rate and training top-1 (%; NaN where not known).
        validation: rows with ``epoch`` and the metrics of each validation.
        metric: the metric of `validation` that is drawn.
    """

    epochs: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    top1: np.ndarray
    validation: list[dict[str, float]]
    metric: str = "top1"


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values at each place; NaN is left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)


def draw_curves(curves: Curves, path: str | Path, title: str) -> None:
    """Three panels over epochs: loss (log scale where it spans decades), accuracy, learning rate."""
    figure = new_canvas(13.5, 4.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    panels = figure.subplots(1, 3)
    count = len(curves.epochs)
    per_epoch = max(1, round(count / max(curves.epochs[-1], 1e-9))) if count else 1
    step = max(1, count // 4000)
    window = max(1, min(per_epoch, count))
    at = [row["epoch"] for row in curves.validation]

    style(panels[0], "Loss")
    panels[0].plot(curves.epochs[::step], curves.loss[::step], color=BLUE, alpha=0.2, linewidth=0.8)
    mean = smoothed(curves.loss, window)
    panels[0].plot(curves.epochs[::step], mean[::step], color=BLUE, linewidth=1.8, label="train, mean of an epoch")
    _end_label(panels[0], curves.epochs[-1], mean[-1], f"{mean[-1]:.3g}", BLUE)
    losses = [row["cross_entropy"] for row in curves.validation if "cross_entropy" in row]
    if losses:
        panels[0].plot(
            at, losses, color=ORANGE, linewidth=1.8, marker="o", markersize=3, label="validation, cross-entropy"
        )
        _end_label(panels[0], at[-1], losses[-1], f"{losses[-1]:.3g}", ORANGE)
    shown = np.concatenate([mean[mean > 0], np.asarray([value for value in losses if value > 0])])
    if len(shown) and shown.max() > 20 * shown.min():
        panels[0].set_yscale("log")
        panels[0].set_ylim(shown.min() * 0.6, np.nanmax(curves.loss) * 1.4)
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    style(panels[1], "Top-1 accuracy, %" if curves.metric == "top1" else curves.metric)
    if np.isfinite(curves.top1).any():
        accuracy = smoothed(curves.top1, window)
        label = "train" if curves.metric in ("top1", "dice") else "train accuracy"
        panels[1].plot(curves.epochs[::step], accuracy[::step], color=BLUE, linewidth=1.8, label=label)
    best = [row[curves.metric] for row in curves.validation if curves.metric in row]
    if best:
        panels[1].plot(at, best, color=ORANGE, linewidth=1.8, marker="o", markersize=3, label="validation")
        top = int(np.argmax(best))
        panels[1].axhline(best[top], color=ORANGE, linewidth=0.8, linestyle=(0, (4, 4)))
        summary = f"best {format_metric(best[top])} in epoch {round(at[top], 1):g}"
        panels[1].set_title(summary, loc="right", fontsize=9, color=ORANGE)
    _, high = panels[1].get_ylim()
    panels[1].set_ylim(top=min(high, 101))

    style(panels[2], "Learning rate")
    panels[2].plot(curves.epochs[::step], curves.lr[::step], color=GREEN, linewidth=1.8)
    panels[2].set_ylim(bottom=0)
    panels[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels:
        axes.set_xlabel("epoch", color=MUTED, fontsize=9)
        axes.set_xlim(0, max(curves.epochs[-1] * 1.08, 1e-6))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=curves.epochs[-1] >= 2))
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    if panels[1].lines:
        panels[1].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 0.05))
    save(figure, path)


def draw_confusion(evaluation: Evaluation, path: str | Path, title: str = "Confusion matrix") -> None:
    """Rows are true classes, columns predicted ones, colours the share of the row; numbers where they are readable."""
    counts = evaluation.confusion.numpy()
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)
    count = len(evaluation.classes)
    side = min(max(4.5, 0.55 * count + 2.5), 12)
    figure = new_canvas(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    correct = np.trace(counts)
    axes.set_title(
        f"{title}\n{correct:,} of {counts.sum():,} images correct ({100 * correct / max(counts.sum(), 1):.2f} %)",
        loc="left", fontsize=11, color=INK, fontweight="bold",
    )  # fmt: skip
    if count <= MOST_LABELLED_CLASSES:
        turn = 0 if max(len(name) for name in evaluation.classes) <= 3 else 60
        axes.set_xticks(range(count), evaluation.classes, rotation=turn, ha="center" if turn == 0 else "right",
                        rotation_mode="anchor" if turn else None, fontsize=9)  # fmt: skip
        axes.set_yticks(range(count), evaluation.classes, fontsize=9)
    if count <= MOST_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            wrong = row != column
            color = RED if wrong else ("white" if share[row, column] > 0.5 else INK)
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color,
                      fontsize=9 if count <= 12 else 7, fontweight="bold" if wrong else "normal")  # fmt: skip
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, format=lambda value, _: f"{100 * value:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=MUTED)
    bar.set_label("share of the true class", color=MUTED, fontsize=9)
    save(figure, path)


def picked_predictions(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Up to `count` predictions worth seeing: at most half of them wrong ones (the most confident first), then right
    ones spread over the data set."""
    wrong = sorted((p for p in predictions if p.rank > 0), key=lambda p: -p.confidence)
    right = [p for p in predictions if p.rank == 0]
    shown_wrong = wrong[: max(count // 2, count - len(right))]
    places = min(count - len(shown_wrong), len(right))
    spread = [right[(2 * i + 1) * len(right) // (2 * places)] for i in range(places)]
    return shown_wrong + spread


def open_picture(path: str | Path, size: int = 160) -> Image.Image:
    """The picture at `path` as 8-bit RGB, upright, its longer side `size`."""
    with Image.open(path) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            array = np.asarray(image, dtype=np.float64)
            span = max(array.max() - array.min(), 1e-12)
            image = Image.fromarray(np.uint8(255 * (array - array.min()) / span))
        image = image.convert("RGB")
    return fitted(image, size)


def fitted(image: Image.Image, size: int) -> Image.Image:
    """`image` with a longer side of `size`."""
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    return image.resize(shape, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def draw_predictions(
    evaluation: Evaluation,
    path: str | Path,
    count: int = 40,
    title: str = "Predictions",
    picture_of: Callable[[str], Image.Image] | None = None,
) -> None:
    """Grid of validation images with predicted class and confidence; wrong ones first, framed in red with the truth.

    `picture_of` gives the picture of a prediction's path where that is not a file.
    """
    chosen = picked_predictions(evaluation.predictions, count)
    columns = min(8, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = new_canvas(1.55 * columns + 0.4, 1.95 * rows + 0.8)
    wrong = sum(prediction.rank > 0 for prediction in evaluation.predictions)
    figure.suptitle(
        f"{title}: {wrong:,} of {len(evaluation.predictions):,} images wrong", x=0.01, ha="left", fontsize=12, color=INK
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, prediction in zip(grid, chosen, strict=False):
        picture = open_picture(prediction.path) if picture_of is None else fitted(picture_of(prediction.path), 160)
        axes.imshow(np.asarray(picture))
        mistaken = prediction.rank > 0
        color = RED if mistaken else GREEN
        predicted = _short(evaluation.classes[prediction.predicted])
        label = f"{predicted}  {100 * prediction.confidence:.0f} %"
        if mistaken:
            label += f"\ntrue: {_short(evaluation.classes[prediction.label])}"
        axes.set_title(label, fontsize=9, color=color, pad=4)
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=color,
                                 linewidth=3.0 if mistaken else 1.2))  # fmt: skip
    save(figure, path)


def draw_top(pictures: Sequence[tuple[str, Sequence[tuple[str, float]]]], path: str | Path, title: str) -> None:
    """Each picture beside its most probable classes as bars.

    Args:
        pictures: file and its (class, probability) pairs, most probable first.
        path: picture to write.
        title: line above.
    """
    columns = 1 if len(pictures) == 1 else 2
    rows = math.ceil(len(pictures) / columns)
    figure = new_canvas(6.4 * columns, 2.4 * rows + 0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
    for axes in grid.ravel():
        axes.set_axis_off()
    for index, (file, top) in enumerate(pictures):
        row, column = divmod(index, columns)
        left, right = grid[row, 2 * column], grid[row, 2 * column + 1]
        left.imshow(np.asarray(open_picture(file, size=320)))
        left.add_patch(Rectangle((0, 0), 1, 1, transform=left.transAxes, fill=False, edgecolor=MUTED, linewidth=0.8,
                                 clip_on=False))  # fmt: skip
        left.set_title(_short(Path(file).name, 28), fontsize=9, color=MUTED, loc="left")
        right.set_axis_on()
        style(right, "")
        right.grid(False)
        names = [name for name, _ in top]
        values = [100 * value for _, value in top]
        places = np.arange(len(top))[::-1]
        right.barh(places, values, color=[BLUE] + ["#b6c7d6"] * (len(top) - 1), height=0.34)
        right.set_xlim(0, 118)
        right.set_ylim(-0.5, len(top) - 0.2)
        right.set_xticks([])
        right.set_yticks([])
        right.spines["bottom"].set_visible(False)
        for place, name, value in zip(places, names, values, strict=True):
            first = place == places[0]
            weight = "bold" if first else "normal"
            right.text(0, place + 0.26, _short(name, 40), fontsize=9, color=INK, va="bottom", fontweight=weight)
            right.text(value + 2, place, f"{value:.1f} %", fontsize=9, color=INK if first else MUTED, va="center")
    save(figure, path)


def draw_pictures(
    pictures: Sequence[tuple[str, np.ndarray]],
    path: str | Path,
    title: str,
    legend: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Grid of finished pictures, each (H, W, 3) uint8, under their names; `legend` says what 8-bit RGB colours mean."""
    aspect = float(np.mean([picture.shape[1] / picture.shape[0] for _, picture in pictures]))
    columns = max(1, min(len(pictures), round(math.sqrt(1.4 * len(pictures) / aspect))))
    rows = math.ceil(len(pictures) / columns)
    height = 3.0 if aspect < 1.5 else 2.4
    figure = new_canvas(height * aspect * columns + 0.4, (height + 0.3) * rows + 0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, picture) in zip(grid, pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(_short(name, 28), fontsize=9, color=MUTED, loc="left")
    if legend:
        patches = [Patch(color=np.asarray(color) / 255, label=name) for name, color in legend]
        figure.legend(
            handles=patches, loc="outside lower left", ncols=min(len(patches), max(2, 3 * columns)), frameon=False,
            fontsize=9, labelcolor=INK,
        )  # fmt: skip
    save(figure, path)


def _short(text: str, length: int = 18) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # names of files may be no text
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")  # no formula

"""What the pictures of this folder share: figures without a display, heat maps, a check of where to write."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1f2933", "#7b8794"


class VisualizeError(ValueError):
    """Something that cannot be drawn; the message says what to change."""


def check_output(path: str | os.PathLike, endings: Sequence[str] = (".png",)) -> Path:
    """The path of a picture, in a folder that exists and can be written to.

    Raises:
        VisualizeError: another ending, or a folder that cannot be made or written to.
    """
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise VisualizeError(f"--out {path} should end in {' or '.join(endings)}")
    return check_place(path)


def check_place(path: str | os.PathLike) -> Path:
    """The path of a file that is to be written, in a folder that exists and can be written to.

    Raises:
        VisualizeError: a folder, or one that cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise VisualizeError(f"--out {path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or error
        raise VisualizeError(f"cannot write {path}: {reason}; choose another place with --out") from None
    return path


def new_figure(rows: int, columns: int, width: float, height: float, title: str) -> "tuple[Figure, np.ndarray]":
    """A figure and its (rows, columns) axes, without ticks; `width` and `height` of one in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    lines = title.splitlines()
    wide = max(columns * width + 0.3, 0.085 * max(map(len, lines)))
    figure = Figure(figsize=(wide, rows * (height + 0.35) + 0.2 + 0.2 * len(lines)), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_axis_off()
    return figure, axes


def panel_size(height: int, width: int, side: float = 2.6) -> tuple[float, float]:
    """Width and height in inches of a panel for a picture of `height` x `width` pixels."""
    scale = side / max(height, width)
    return max(width * scale, 0.6), max(height * scale, 0.6)


def show(axis: "Axes", picture: np.ndarray, title: str = "", **options: Any) -> Any:
    """Put a picture, (H, W) or (H, W, 3), on an axis."""
    axis.set_title(title, fontsize=8, color=MUTED, loc="left")
    return axis.imshow(picture, **options)


def save(figure: "Figure", path: str | os.PathLike, dpi: int = 110) -> None:
    """Write a figure as png."""
    figure.savefig(path, dpi=dpi, pil_kwargs=dict(optimize=True))


def scaled(values: Tensor) -> Tensor:
    """`values` brought to 0 .. 1; all 0 where they do not differ."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def enlarge(values: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """(H, W) at another size."""
    options = {} if mode == "nearest" else dict(align_corners=False)
    return F.interpolate(values[None, None].float(), size=size, mode=mode, **options)[0, 0]


def overlay(picture: np.ndarray, heat: Tensor, strength: float = 0.55) -> np.ndarray:
    """A heat map, (H, W) in 0 .. 1, over a picture, (H, W, 3) in 0 .. 1: warm where it is large."""
    import matplotlib

    colours = matplotlib.colormaps["turbo"](heat.numpy())[..., :3]
    grey = picture.mean(axis=2, keepdims=True)
    return np.clip((1 - strength) * (0.5 * picture + 0.5 * grey) + strength * colours, 0, 1)


def as_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (C, H, W), of 1 or 3 channels, as (H, W, 3) in 0 .. 1."""
    shape = (-1, 1, 1)
    values = image.detach().cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return values.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()

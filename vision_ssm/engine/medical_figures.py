"""Masks over slices: overlays, and montages of a volume."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_ssm.data.medical_base import class_palette

from .figures import draw_pictures

LEAST_SIDE = 256
"""Shorter side, in pixels, that a slice is enlarged to before it is drawn."""
OPACITY = 0.35


def class_colors(meta: Mapping[str, Any] | None, count: int) -> np.ndarray:
    """(count, 3) uint8: the palette of a data set's ``metainfo`` as far as it goes, and `class_palette`."""
    given = list((meta or {}).get("palette") or ())[:count]
    return np.asarray([*given, *class_palette(count)[len(given) :]], dtype=np.uint8)


def class_legend(meta: Mapping[str, Any] | None) -> list[tuple[str, list[int]]]:
    """Name and colour of each foreground class of a ``metainfo``."""
    names = tuple((meta or {}).get("classes") or ())
    return list(zip(names, class_colors(meta, len(names)).tolist(), strict=True))[1:]


def grey_range(image: np.ndarray) -> tuple[float, float]:
    """Intensities to be drawn black and white: percentiles, so that a few bright cells do not matter."""
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(high) if high > low else float(low) + 1.0


def picture_of_slice(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """A slice (C, H, W) as (H, W, 3) uint8: three channels are colours, of any other number the first is grey."""
    low, high = grey_range(image) if limits is None else limits
    scaled = np.clip((image.astype(np.float64) - low) / (high - low), 0, 1)
    channels = scaled if len(scaled) == 3 else scaled[:1].repeat(3, 0)
    return np.rint(255 * channels.transpose(1, 2, 0)).astype(np.uint8)  # (H, W, 3)


def overlay(
    picture: np.ndarray, labels: np.ndarray, colors: np.ndarray, spacing: Sequence[float] = (1, 1)
) -> np.ndarray:
    """Labels over a picture: tinted areas within a line of full colour. Small pictures are enlarged.

    Args:
        picture: (H, W, 3) uint8; not changed.
        labels: (H, W) integers, 0 for the background.
        colors: (K, 3) uint8, K above the largest label.
        spacing: of the cells along H and W, in mm; the picture is as high and wide as they say.

    Returns:
        (H', W', 3) uint8.

    Raises:
        ValueError: picture and labels differ in size, or a label has no colour.
    """
    if picture.shape[:2] != labels.shape:
        raise ValueError(f"picture {picture.shape[:2]} and labels {labels.shape} differ in size")
    if labels.max(initial=0) >= len(colors) or labels.min(initial=0) < 0:
        raise ValueError(f"labels {labels.min()} to {labels.max()} do not all have one of the {len(colors)} colours")
    smallest = min(spacing)
    sides = [side * step / smallest for side, step in zip(labels.shape, spacing, strict=True)]
    factor = max(1.0, LEAST_SIDE / min(sides))
    height, width = (max(1, round(side * factor)) for side in sides)
    large = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    rows = np.minimum(np.arange(height) * labels.shape[0] // height, labels.shape[0] - 1)
    columns = np.minimum(np.arange(width) * labels.shape[1] // width, labels.shape[1] - 1)
    labels = labels[rows][:, columns]
    padded = np.pad(labels, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([inner != other for other in neighbours], axis=0)
    share = np.where(labels == 0, 0.0, np.where(edge, 1.0, OPACITY))[..., None]
    return np.rint(large * (1 - share) + colors[labels] * share).astype(np.uint8)


def shown_slices(labels: np.ndarray, count: int) -> list[int]:
    """Up to `count` slices of (D, H, W) labels, in order: evenly spread over those with foreground, else over all."""
    filled = np.flatnonzero(labels.reshape(len(labels), -1).any(1))
    places = filled if len(filled) else np.arange(len(labels))
    count = min(count, len(places))
    return [int(places[(2 * index + 1) * len(places) // (2 * count)]) for index in range(count)]


def draw_montage(
    image: np.ndarray,
    labels: np.ndarray,
    path: str | Path,
    title: str,
    meta: Mapping[str, Any] | None = None,
    spacing: Sequence[float] = (1, 1, 1),
    count: int = 24,
) -> None:
    """Grid of slices of a volume with their labels, spread over the volume.

    Args:
        image: (D, C, H, W). labels: (D, H, W).
        path: picture to write. title: line above.
        meta: ``metainfo`` of the data set, for names and colours of the classes.
        spacing: along D, H, W, in mm.
        count: slices in the grid, at most.
    """
    colors = class_colors(meta, int(labels.max(initial=1)) + 1)
    limits = grey_range(image)
    depth = len(image)
    count = min(count, depth)
    places = [(2 * index + 1) * depth // (2 * count) for index in range(count)]
    pictures = [
        (f"slice {place}", overlay(picture_of_slice(image[place], limits), labels[place], colors, spacing[1:]))
        for place in places
    ]
    draw_pictures(pictures, path, title, class_legend(meta))


def save_overlays(
    image: np.ndarray,
    labels: np.ndarray,
    folder: str | Path,
    meta: Mapping[str, Any] | None = None,
    spacing: Sequence[float] = (1, 1, 1),
) -> int:
    """One png per slice with foreground into `folder`, which is made; shapes as above. Returns their number."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colors = class_colors(meta, int(labels.max(initial=1)) + 1)
    limits = grey_range(image)
    filled = np.flatnonzero(labels.reshape(len(labels), -1).any(1)).tolist()
    for place in filled:
        picture = overlay(picture_of_slice(image[place], limits), labels[place], colors, spacing[1:])
        Image.fromarray(picture).save(folder / f"slice_{place:04}.png")
    return len(filled)

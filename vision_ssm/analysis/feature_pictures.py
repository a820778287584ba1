"""Feature maps, first filters and depthwise kernels as pictures."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..registry import suggest
from .pictures import VisualizeError, new_figure, save, scaled, show

REDUCTIONS = ("mean", "norm", "pca")
_GAP = 1  # pixels between kernels


def reduce_map(features: Tensor, how: str = "pca") -> Tensor:
    """A map (C, H, W) as a picture.

    Args:
        features: the map.
        how: ``"mean"`` over channels, ``"norm"``, the length of a cell's vector, (H, W); or ``"pca"``, the first three
            principal components of its cells as red, green and blue, (H, W, 3).

    Returns:
        Values in 0 .. 1.

    Raises:
        VisualizeError: unknown `how`.
    """
    if how not in REDUCTIONS:
        raise VisualizeError(f"unknown reduction {how!r}.{suggest(how, REDUCTIONS)}")
    features = features.float()
    if how == "mean":
        return scaled(features.mean(0))
    if how == "norm":
        return scaled(features.norm(dim=0))
    channels, height, width = features.shape
    cells = features.flatten(1).T  # (L, C)
    cells = cells - cells.mean(0)
    _, _, axes = torch.linalg.svd(cells, full_matrices=False)  # (min(L, C), C)
    axes = axes[:3]
    # an axis has no sign of its own: its largest entry is made positive
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    components = cells @ axes.T  # (L, up to 3)
    picture = torch.zeros(height * width, 3)
    for number in range(components.shape[1]):
        picture[:, number] = scaled(components[:, number])
    return picture.view(height, width, 3)


def find_kernels(model: nn.Module, patterns: Sequence[str] = ()) -> list[tuple[str, Tensor]]:
    """Names and kernels of convolutions.

    Args:
        model: any model.
        patterns: names of layers, with ``*`` for any part; by default the first convolution, and the first depthwise
            one with more than one tap of every stage.

    Returns:
        Per layer its name and its kernels, (n, C, h, w): C channels of the image in the first layer, 1 in depthwise
        ones.

    Raises:
        VisualizeError: a pattern that no drawable layer matches.
    """
    drawable: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and max(module.kernel_size) > 1:
            weight = module.weight.detach().cpu().float()
            weight = weight if weight.dim() == 4 else weight.unsqueeze(2)  # (C, 1, taps) -> (C, 1, 1, taps)
            first = not drawable and module.groups == 1 and weight.shape[1] in (1, 3)
            if first or weight.shape[1] == 1:
                drawable[name] = weight
    if not drawable:
        raise VisualizeError("this model has no convolution of the image and no depthwise convolution")
    if patterns:
        chosen = [name for name in drawable if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        for pattern in patterns:
            if not fnmatch.filter(drawable, pattern):
                raise VisualizeError(f"no drawable layer matches {pattern!r}.{suggest(pattern, drawable)}")
        return [(name, drawable[name]) for name in chosen]
    found: dict[str, str] = {}
    for name in drawable:
        found.setdefault("first" if not found else _stage_of(name), name)
    return [(name, drawable[name]) for name in found.values()]


def _stage_of(name: str) -> str:
    """Name of a layer up to the number of its stage."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def tile(kernels: Tensor, most: int = 64) -> np.ndarray:
    """Kernels (n, C, h, w) side by side, at most `most`, as one picture, (H, W) or (H, W, 3) in 0 .. 1.

    Each kernel is scaled by itself about its zero, which is 1/2; gaps are 1 in colour pictures and NaN in others.
    """
    kernels = kernels[:most]
    count, channels, height, width = kernels.shape
    columns = int(np.ceil(np.sqrt(count * height / width)))
    rows = -(-count // columns)
    sheet = torch.full((channels, 1, 1), 1.0 if channels == 3 else torch.nan)
    sheet = sheet.repeat(1, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    for number, kernel in enumerate(kernels):
        y, x = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[:, y : y + height, x : x + width] = 0.5 + 0.5 * kernel / kernel.abs().max().clamp_min(1e-12)
    picture = sheet.permute(1, 2, 0).numpy()
    return picture if channels == 3 else picture[..., 0]


def draw_kernels(layers: Sequence[tuple[str, Tensor]], path: Any, title: str, most: int = 64, dpi: int = 110) -> None:
    """A panel per layer of `find_kernels`, with at most `most` kernels of each."""
    columns = min(3, len(layers))
    figure, axes = new_figure(-(-len(layers) // columns), columns, 3.0, 3.0, title)
    for axis, (name, kernels) in zip(axes.flat, layers):
        count, _, height, width = kernels.shape
        shown = f"{count}" if count <= most else f"{most} of {count}"
        options: dict[str, Any] = dict(cmap="RdBu_r", vmin=0, vmax=1, interpolation="nearest")
        show(axis, tile(kernels, most), f"{name}\n{shown} kernels of {height} x {width}", **options)
    save(figure, path, dpi)

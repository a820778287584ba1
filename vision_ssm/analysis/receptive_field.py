"""Effective receptive fields: how much each pixel moves the centre of a feature map.

Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, arXiv 1701.04128; area
ratios as in Ding et al., Scaling Up Your Kernels to 31x31 (RepLKNet), arXiv 2203.06717; drawn before and after training
as in VMamba, arXiv 2401.10166.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import suggest
from ..unets.base import UNet
from .pictures import VisualizeError, new_figure, panel_size, save, show

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
MEASURES = ("abs", "relu", "square")


@dataclass(frozen=True)
class Area:
    """The smallest centred square that holds a share of the receptive field.

    Attributes:
        threshold: the share, 0 to 1.
        side: of the square in pixels, before it is cut off at the border of the image.
        ratio: its area within the image over that of the image.
    """

    threshold: float
    side: int
    ratio: float


def choose_stage(model: nn.Module, stage: int | None) -> int:
    """The number of a map that a model can return, counted from 0; the last by default, negative ones from the end.

    Raises:
        VisualizeError: there is no such map.
    """
    info: Sequence[Any] = model.encoder.out_info if isinstance(model, UNet) else model.feature_info  # type: ignore[assignment]
    count = len(info)
    number = count - 1 if stage is None else stage + count if stage < 0 else stage
    if not 0 <= number < count:
        name = getattr(model, "variant", None) or type(model).__name__
        raise VisualizeError(f"{name} has stages 0 to {count - 1} (or -{count} to -1), got {stage}")
    return number


def feature_map(model: Any, images: Tensor, stage: int) -> Tensor:
    """Map number `stage` of a backbone or of a U-Net's encoder, (B, C, H', W')."""
    if isinstance(model, UNet):
        return model.forward_intermediates(images)[stage]
    return model.forward_intermediates(images, (stage,))[0]


def receptive_field(
    model: Any, images: Iterable[Tensor], stage: int | None = None, measure: str = "abs", scores: bool = False
) -> Tensor:
    """Mean over images of the gradient that the central cell of a feature map, all channels added, has at every pixel.

    Args:
        model: a backbone or a U-Net, in eval mode.
        images: normalised images, each (C, H, W), all of one size.
        stage: number of the map, the last by default.
        measure: what is averaged and added over the channels of the image: ``"abs"``, the absolute gradient,
            ``"relu"``, its positive part, or ``"square"``.
        scores: of the scores of a U-Net, not of a map of its encoder.

    Returns:
        (H, W), float64, of sum 1 unless all are 0.

    Raises:
        VisualizeError: no such map or measure, or no image.
    """
    if measure not in MEASURES:
        raise VisualizeError(f"unknown measure {measure!r}.{suggest(measure, MEASURES)}")
    number = None if scores else choose_stage(model, stage)
    device = next(model.parameters()).device
    total = None
    for image in images:
        x = image[None].to(device).requires_grad_()
        out = model(x) if number is None else feature_map(model, x, number)
        centre = out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, x)
        gradient = gradient[0].double().cpu()
        values = {"abs": gradient.abs, "relu": gradient.relu, "square": gradient.square}[measure]().sum(0)
        total = values if total is None else total + values
    if total is None:
        raise VisualizeError("a receptive field needs at least one image")
    return total / total.sum() if total.sum() > 0 else total


def covered_areas(field: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> list[Area]:
    """For each threshold the smallest square about the centre that holds that share of `field`, (H, W)."""
    height, width = field.shape
    rows = (torch.arange(height) - height // 2).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows, columns)  # (H, W): half the side of the square that reaches a pixel
    inside = torch.bincount(ring.flatten(), field.double().flatten()).cumsum(0)
    pixels = torch.bincount(ring.flatten()).cumsum(0)
    areas = []
    for threshold in thresholds:
        reached = inside >= threshold * inside[-1] - 1e-12
        half = int(reached.int().argmax())  # the first
        areas.append(Area(threshold, 2 * half + 1, float(pixels[half]) / (height * width)))
    return areas


def draw_fields(fields: Sequence[tuple[str, Tensor]], path: Any, title: str, dpi: int = 110) -> None:
    """Receptive fields, (H, W) each, side by side under their names, as the logarithm that RepLKNet draws."""
    height, width = fields[0][1].shape
    figure, axes = new_figure(1, len(fields), *panel_size(height, width, 3.2), title)
    for axis, (name, field) in zip(axes[0], fields, strict=True):
        # brightness is log10(1 + gradient), of gradients scaled so that their mean is 1
        values = torch.log10(1 + field * field.numel())
        shown = (values / values.max().clamp_min(1e-12)).numpy()
        show(axis, shown, f"{name}\n{describe_areas(field, THRESHOLDS[1:])}", cmap="YlGn_r", vmin=0, vmax=1)
    save(figure, path, dpi)


def describe_areas(field: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> str:
    """The areas of a receptive field in words: of each share of it, the share of the image that holds it."""
    return ", ".join(f"{100 * a.threshold:g} % in {100 * a.ratio:.1f} %" for a in covered_areas(field, thresholds))


def field_record(field: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """The numbers of a receptive field for a json file."""
    height, width = field.shape
    return dict(height=height, width=width, areas=[asdict(area) for area in covered_areas(field, thresholds)])

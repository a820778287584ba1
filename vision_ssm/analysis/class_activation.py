"""Grad-CAM: where in an image a classifier finds a class. Selvaraju et al., arXiv 1610.02391.

Written here because the packages for it hook a layer that the user must name, with a function that turns its output
into a map; the stages of these models return maps, streams with pending branches, sequences with class tokens or lists
of maps, which this file knows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.plain import PlainBackbone
from ..scans.sequence import TokenLayout
from .pictures import VisualizeError
from .receptive_field import choose_stage


def check_classifier(model: nn.Module) -> Backbone:
    """`model` if it is a classifier; `VisualizeError` if not."""
    if not isinstance(model, Backbone) or not model.num_classes:
        name = getattr(model, "variant", None) or type(model).__name__
        raise VisualizeError(
            f"{name} has no classifier, so no class to explain; `activation` and `erf` draw its feature maps"
        )
    return model


def cam_stage(model: Backbone, stage: int | None) -> int:
    """The stage whose map is weighed: the last one that the logits read through its cells.

    Raises:
        VisualizeError: there is no such stage, or the logits see its map through class tokens alone.
    """
    by_token = isinstance(model, PlainBackbone) and model.cls_token is not None
    last = len(model.feature_info) - 1 - by_token
    number = choose_stage(model, last if stage is None else stage)
    if number > last:
        raise VisualizeError(
            f"the classifier of {model.variant} reads the class token behind block {number}, not its cells: choose a "
            f"stage up to {last}"
        )
    return number


def maps_and_gradients(model: Backbone, image: Tensor, stage: int, label: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The raw map of a stage and the gradient of a class's logit with respect to it.

    Args:
        model: a classifier in eval mode.
        image: (C, H, W), normalised.
        stage: number of the stage, see `cam_stage`.
        label: the class; None: the most probable one.

    Returns:
        Map and gradient, (C', H', W') each, and all logits, (classes,).
    """
    seen: dict[str, Any] = {}
    # all maps of a high-resolution network leave its last stage, as a list
    module = model.get_submodule(model.feature_info[stage]["module"])

    def watch(_: nn.Module, arguments: tuple, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output[stage] if isinstance(output, list) else output
        seen["shift"] = shift = torch.zeros_like(stream, requires_grad=True)  # its gradient is that of the map
        branch = output[1] if isinstance(output, tuple) and isinstance(output[1], tuple) else None
        seen["map"] = stream.detach() if branch is None else (stream + branch[0]).detach()
        seen["layout"] = next((value for value in arguments if isinstance(value, TokenLayout)), None)
        if isinstance(output, tuple):
            return (stream + shift, *output[1:])
        if isinstance(output, list):
            return [stream + shift if number == stage else value for number, value in enumerate(output)]
        return stream + shift

    handle = module.register_forward_hook(watch)
    try:
        logits = model(image[None].to(next(model.parameters()).device))[0]
    finally:
        handle.remove()
    chosen = int(logits.argmax()) if label is None else label
    (gradient,) = torch.autograd.grad(logits[chosen], seen["shift"])
    parts = []
    for values in (seen["map"], gradient):
        if (layout := seen["layout"]) is not None:
            values = layout.split(values)[0].unflatten(1, (layout.height, layout.width))  # (B, L, C) -> (B, H, W, C)
        parts.append(values[0].permute(2, 0, 1).cpu())
    return parts[0], parts[1], logits.detach().cpu()


def grad_cam(
    model: nn.Module, image: Tensor, label: int | None = None, stage: int | None = None
) -> tuple[Tensor, Tensor]:
    """Grad-CAM of a class: the map of a stage, its channels weighted by their mean gradient, and the positive part.

    Args:
        model: a classifier of the library, in eval mode.
        image: (C, H, W), normalised.
        label: the class; None: the most probable one.
        stage: number of the stage; None: see `cam_stage`.

    Returns:
        (H', W'), not scaled, at the resolution of the stage; and the logits, (classes,).

    Raises:
        VisualizeError: no classifier, class or stage.
    """
    classifier = check_classifier(model)
    if label is not None and not 0 <= label < classifier.num_classes:
        raise VisualizeError(f"{classifier.variant} has classes 0 to {classifier.num_classes - 1}, got {label}")
    number = cam_stage(classifier, stage)
    activation, gradient, logits = maps_and_gradients(classifier, image, number, label)
    weights = gradient.mean(dim=(1, 2), keepdim=True)
    return (weights * activation).sum(0).relu(), logits

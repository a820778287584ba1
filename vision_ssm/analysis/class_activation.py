"""Grad-CAM: where in an image a classifier finds a class. Selvaraju et al., arXiv 1610.02391.

Of a U-Net, what its decoder takes from a stage of the encoder that speaks for a class, in all pixels that get the class
(Vinogradova et al., arXiv 2002.11434).

Written here because the packages for it hook a layer that the user must name, with a function that turns its output
into a map; the stages of these models return maps, streams with pending branches, sequences with class tokens or lists
of maps, which this file knows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone
from ..backbones.plain import PlainBackbone
from ..scans.sequence import TokenLayout
from ..unets import UNet
from .pictures import VisualizeError
from .receptive_field import choose_stage


class Explanation(NamedTuple):
    """Grad-CAM of a class.

    Attributes:
        cam: (H', W'), not negative and not scaled, at the resolution of the stage.
        label: the class.
        share: its probability; of a U-Net, the share of the pixels that get it.
    """

    cam: Tensor
    label: int
    share: float


def check_classifier(model: nn.Module) -> Backbone | UNet:
    """`model` if it is a classifier, or a U-Net, which is one of pixels; `VisualizeError` if not."""
    if not isinstance(model, Backbone | UNet) or not model.num_classes:
        name = getattr(model, "variant", None) or type(model).__name__
        raise VisualizeError(
            f"{name} has no classifier, so no class to explain; `activation` and `erf` draw its feature maps"
        )
    return model


def cam_stage(model: Backbone | UNet, stage: int | None) -> int:
    """The stage whose map is weighed: the last one that the logits read through its cells; of a U-Net's encoder.

    Raises:
        VisualizeError: there is no such stage, or the logits see its map through class tokens alone.
    """
    if isinstance(model, UNet):
        return choose_stage(model, stage)
    by_token = isinstance(model, PlainBackbone) and model.cls_token is not None
    last = len(model.feature_info) - 1 - by_token
    number = choose_stage(model, last if stage is None else stage)
    if number > last:
        raise VisualizeError(
            f"the classifier of {model.variant} reads the class token behind block {number}, not its cells: choose a "
            f"stage up to {last}"
        )
    return number


def aim(scores: Tensor, label: int | None) -> tuple[Tensor, int, float]:
    """What is explained: a number whose gradient is taken, its class, and the class's share, see `Explanation`.

    Args:
        scores: logits (classes,), or raw scores of pixels (classes, H, W). The number is then the sum over the pixels
            that get the class, or over all if none does.
        label: the class; None: the most probable one, or what most pixels get that are not background.
    """
    if scores.dim() == 1:
        chosen = int(scores.argmax()) if label is None else label
        return scores[chosen], chosen, float(scores.detach().softmax(0)[chosen])
    if len(scores) == 1:
        chosen, gets = 0, scores[0] > 0
    else:
        labels = scores.argmax(0)
        chosen = 1 + int(labels.flatten().bincount(minlength=len(scores))[1:].argmax()) if label is None else label
        gets = labels == chosen
    share = float(gets.double().mean())
    return (scores[chosen][gets] if share else scores[chosen]).sum(), chosen, share


def maps_and_gradients(
    model: Backbone | UNet, image: Tensor, stage: int, label: int | None
) -> tuple[Tensor, Tensor, int, float]:
    """The raw map of a stage and the gradient of what speaks for a class with respect to it.

    Args:
        model: a classifier or a U-Net in eval mode.
        image: (C, H, W), normalised.
        stage: number of the stage, see `cam_stage`.
        label: the class, see `aim`.

    Returns:
        Map and gradient, (C', H', W') each; the class and its share.
    """
    images = image[None].to(next(model.parameters()).device)
    if isinstance(model, UNet):
        with torch.no_grad():
            maps = list(model.encode(model.prepare(images)))  # (B, H', W', C) each
        maps[stage].requires_grad_()
        target, chosen, share = aim(model.read(model.decode(maps)[-1], *image.shape[1:])[0], label)
        (gradient,) = torch.autograd.grad(target, maps[stage])
        activation, gradient = (values[0].permute(2, 0, 1).cpu() for values in (maps[stage].detach(), gradient))
        return activation, gradient, chosen, share
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
        logits = model(images)[0]
    finally:
        handle.remove()
    target, chosen, share = aim(logits, label)
    (gradient,) = torch.autograd.grad(target, seen["shift"])
    parts = []
    for values in (seen["map"], gradient):
        if (layout := seen["layout"]) is not None:
            values = layout.split(values)[0].unflatten(1, (layout.height, layout.width))  # (B, L, C) -> (B, H, W, C)
        parts.append(values[0].permute(2, 0, 1).cpu())
    return parts[0], parts[1], chosen, share


def grad_cam(model: nn.Module, image: Tensor, label: int | None = None, stage: int | None = None) -> Explanation:
    """Grad-CAM of a class: the map of a stage, its channels weighted by their mean gradient, and the positive part.

    Args:
        model: a classifier or a U-Net of the library, in eval mode. The map of a U-Net covers its padded image.
        image: (C, H, W), normalised.
        label: the class; None: the most probable one, or what most pixels get that are not background.
        stage: number of the stage, of a U-Net that of the maps its decoder takes; None: see `cam_stage`.

    Raises:
        VisualizeError: no classifier, class or stage.
    """
    classifier = check_classifier(model)
    if label is not None and not 0 <= label < classifier.num_classes:
        raise VisualizeError(f"{classifier.variant} has classes 0 to {classifier.num_classes - 1}, got {label}")
    number = cam_stage(classifier, stage)
    activation, gradient, chosen, share = maps_and_gradients(classifier, image, number, label)
    weights = gradient.mean(dim=(1, 2), keepdim=True)
    return Explanation((weights * activation).sum(0).relu(), chosen, share)

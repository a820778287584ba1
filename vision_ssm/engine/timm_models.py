"""A plain timm model as a baseline in a classification config: ``backbone=dict(name="timm:deit_tiny_patch16_224")``."""

import os
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from vision_ssm.backbones.family import ModelFamily
from vision_ssm.factory import create_model
from vision_ssm.registry import suggest
from vision_ssm.weights import CheckpointError, load_weights, read_checkpoint, unwrap

PREFIX = "timm:"


def create_classifier(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    """Build a model of this library, or one of timm's by its name there after the prefix ``timm:``.

    Args:
        name: ``"vmamba_tiny_s1l8"``, or ``"timm:deit_tiny_patch16_224"``.
        num_classes: outputs of the classifier.
        **overrides: keywords of `vision_ssm.create_model`, or of timm's model.

    Raises:
        KeyError: unknown name. TypeError: unknown keyword, or ``pretrained``, which for timm's models would fetch
            weights: a config names a file.
    """
    if not name.startswith(PREFIX):
        return create_model(name, num_classes=num_classes, **overrides)
    bare = name.removeprefix(PREFIX)
    if not timm.is_model(bare):
        raise KeyError(f"unknown model {bare!r} of timm.{suggest(bare, timm.list_models())}")
    if "pretrained" in overrides:
        raise TypeError(f"{name} takes no pretrained; weights are read from a file, model.pretrained=FILE")
    try:
        return timm.create_model(bare, num_classes=num_classes, **overrides)
    except TypeError as error:
        raise TypeError(f"{name} cannot be built with {', '.join(sorted(overrides))}: {error}") from error


def load_classifier(
    model: nn.Module,
    file: str | os.PathLike,
    reset_head: bool = False,
    called: str | None = None,
    adapt_input: bool = False,
    ema: bool | None = None,
) -> str:
    """Load a weight file into a model of `create_classifier`.

    Args:
        model: changed in place.
        file: official weights, or a checkpoint of a training run.
        reset_head: keep the fresh classifier of `model` where the file's has another number of classes.
        called: how an error calls a model that is not ours; by default, by its class.
        adapt_input: make the first convolution, of images of 3 channels in the file, one for a model of ours.
        ema: whether averaged weights are wanted where a file for a model of ours has both; None: as `load_weights`
            decides.

    Returns:
        A report in words.

    Raises:
        FileNotFoundError, CheckpointError: the file cannot be read, or does not fit.
    """
    if isinstance(model, ModelFamily):
        options: dict[str, bool] = dict(reset_head=reset_head, adapt_input=adapt_input, verbose=False)
        return str(load_weights(model, file, ema=ema, **options))
    tensors = unwrap(read_checkpoint(file), str(file))
    dropped = _other_classifier(model, tensors) if reset_head else []
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    try:
        missing, unexpected = model.load_state_dict(kept, strict=not dropped)
    except RuntimeError as error:
        problems = "\n".join(str(error).splitlines()[1:6])
        raise CheckpointError(f"{file} does not fit {called or type(model).__name__}:\n{problems or error}") from None
    if lost := [key for key in (*missing, *unexpected) if key not in dropped]:
        raise CheckpointError(f"{file} does not fit {called or type(model).__name__}: {', '.join(lost[:6])}")
    new = f", classifier new ({', '.join(dropped)})" if dropped else ""
    return f"{file}: {len(kept)} tensors loaded{new}"


def _other_classifier(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the classifiers' tensors in a state dict whose shapes are not those of `model`."""
    settings: Any = model.pretrained_cfg
    names = settings["classifier"]
    heads = (names,) if isinstance(names, str) else tuple(names)
    own = model.state_dict()
    found = [key for key in tensors if key.startswith(tuple(f"{head}." for head in heads))]
    return [key for key in found if key in own and own[key].shape != tensors[key].shape]

"""A model as a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads, as a hub does."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf

from ..backbones.base import Backbone
from .timm_registry import FOLDER_FILES, timm_name

CONFIG = "config.json"
_CURRENT = ("num_classes", "in_chans", "out_indices", "features_only", "global_pool")
"""Keywords that are read off the model, which may have been changed since it was built."""


def save_timm_folder(
    model: Backbone,
    folder: str | os.PathLike,
    *,
    label_names: Sequence[str] | Mapping[int, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a backbone as timm's `save_for_hf` does: ``model.safetensors`` and ``config.json``.

    ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` builds the same model with the same weights, if
    ``vision_ssm`` is imported; uploaded to a hub, the folder works as ``hf-hub:``. The keywords that the model was
    built with, and the names of its classes, come along.

    Args:
        model: a backbone of a named variant, classifier or `features_only`.
        folder: made if it is not there.
        label_names: name of every class, in order. None: those that the model was loaded with, if any.
        overwrite: replace a model that the folder holds.

    Returns:
        The folder.

    Raises:
        TypeError: something else than a backbone, or built with keywords that JSON cannot hold. ValueError: no name of
        a variant, or another number of label names than classes. FileExistsError: the folder holds a model.
    """
    folder = Path(folder)
    if not isinstance(model, Backbone):
        raise TypeError(f"timm's folders hold backbones, got {type(model).__name__}")
    if model.variant is None:
        raise ValueError(f"this {type(model).__name__} has no variant's name, by which timm could build it again")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label names are given for {model.num_classes} classes")
    files = (FOLDER_FILES[0], CONFIG)
    if not overwrite and (there := [name for name in files if (folder / name).exists()]):
        raise FileExistsError(f"{folder} holds {' and '.join(there)} already; overwrite=True replaces them")
    arguments = _arguments(model)
    settings: dict[str, Any] = dict(pretrained_cfg=dict(architecture=timm_name(model.variant)))
    if label_names is not None:
        names = dict(label_names) if isinstance(label_names, Mapping) else list(label_names)
        settings["label_names"] = names
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:  # so that no half-written model can be left
        save_for_hf(_contiguous(model), made, model_config=settings, model_args=arguments, safe_serialization=True)
        for name in files:
            # safetensors lets nobody else read its files
            (Path(made) / name).chmod((Path(made) / "config.json").stat().st_mode)
            shutil.move(Path(made) / name, folder / name)
    return folder


def _contiguous(model: Backbone) -> Backbone:
    """`model`, or a copy of it whose tensors lie in memory as safetensors wants them."""
    if all(value.is_contiguous() for value in model.state_dict().values()):
        return model
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def _arguments(model: Backbone) -> dict[str, Any]:
    """Keywords by which `create_model` builds `model` again."""
    arguments = {key: value for key, value in model.overrides.items() if key not in _CURRENT}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if model.features_only:
        arguments |= dict(features_only=True, out_indices=list(model.out_indices))
    try:
        json.dumps(arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise TypeError(f"{CONFIG} cannot hold the keywords that the model was built with ({given}): {error}") from None
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in model.state_dict().values()):
        raise ValueError("the model is on the meta device and has no weights to save")
    return arguments

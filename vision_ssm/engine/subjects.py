"""Models to look at, from a name or a config, with weights or without, and images as these models see them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from vision_ssm.analysis.pictures import as_picture
from vision_ssm.data import build_transform, load_image, transform_settings
from vision_ssm.factory import create_model
from vision_ssm.registry import MODELS, suggest
from vision_ssm.unets.base import UNet
from vision_ssm.weights import load_weights, read_checkpoint

from .config import UsageError, load_config
from .predict import class_names, model_from_file
from .timm_models import load_classifier

_SMALLEST = 32


@dataclass
class Subject:
    """A model in eval mode, and what it knows of its images.

    Attributes:
        name: of the model, or of the config.
        model: a backbone or a U-Net.
        classes: names of the classes; of none for a model without a classifier.
        settings: keywords of `build_transform`, evaluation.
        checkpoint: the file its weights come from; None: they are random.
    """

    name: str
    model: Any
    classes: tuple[str, ...]
    settings: dict[str, Any]
    checkpoint: str | None = None

    @property
    def channels(self) -> int:
        """Channels of image files: 1 or 3."""
        return 1 if self.model.in_chans == 1 else 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image as the model sees it, in pixels."""
        side = self.settings["input_size"]
        return (side, side) if isinstance(side, int) else tuple(side)

    def read(self, path: str | Path, whole: bool = False) -> Tensor:
        """An image file as the model sees it, (C, H, W); `whole`: without a crop, at its own ratio.

        Raises:
            UnreadableImageError: the file is no image or damaged.
        """
        picture = load_image(str(path), self.channels)
        settings = dict(self.settings)
        if whole:
            scale = min(self.size) / min(picture.size)
            sides = (picture.height, picture.width)
            settings.update(input_size=tuple(max(_SMALLEST, round(scale * side)) for side in sides))
            settings.update(crop_pct=1.0, crop_mode="squash")
        return build_transform(train=False, **settings)(picture)

    def picture(self, image: Tensor) -> np.ndarray:
        """What the model sees as (H, W, 3) in 0 .. 1."""
        return as_picture(image, self.settings["mean"], self.settings["std"])

    def label(self, text: str) -> int:
        """Number of a class from its number or name.

        Raises:
            UsageError: there is no such class.
        """
        if text.lstrip("-").isdigit() and text not in self.classes:
            if 0 <= int(text) < len(self.classes):
                return int(text)
            raise UsageError(f"{self.name} has classes 0 to {len(self.classes) - 1}, got {text}")
        if text in self.classes:
            return self.classes.index(text)
        raise UsageError(f"{self.name} has no class {text!r}.{suggest(text, self.classes)}")


def load_subject(
    name: str,
    checkpoint: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    size: Sequence[int] | None = None,
    device: str | None = None,
) -> Subject:
    """A model by the name of its variant or by the config of a classifier or a U-Net.

    Args:
        name: of a model, or path of a config, which ends with ``.py``.
        checkpoint: file with weights, official, ours or of a training run; None leaves the initial ones.
        overrides: keywords of `create_model`, for a name.
        size: side, or height and width, of the images; by default those of the model or config.
        device: where to compute; a GPU if there is one by default.

    Raises:
        UsageError, KeyError, TypeError, FileNotFoundError, CheckpointError: what was given is unknown or does not fit.
    """
    overrides = dict(overrides or {})
    if name.endswith(".py"):
        if overrides:
            raise UsageError("--options are keywords of a model by name; a config has its own")
        subject = _from_config(name, load_config(name), checkpoint)
    else:
        subject = _from_name(name, checkpoint, overrides)
    if size is not None:
        if min(size) < _SMALLEST:
            raise UsageError(f"--size must be at least {_SMALLEST} pixels, got {' '.join(map(str, size))}")
        subject.settings["input_size"] = (size[0], size[-1])
    subject.model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return subject


def _from_name(name: str, checkpoint: str | None, overrides: dict[str, Any]) -> Subject:
    held = None
    if checkpoint is None:
        model = create_model(name, **overrides)
    else:
        model, held = model_from_file(name, checkpoint, **overrides)
    settings = transform_settings(model, 1 if model.in_chans == 1 else 3)
    classes = class_names(held, model.num_classes)
    if isinstance(model, UNet):  # what they are trained on is in 0 .. 1
        settings.update(_unscaled(settings["channels"]))
    return Subject(name, model, classes, settings, checkpoint)


def _from_config(path: str, cfg: Config, checkpoint: str | None) -> Subject:
    options = cfg.get("model", {})
    kind, name = options.get("type"), Path(path).stem
    dataset = (cfg.get("test_dataloader") or cfg.get("val_dataloader") or {}).get("dataset", {})
    held = None if checkpoint is None else read_checkpoint(checkpoint)
    if kind == "vision_ssm.ImageClassifier":
        classifier = MODELS.build({**options, "pretrained": None, "reset_head": False})
        if checkpoint is not None:
            load_classifier(classifier.backbone, checkpoint)
        channels = dataset.get("channels", 3)
        # the evaluation's transform, with the statistics that it takes by default
        defaults = transform_settings(dict(input_size=(channels, 224, 224)), channels)
        settings = {**defaults, **{key: value for key, value in dataset.transform.items() if key != "train"}}
        return Subject(name, classifier.backbone, class_names(held, classifier.num_classes), settings, checkpoint)
    if kind == "vision_ssm.MedicalSegmentor":
        segmentor = MODELS.build({**options, "pretrained": None})
        if checkpoint is not None:
            load_weights(segmentor.unet, checkpoint, verbose=False)
        channels = 1 if segmentor.unet.in_chans == 1 else 3
        settings = {**transform_settings(segmentor.unet, channels), **_unscaled(channels)}
        if segmentor.scale is not None:
            settings.update(mean=segmentor.scale.mean.ravel().tolist(), std=segmentor.scale.std.ravel().tolist())
        if segmentor.inference.get("size"):
            settings["input_size"] = tuple(segmentor.inference["size"])
        return Subject(name, segmentor.unet, class_names(held, segmentor.num_classes), settings, checkpoint)
    raise UsageError(f"{path} is a config of {kind!r}; a classifier's or a U-Net's is needed, or the name of a model")


def _unscaled(channels: int) -> dict[str, Any]:
    return dict(mean=(0.0,) * channels, std=(1.0,) * channels)

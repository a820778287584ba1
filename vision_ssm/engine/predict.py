"""Predictions for image files: from a run's config and checkpoint, or from a model's name and a weight file."""

import ast
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vision_ssm.data import EXTENSIONS, UnreadableImageError, build_transform, load_image, transform_settings
from vision_ssm.factory import create_model, find_family, list_models
from vision_ssm.published import split_tag
from vision_ssm.registry import DATASETS, MODELS
from vision_ssm.weights import load_weights, read_checkpoint, unwrap

from .config import UsageError, checked_device
from .timm_models import load_classifier

IMAGENET_CLASSES = 1000


def image_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The images among `inputs`; folders are searched with all their subfolders, hidden files and folders aside.

    Raises:
        UsageError: an input that does not exist, or no image at all.
    """
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            files += sorted(file for file in item.rglob("*") if _is_image(file.relative_to(item)) and file.is_file())
        elif item.is_file():
            files.append(item)
        else:
            raise UsageError(f"{item} is neither an image nor a folder")
    if not files:
        raise UsageError(f"no image in {', '.join(map(str, inputs))} (looked for {', '.join(EXTENSIONS)})")
    return files


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)  # such as what editors and macOS leave beside images
    return not hidden and path.name.lower().endswith(EXTENSIONS)


def stored_class_names(checkpoint: Any, count: int) -> tuple[str, ...] | None:
    """Names of `count` classes that training stored in a checkpoint, if it did."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    stored = (meta.get("dataset_meta") or {}).get("classes", ()) if isinstance(meta, dict) else ()
    return tuple(stored) if count and len(stored) == count else None


def stored_config(checkpoint: Any) -> dict[str, Any]:
    """The config of the run that a checkpoint comes from, as far as it is data; nothing for other files.

    It is text in the checkpoint, which is read and not run.
    """
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    text = meta.get("cfg") if isinstance(meta, dict) else None
    parts: dict[str, Any] = {}
    try:
        statements = ast.parse(text).body if isinstance(text, str) else []
    except SyntaxError:
        return {}
    for node in statements:
        with suppress(ValueError, TypeError, AttributeError):  # no data, or no name
            parts[node.targets[0].id] = _literal(node.value)  # type: ignore[attr-defined]
    return parts


def stored_keywords(checkpoint: Any, name: str) -> dict[str, Any]:
    """Keywords of `create_model` with which the run of a checkpoint built the variant `name`; none for other files."""
    model = stored_config(checkpoint).get("model")
    for part in ("backbone", "unet"):
        options = model.get(part) if isinstance(model, dict) else None
        if isinstance(options, dict) and split_tag(str(options.get("name")))[0] == split_tag(name)[0]:
            return {key: value for key, value in options.items() if key not in ("name", "encoder_weights")}
    return {}


def stored_dataset(checkpoint: Any) -> dict[str, Any]:
    """Config of the data set on which the run of a checkpoint evaluated; nothing for other files."""
    parts = stored_config(checkpoint)
    loader = parts.get("test_dataloader") or parts.get("val_dataloader")
    dataset = loader.get("dataset") if isinstance(loader, dict) else None
    return dataset if isinstance(dataset, dict) else {}


def stored_transform(checkpoint: Any) -> dict[str, Any]:
    """Keywords of `build_transform` with which the run of a checkpoint evaluated; none for other files."""
    transform = stored_dataset(checkpoint).get("transform")
    return dict(transform) if isinstance(transform, dict) else {}


def _literal(node: ast.expr) -> Any:
    """The value of an expression of literals, ``dict(key=...)`` and ``dict({...})``; `ValueError` for any other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        given = [_literal(argument) for argument in node.args]  # mmengine writes keys so that are no names
        return dict(*given, **{str(keyword.arg): _literal(keyword.value) for keyword in node.keywords})
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    return ast.literal_eval(node)


def class_names(checkpoint: Any, count: int) -> tuple[str, ...]:
    """Names of the classes: those that training stored, else ImageNet's for 1000 classes, else numbers."""
    if stored := stored_class_names(checkpoint, count):
        return stored
    if count == IMAGENET_CLASSES:
        info = ImageNetInfo()
        return tuple(info.index_to_description(index).split(",")[0] for index in range(count))
    return tuple(f"class {index}" for index in range(count))


def weights_form(name: str, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Classes, and channels of the images, of a state dict for model `name`; None where it does not tell."""
    with torch.device("meta"):
        model, other = create_model(name, in_chans=1), create_model(name, in_chans=2)
    own, shapes = model.own_keys(dict(tensors)), {key: value.shape for key, value in other.state_dict().items()}
    first = next(key for key, value in model.state_dict().items() if value.shape != shapes[key])
    classes = own[model.classifier_key].shape[0] if model.classifier_key in own else None
    return classes, own[first].shape[1] if first in own else None


def model_from_file(name: str, weights: str | Path, *, verbose: bool = False, **overrides: Any) -> tuple[Any, Any]:
    """Model `name` with the weights of a file, official or ours, and what the file holds.

    Keywords are those of the run that the file comes from, and classes and channels those of its weights, unless
    `overrides`, keywords of `create_model`, say otherwise. Without a classifier in the file, a backbone is built for
    its maps alone. `verbose` prints the report on all keys; else a warning says what was resampled.
    """
    checkpoint = read_checkpoint(weights)
    with torch.device("meta"):
        sketch = create_model(name)
    classes, channels = weights_form(name, unwrap(checkpoint, str(weights), prefixes=sketch.wrappers))
    found = {key: value for key, value in (("num_classes", classes), ("in_chans", channels)) if value is not None}
    if classes is None and name in list_models() and not sketch.features_only:
        found["features_only"] = True
    model = create_model(name, **{**found, **stored_keywords(checkpoint, name), **overrides})
    report = load_weights(model, weights, verbose=verbose)
    if report.resampled and not verbose:
        tables = ", ".join(f"{key} from {old} to {new}" for key, old, new in report.resampled)
        warnings.warn(f"{weights} is of another image size, position tables are resampled: {tables}", stacklevel=2)
    return model, checkpoint


class Predictor:
    """A classifier in eval mode with its transform and class names.

    Args:
        model: images (B, C, H, W) to logits (B, classes).
        transform: PIL image to tensor (C, H, W).
        channels: channels of the images, 1 or 3.
        classes: name of each class.
        device: where to compute; a GPU if there is one by default.

    Attributes:
        only_size: height and width that images must have, where another size would change what they show.
    """

    only_size: tuple[int, int] | None = None

    def __init__(
        self, model: nn.Module, transform: Any, channels: int, classes: Sequence[str], device: str | None = None
    ) -> None:
        self.device = checked_device(device)
        self.model = model.eval().to(self.device)
        self.transform = transform
        self.channels = channels
        self.classes = tuple(classes)

    @classmethod
    def from_config(
        cls, cfg: Config, checkpoint: str | Path, device: str | None = None, size: Sequence[int] | None = None
    ) -> "Predictor":
        """The model of a config with the weights of one of its checkpoints, and the transform of its validation.

        `size`, height and width of the images for the model, goes before that of the transform.
        """
        options = cfg.get("model", {})
        if options.get("type") != "vision_ssm.ImageClassifier":
            raise UsageError(f"prediction needs a config of an ImageClassifier, this one is of {options.get('type')!r}")
        classifier = MODELS.build({**options, "pretrained": None, "reset_head": False})
        load_classifier(classifier.backbone, checkpoint)
        dataset = (cfg.get("test_dataloader") or cfg.val_dataloader).dataset
        channels = dataset.get("channels", 3)
        settings = {"channels": channels, **dataset.transform}
        if size is not None:
            settings["input_size"] = tuple(size)
        transform = build_transform(**settings)
        classes = class_names(read_checkpoint(checkpoint), classifier.num_classes)
        return cls(classifier.backbone, transform, channels, classes, device)._for_images_of(dataset)

    @classmethod
    def from_weights(
        cls, name: str, weights: str | Path, device: str | None = None, size: Sequence[int] | None = None
    ) -> "Predictor":
        """Model `name` with a weight file, official or ours; classes and channels are those of the file.

        `size`, height and width of the images for the model, goes before that of the transform.
        """
        find_family(name)  # a backbone, or an error that names some
        model, checkpoint = model_from_file(name, weights)
        if not model.num_classes:
            raise UsageError(f"{weights} holds no classifier of {name}, so there is nothing to predict with")
        settings = dict(train=False, **transform_settings(model, model.in_chans))
        settings.update(stored_transform(checkpoint))  # what a run evaluated with goes before what the variant has
        if size is not None:
            settings["input_size"] = tuple(size)
        classes = class_names(checkpoint, model.num_classes)
        predictor = cls(model, build_transform(**settings), model.in_chans, classes, device)
        return predictor._for_images_of(stored_dataset(checkpoint))

    def _for_images_of(self, dataset: Mapping[str, Any]) -> "Predictor":
        """Take images of the size that the model sees alone, where they are not to be resized."""
        kind = dataset.get("type")
        if isinstance(kind, str) and getattr(DATASETS.get(kind), "keeps_size", False):
            blank = Image.new("L" if self.channels == 1 else "RGB", (8, 8))
            self.only_size = tuple(self.transform(blank).shape[1:])
        return self

    @torch.inference_mode()
    def __call__(
        self, files: Sequence[str | Path], top: int = 5, batch_size: int = 32
    ) -> dict[str, list[tuple[str, float]]]:
        """The `top` most probable classes of each image, as {file: [(class, probability), ...]}.

        Unreadable images are left out with a warning each.

        Raises:
            UsageError: an image of another size than `only_size`.
        """
        top = min(top, len(self.classes))
        results: dict[str, list[tuple[str, float]]] = {}
        for start in range(0, len(files), batch_size):
            names, images = [], []
            for file in files[start : start + batch_size]:
                try:
                    image = load_image(str(file), self.channels)
                except UnreadableImageError as error:
                    warnings.warn(f"{error}; left out", stacklevel=2)
                    continue
                if self.only_size not in (None, image.size[::-1]):
                    raise UsageError(
                        f"{file} has {image.size[1]} x {image.size[0]} pixels, the model would get it in"
                        f" {' x '.join(map(str, self.only_size))}, and pictures of this kind change with their size:"
                        f" give --size {image.size[1]} {image.size[0]}"
                    )
                images.append(self.transform(image))
                names.append(str(file))
            if not images:
                continue
            logits = self.model(torch.stack(images).to(self.device))  # (B, classes)
            values, indices = logits.float().softmax(1).topk(top)
            for name, row, column in zip(names, values.tolist(), indices.tolist(), strict=True):
                results[name] = [(self.classes[index], value) for index, value in zip(column, row, strict=True)]
        return results

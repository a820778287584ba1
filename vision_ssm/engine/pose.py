"""Top-down pose estimation on the Runner: a backbone, a heat map per keypoint, and the way back to the image.

Head and decoding after Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking" (arXiv:1804.06208), and
Sun et al., "Deep High-Resolution Representation Learning" (arXiv:1902.09212); the backbone of arXiv:2410.03174 needs no
transposed convolution. The names of the head's tensors are those that checkpoints of such models commonly have.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from vision_ssm.data import KeypointSet, TopDownTransform, UnreadableImageError, collate_poses, load_image
from vision_ssm.data.top_down import apply_matrix
from vision_ssm.factory import create_model
from vision_ssm.ops.autocast import without_autocast
from vision_ssm.registry import MODELS, suggest
from vision_ssm.weights import CheckpointError, LoadReport, load_weights, read_checkpoint, unwrap

from .config import UsageError, checked_device
from .official import find_pretrained
from .pose_figures import draw_pose_grid
from .whole_model import load_whole_model

MODES = ("tensor", "loss", "predict")
PCK_THRESHOLD = 0.05


class HeatmapHead(nn.Module):
    """Heat maps (B, K, H, W) from a map (B, C, H', W'): transposed convolutions, each doubling the sides, then 1 x 1.

    Args:
        in_channels: C.
        num_keypoints: K.
        deconv_channels: width of each 4 x 4 transposed convolution, with batch norm and ReLU; may be empty.
    """

    def __init__(self, in_channels: int, num_keypoints: int, deconv_channels: Sequence[int] = ()) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for width in deconv_channels:
            steps += [
                nn.ConvTranspose2d(in_channels, width, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        self.deconv_layers = nn.Sequential(*steps)
        self.final_layer = nn.Conv2d(in_channels, num_keypoints, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)  # maps are 0 nearly everywhere, and begin so
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.deconv_layers(x))


def heat_map_peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Place and height of each map's maximum.

    Args:
        maps: (B, K, H, W).

    Returns:
        Points (B, K, 2) float32, x and y in pixels of the map, and values (B, K).
    """
    width = maps.shape[3]
    values, places = maps.flatten(2).max(2)  # (B, K)
    return torch.stack([places % width, places // width], -1).float(), values


def decode_heat_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Keypoints of heat maps: the maximum, moved a quarter of a pixel towards the higher one of its two neighbours in
    either direction, where it has two.

    Args:
        maps: (B, K, H, W).

    Returns:
        Points (B, K, 2) float32, x and y in pixels of the map, and scores (B, K), the height of the maximum.
    """
    height, width = maps.shape[2:]
    points, scores = heat_map_peaks(maps)
    flat = maps.flatten(2)  # (B, K, H * W)
    place = (points[..., 1] * width + points[..., 0]).long()  # (B, K)
    moves = []
    for axis, (step, size) in enumerate(((1, width), (width, height))):
        inner = (points[..., axis] >= 1) & (points[..., axis] < size - 1)
        after, before = (
            flat.gather(2, (place + side * step).clamp(0, flat.shape[2] - 1)[..., None])[..., 0] for side in (1, -1)
        )
        moves.append(torch.where(inner, torch.sign(after - before), 0) * 0.25)
    return points + torch.stack(moves, -1), scores


def keypoint_accuracy(maps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Share of the keypoints of positive weight whose maximum lies within 0.05 map sizes of the target's (PCK), x
    measured in widths and y in heights. maps, target: (B, K, H, W); weight: (B, K)."""
    size = torch.tensor(maps.shape[:1:-1], device=maps.device)  # width, height
    distance = ((heat_map_peaks(maps)[0] - heat_map_peaks(target)[0]) / size).norm(dim=-1)  # (B, K)
    known = weight > 0
    return ((distance < PCK_THRESHOLD) & known).sum() / known.sum().clamp(min=1)


def heat_map_loss(maps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over all pixels of all maps; keypoints of weight 0 add nothing. Shapes as above."""
    return ((maps - target).square() * weight[:, :, None, None]).mean()


@MODELS.register_module()
class TopDownPose(BaseModel):
    """Backbone and heat-map head as one model of the Runner; one person per image.

    Args:
        backbone: ``dict(name="hrvmamba_small_pose", **overrides)``, the arguments of `vision_ssm.create_model`. It must
            give one map: ``out_indices=(3,)`` chooses the last of four.
        keypoints: see `KeypointSet.build`; COCO's person by default.
        deconv_channels: widths of the head's transposed convolutions, each doubling the resolution; () for none.
        pretrained: weights for the backbone: a file (official or ours), True for the published ones, which are
            downloaded once, or the tag of one of several.
        flip_test: average with the mirrored image's maps in evaluation.
        shift_heatmap: move the mirrored maps one pixel to the right before that. Map pixel i stands for input pixel
            ``i * stride``, so the maps of an image and of its mirror image are nearly one pixel out of line.

    Attributes:
        stride: pixels of the input per pixel of the heat maps.
    """

    def __init__(
        self,
        backbone: dict,
        keypoints: KeypointSet | Mapping[str, Any] | None = None,
        deconv_channels: Sequence[int] = (),
        pretrained: bool | str | None = None,
        flip_test: bool = True,
        shift_heatmap: bool = True,
    ) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor(non_blocking=True))
        arguments = dict(backbone)
        if "name" not in arguments:
            raise ValueError("backbone needs the name of a model: backbone=dict(name=...)")
        name = arguments.pop("name")
        self.keypoints = KeypointSet.build(keypoints)
        self.backbone = create_model(name, **{**arguments, "features_only": True})
        info = self.backbone.out_info
        if len(info) != 1:
            listed = ", ".join(
                f"{index}: {part['num_chs']} channels at stride {part['reduction']}"
                for index, part in zip(self.backbone.out_indices, info, strict=True)
            )
            raise ValueError(
                f"the head reads one map, {name} gives {len(info)} ({listed}): choose one with "
                "backbone=dict(out_indices=(NUMBER,))"
            )
        if info[0]["reduction"] % 2 ** len(deconv_channels):
            raise ValueError(
                f"{len(deconv_channels)} transposed convolutions make a map of stride {info[0]['reduction']} finer "
                "than the image: leave some of deconv_channels out"
            )
        self.stride = info[0]["reduction"] // 2 ** len(deconv_channels)
        if pretrained:
            file, ema = find_pretrained(self.backbone, name, pretrained)
            report = load_weights(self.backbone, file, ema=ema, adapt_input=True, verbose=False)
            print_log(f"Pretrained weights: {report}", logger="current")
        self.head = HeatmapHead(info[0]["num_chs"], len(self.keypoints), deconv_channels)
        self.flip_test = flip_test
        self.shift_heatmap = shift_heatmap

    def init_weights(self) -> None:
        """Nothing to do: `create_model` and the head have initialised or loaded every weight."""

    def heat_maps(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to heat maps (B, K, H / stride, W / stride)."""
        return self.head(self.backbone(image)[0])

    def forward(
        self,
        image: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        instance: dict[str, Tensor] | None = None,
        path: list[str] | None = None,
        mode: str = "tensor",
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Heat maps (``tensor``), training loss (``loss``) or one result per person (``predict``).

        Args:
            image: (B, 3, H, W).
            target: heat maps (B, K, H / stride, W / stride), for mode ``loss``.
            weight: (B, K), 0 for keypoints that are not to be learned, for mode ``loss``.
            instance: for mode ``predict``: ``inverse`` (B, 2, 3), from the input to the picture, and anything else with
                B entries, which goes into the results.
            path: B file names, for mode ``predict``.
            mode: ``tensor``, ``loss`` or ``predict``.

        Returns:
            ``tensor``: (B, K, H / stride, W / stride). ``loss``: dict with ``loss`` and ``accuracy`` (0 to 1, see
            `keypoint_accuracy`). ``predict``: B dicts with ``keypoints`` (K, 2), x and y in pixels of the picture,
            ``scores`` (K,), ``path`` and what `instance` holds, as NumPy arrays and plain numbers.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}.{suggest(mode, MODES)}")
        if mode == "predict":
            return self._predict(image, instance, path)
        maps = self.heat_maps(image)
        if mode == "tensor":
            return maps
        if target is None or weight is None:
            raise ValueError(
                "mode 'loss' needs target and weight of each image: the dataset of training has "
                "transform=dict(train=True)"
            )
        if maps.shape != target.shape:
            raise ValueError(
                f"the model gives heat maps {tuple(maps.shape)} (stride {self.stride}), the dataset's are "
                f"{tuple(target.shape)}: keypoints must be the same in both, and the dataset's transform needs "
                f"stride={self.stride}, or the model other deconv_channels"
            )
        with without_autocast(image):
            maps = maps.float()
            return {
                "loss": heat_map_loss(maps, target, weight),
                "accuracy": keypoint_accuracy(maps.detach(), target, weight),
            }

    def _tested_maps(self, image: Tensor) -> Tensor:
        maps = self.heat_maps(image).float()
        if not self.flip_test:
            return maps
        mirrored = self.heat_maps(image.flip(3)).float().flip(3)[:, self.keypoints.mirrored]
        if self.shift_heatmap:
            mirrored = torch.cat([mirrored[..., :1], mirrored[..., :-1]], 3)
        return (maps + mirrored) / 2

    def _predict(self, image: Tensor, instance: dict[str, Tensor] | None, path: list[str] | None) -> list[dict]:
        if instance is None or "inverse" not in instance:
            raise ValueError("mode 'predict' needs instance=dict(inverse=...), the way back to the picture")
        maps = self._tested_maps(image).detach()
        points, scores = decode_heat_maps(maps)
        scale = np.array([image.shape[3] / maps.shape[3], image.shape[2] / maps.shape[2]])
        inputs = points.double().cpu().numpy() * scale  # (B, K, 2)
        columns = {key: value.cpu().numpy() for key, value in instance.items()}
        inverse = columns.pop("inverse")
        results = []
        for row, (place, height) in enumerate(zip(inputs, scores.cpu().numpy(), strict=True)):
            others = {
                key: value[row] if value.ndim > 1 else value[row].item() for key, value in columns.items()
            }
            found = dict(keypoints=apply_matrix(inverse[row], place), scores=height, path=path[row] if path else "")
            results.append({**found, **others})
        return results


def load_pose_weights(model: TopDownPose, file: str | os.PathLike) -> LoadReport:
    """Load a checkpoint of a pose model, of a training run of ours or official, backbone and head.

    Returns:
        What became of the backbone's tensors.

    Raises:
        FileNotFoundError, CheckpointError: it cannot be read, or belongs to another model.
    """
    tensors = unwrap(read_checkpoint(file), str(file))
    if not any(key in tensors for key in model.state_dict() if key.startswith("head.")):
        raise CheckpointError(
            f"{file} holds no heat-map head, so it is not of a pose model; weights of a backbone are for "
            "model.pretrained"
        )
    return load_whole_model(model, tensors, str(file))


class PosePredictor:
    """A pose model in eval mode with its transform.

    Args:
        model: a `TopDownPose`.
        transform: of its evaluation.
        device: where to compute; a GPU if there is one by default.
    """

    def __init__(self, model: TopDownPose, transform: TopDownTransform, device: str | None = None) -> None:
        self.device = checked_device(device)
        self.model = model.eval().to(self.device)
        self.transform = transform
        self.keypoints = model.keypoints

    @classmethod
    def from_config(cls, cfg: Config, checkpoint: str | Path, device: str | None = None) -> "PosePredictor":
        """The model of a config with the weights of a checkpoint, of a training run or official.

        Raises:
            UsageError: the config is of another kind of model. FileNotFoundError, CheckpointError: the file cannot be
            read, or belongs to another model.
        """
        options = cfg.get("model", {})
        if options.get("type") != "vision_ssm.TopDownPose":
            raise UsageError(f"pose prediction needs a config of a TopDownPose, this one is of {options.get('type')!r}")
        model = MODELS.build({**options, "pretrained": None})
        load_pose_weights(model, checkpoint)
        dataset = (cfg.get("test_dataloader") or cfg.val_dataloader).dataset
        transform = TopDownTransform(**{"keypoints": model.keypoints, **dataset.transform})
        return cls(model, transform, device)

    @torch.inference_mode()
    def __call__(
        self,
        image_files: Sequence[str | Path],
        boxes: Mapping[str, Sequence[Sequence[float]]] | None = None,
        batch_size: int = 32,
    ) -> dict[str, list[dict[str, Any]]]:
        """Keypoints of the persons on each image.

        Args:
            image_files: files to read; unreadable ones are left out with a warning each.
            boxes: by file name as in `image_files`, the boxes (x, y, width, height) of its persons in pixels; without
                it, or for a file that it lacks, the whole image is the box of one person.
            batch_size: persons that are computed together.

        Returns:
            By file name, one dict per box: ``keypoints`` (K, 2), x and y in pixels of the image, ``scores`` (K,) and
            ``box`` (4,).

        Raises:
            UsageError: a box that is not four numbers with a positive width and height, or boxes of a file that is not
            among `image_files`.
        """
        names = [str(file) for file in image_files]
        given = {str(file): rows for file, rows in (boxes or {}).items()}
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise UsageError(f"boxes for {unknown[0]}, which is not among the images.{suggest(unknown[0], names)}")
        results: dict[str, list[dict[str, Any]]] = {}
        waiting: list[dict[str, Any]] = []
        for name in names:
            try:
                image = np.asarray(load_image(name))
            except UnreadableImageError as error:
                warnings.warn(f"{error}; left out", stacklevel=2)
                continue
            results[name] = []
            for box in given.get(name, [(0, 0, image.shape[1], image.shape[0])]):
                if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) <= 0:
                    raise UsageError(f"a box is x, y, width, height with a positive size, got {box!r} for {name}")
                sample = self.transform.evaluation_sample(image, box)
                pixels = sample.pop("image")
                instance = dict(inverse=sample["inverse"], box=torch.tensor(box, dtype=torch.float64))
                waiting.append(dict(image=pixels, instance=instance, path=name))
            while len(waiting) >= batch_size:
                self._run(waiting[:batch_size], results)
                del waiting[:batch_size]
        if waiting:
            self._run(waiting, results)
        return results

    def _run(self, samples: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> None:
        batch = collate_poses(samples)
        image = batch.pop("image").to(self.device)
        for person in self.model(image, **batch, mode="predict"):
            results[person.pop("path")].append(person)

    def draw(self, results: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "Poses") -> None:
        """A grid of the images with their skeletons, from what `__call__` returned, into a picture file."""
        draw_pose_grid(list(results.items()), path, title, self.keypoints)

"""Segmentation of medical images on the Runner: a U-Net, its losses on slices, and labels of whole volumes.

Recipes after VM-UNet (arXiv:2402.02491), MHS-VM (arXiv:2406.05992) and MSVM-UNet (arXiv:2408.13735): training on 2-D
slices or images of one size, evaluation on volumes that are predicted slice by slice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor

from vision_ssm.data.medical_volume import Volume
from vision_ssm.factory import create_model
from vision_ssm.ops.autocast import without_autocast
from vision_ssm.registry import MODELS, check_keywords, suggest
from vision_ssm.unets import load_encoder

from .medical_inference import keep_largest, predict_volume
from .medical_losses import SegmentationLoss
from .official import find_pretrained

MODES = ("tensor", "loss", "predict")
INFERENCE = ("size", "window", "overlap", "flips", "batch", "amp")
"""Keywords of `predict_volume` that a config or a command line may set."""


class IntensityScale:
    """``(x - mean) / std``: what becomes of the data set's intensities before the network sees them, in training and in
    evaluation.

    Args:
        mean, std: numbers, or one per channel.

    Raises:
        ValueError: a std that is not positive.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        if not np.all(np.asarray(std) > 0):
            raise ValueError(f"normalize: std must be positive, got {std}")
        self.mean, self.std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float to the same, scaled."""
        return (images - images.new_tensor(self.mean)) / images.new_tensor(self.std)


@MODELS.register_module()
class MedicalBatch(BaseDataPreprocessor):
    """Checks a batch of slices, moves it to the device and scales its intensities; volumes stay as they are.

    Args:
        num_classes: labels must lie in 0 .. num_classes - 1; 1 for binary masks, in 0 .. 1.
        scale: of the intensities, or None.
    """

    def __init__(self, num_classes: int, scale: IntensityScale | None = None) -> None:
        super().__init__(non_blocking=True)
        self.num_classes = num_classes
        self.scale = scale

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """``dict(image (B, C, H, W), mask (B, H, W), case, index)`` to image, mask and case on the device;
        ``dict(volume=[Volume, ...])`` unchanged.

        Raises:
            ValueError: a label out of range; the case is named.
        """
        if "volume" in data:
            return {"volume": data["volume"]}
        mask = data["mask"]
        highest = max(self.num_classes - 1, 1)
        outside = (mask < 0) | (mask > highest)
        if outside.any():
            first = int(outside.flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"mask of {data['case'][first]} has label {mask[first][outside[first]][0].item():g}; the model has "
                f"num_classes={self.num_classes}, so labels lie in 0 .. {highest}. Set model.num_classes, or map the "
                "labels in the data set."
            )
        batch = self.cast_data({"image": data["image"], "mask": mask})
        if self.scale is not None:
            batch["image"] = self.scale(batch["image"])
        return {**batch, "case": data["case"]}


@MODELS.register_module()
class MedicalSegmentor(BaseModel):
    """U-Net and loss as one model of the Runner.

    Args:
        unet: ``dict(name="vmunet_synapse", **overrides)``, the arguments of `vision_ssm.create_model`.
        num_classes: classes with the background; 1 for one foreground class through a sigmoid.
        loss: keywords of `SegmentationLoss`.
        normalize: keywords of `IntensityScale`, or None.
        inference: how volumes are predicted: ``size``, ``window``, ``overlap``, ``flips``, ``batch`` and ``amp`` of
            `predict_volume`, and ``keep_largest``: True or labels whose largest connected part alone is kept.
        pretrained: weights of a classifier for the encoder: a file (official or ours), or True for the published ones,
            which are downloaded once.
    """

    def __init__(
        self,
        unet: Mapping[str, Any],
        num_classes: int,
        loss: Mapping[str, Any],
        normalize: Mapping[str, Any] | None = None,
        inference: Mapping[str, Any] | None = None,
        pretrained: bool | str | None = None,
    ) -> None:
        arguments = dict(unet)
        if "name" not in arguments:
            raise ValueError("unet needs the name of a model: unet=dict(name=...)")
        if "num_classes" in arguments:
            raise ValueError("num_classes is the segmentor's and not the unet's: set model.num_classes alone")
        scale = None
        if normalize is not None:
            check_keywords(IntensityScale.__init__, normalize, "normalize")
            scale = IntensityScale(**normalize)
        super().__init__(data_preprocessor=MedicalBatch(num_classes, scale))
        self.num_classes = num_classes
        name = arguments.pop("name")
        self.unet = create_model(name, num_classes=num_classes, **arguments)
        if pretrained:
            file, _ = find_pretrained(self.unet, name, pretrained)
            report = load_encoder(self.unet, file, verbose=False)
            print_log(f"Pretrained weights of the encoder: {report}", logger="current")
        check_keywords(SegmentationLoss.__init__, loss, "loss")
        self.loss = SegmentationLoss(**loss)
        self.scale = scale
        self.inference = self._checked(inference or {})

    @staticmethod
    def _checked(inference: Mapping[str, Any]) -> dict[str, Any]:
        known = (*INFERENCE, "keep_largest")
        for key in inference:
            if key not in known:
                raise TypeError(f"inference has no keyword {key!r}.{suggest(key, known)}")
        return dict(inference)

    def init_weights(self) -> None:
        """Nothing to do: `create_model` has initialised or loaded every weight."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that the U-Net wants free of weight decay, by their names here."""
        names = self.unet.no_weight_decay() if hasattr(self.unet, "no_weight_decay") else ()
        return {f"unet.{name}" for name in names}

    def check_classes(self, classes: Sequence[str]) -> None:
        """`ValueError` unless a data set of these classes, background first, fits the model."""
        wanted = max(self.num_classes, 2)
        if len(classes) != wanted:
            raise ValueError(
                f"the data set has {len(classes)} classes with the background ({', '.join(classes)}), the model "
                f"num_classes={self.num_classes}: set model.num_classes={1 if len(classes) == 2 else len(classes)}"
            )

    def forward(
        self,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        case: Sequence[str] | None = None,
        volume: Sequence[Volume] | None = None,
        mode: str = "tensor",
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor] | list[dict[str, Any]]:
        """Scores (``tensor``), training losses (``loss``) or labels of volumes (``predict``).

        Args:
            image: (B, C, H, W), scaled as `normalize` says, for modes ``tensor`` and ``loss``.
            mask: (B, H, W), int64, or float32 in [0, 1] for binary masks, for mode ``loss``.
            case: names of the images; not used.
            volume: volumes as the data set gives them, intensities not scaled yet, for mode ``predict``.
            mode: ``tensor``, ``loss`` or ``predict``.

        Returns:
            ``tensor``: what the U-Net returns, (B, num_classes, H, W) (a tuple with deep supervision in training mode).
            ``loss``: the losses of `SegmentationLoss`, and ``dice``, see `batch_dice`. ``predict``: per volume a dict
            with ``case``, ``prediction`` (D, H, W) uint8, ``target`` (D, H, W) and ``spacing`` in mm along D, H, W.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}.{suggest(mode, MODES)}")
        if mode == "predict":
            if volume is None:
                raise ValueError("mode 'predict' needs volumes: the data set of validation is one of whole volumes")
            return [self._predict(item) for item in volume]
        if image is None:
            raise ValueError(f"mode {mode!r} needs images: the data set of training is one of slices or images")
        scores = self.unet(image)
        if mode == "tensor":
            return scores
        if mask is None:
            raise ValueError("mode 'loss' needs the masks of the images")
        with without_autocast(image):
            scores = tuple(part.float() for part in scores) if isinstance(scores, tuple) else scores.float()
            losses = self.loss(scores, mask)
            first = scores[0] if isinstance(scores, tuple) else scores
            return {**losses, "dice": batch_dice(first.detach(), mask)}

    def _predict(self, volume: Volume) -> dict[str, Any]:
        if volume.mask is None:
            raise ValueError(f"volume {volume.case} has no mask to compare with; tools/predict.py needs none")
        labels = self.predict_labels(volume.image)
        return dict(case=volume.case, prediction=labels, target=volume.mask, spacing=volume.spacing)

    @torch.no_grad()
    def predict_labels(self, image: np.ndarray, **inference: Any) -> np.ndarray:
        """Labels of a volume.

        Args:
            image: (D, C, H, W) float32, intensities as the data set gives them.
            inference: in place of the model's own settings, see the class.

        Returns:
            (D, H, W) uint8; with ``num_classes == 1`` the foreground is 1.
        """
        options = {**self.inference, **self._checked(inference)}
        kept = options.pop("keep_largest", None)
        if self.scale is not None:
            image = self.scale(torch.from_numpy(image)).numpy()
        labels = predict_volume(self.unet, image, **options)  # where the U-Net is: moving it would split a sharded one
        if kept is None or kept is False:
            return labels
        return keep_largest(labels, None if kept is True else kept)


def batch_dice(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean Dice coefficient (0 to 1) over the foreground classes that a batch, taken as one image, holds or predicts.

    Args:
        scores: (B, K, H, W). mask: (B, H, W) labels; with K = 1, foreground from 0.5 on.

    Returns:
        A number; NaN for a batch without foreground in either.
    """
    count = scores.shape[1]
    if count == 1:
        predicted, target = (scores[:, 0] > 0).long(), (mask >= 0.5).long()
    else:
        predicted, target = scores.argmax(1), mask
    size = max(count, 2)
    pairs = torch.bincount((target * size + predicted).flatten(), minlength=size * size).reshape(size, size).double()
    total = (pairs.sum(0) + pairs.sum(1))[1:]
    dice = 2 * pairs.diagonal()[1:] / total  # NaN for a class that neither has
    return dice.nanmean().float()

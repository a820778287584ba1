"""Image classification on the Runner: a backbone of the library, its head, a loss and batch mixing."""

import logging
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vision_ssm.backbones.base import Backbone
from vision_ssm.ops.autocast import without_autocast
from vision_ssm.registry import MODELS, check_keywords, suggest

from .distillation import Distillation, check_distillation
from .graphs import GraphedCall
from .official import find_pretrained
from .timm_models import create_classifier, load_classifier

LOSSES = {
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "LabelSmoothingCrossEntropy": LabelSmoothingCrossEntropy,
    "SoftTargetCrossEntropy": SoftTargetCrossEntropy,
    "BinaryCrossEntropy": BinaryCrossEntropy,
}
SOFT_LOSSES = ("CrossEntropyLoss", "SoftTargetCrossEntropy", "BinaryCrossEntropy")


def build_loss(loss: dict) -> nn.Module:
    """Loss from ``dict(type=..., **keywords)``: `torch.nn.CrossEntropyLoss` or one of timm's three."""
    keywords = dict(loss)
    name = keywords.pop("type", None)
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}.{suggest(str(name), LOSSES)}")
    check_keywords(LOSSES[name], keywords, f"loss {name}")
    if isinstance(keywords.get("weight"), (list, tuple)):
        keywords["weight"] = torch.tensor(keywords["weight"], dtype=torch.float32)  # one per class
    return LOSSES[name](**keywords)


@MODELS.register_module()
class ImageBatch(BaseDataPreprocessor):
    """Checks a batch, moves it to the device and, in training, mixes it.

    Args:
        num_classes: labels must lie in 0 .. num_classes - 1.
        mixup: keywords of `timm.data.Mixup` (``mixup_alpha``, ``cutmix_alpha``, ``prob``, ``switch_prob``, ``mode``,
            ``label_smoothing``), or None. Mixing needs batches of even size and turns labels into soft targets.
        non_blocking: copy to the device without waiting.
    """

    def __init__(self, num_classes: int, mixup: dict | None = None, non_blocking: bool = True) -> None:
        super().__init__(non_blocking=non_blocking)
        self.num_classes = num_classes
        self.mixup = None
        if mixup is not None:
            check_keywords(Mixup, set(mixup), "mixup")
            self.mixup = Mixup(num_classes=num_classes, **mixup)

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """``dict(image (B, C, H, W), label (B,), path)`` to the same on the device; mixed labels are (B, classes).

        Raises:
            ValueError: a label out of range (the file is named), or an odd batch to be mixed.
        """
        label = data["label"]
        outside = ((label < 0) | (label >= self.num_classes)).nonzero()
        if len(outside):
            first = int(outside[0])
            raise ValueError(
                f"label {int(label[first])} of {data['path'][first]} is out of range: the model has num_classes="
                f"{self.num_classes}. Set model.num_classes to the number of class folders."
            )
        batch = self.cast_data({"image": data["image"], "label": label})
        if training and self.mixup is not None:
            if len(batch["image"]) % 2:
                raise ValueError(
                    f"mixup and cutmix pair the images of a batch, but it holds {len(batch['image'])}: use an even "
                    "batch_size and drop_last=True in train_dataloader"
                )
            # timm mixes in place, and without a copy to another device the loader's batch would change.
            batch["image"], batch["label"] = self.mixup(batch["image"].clone(), batch["label"])
        return {**batch, "path": data["path"]}


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Backbone, head and loss as one model of the Runner.

    Args:
        backbone: ``dict(name="vmamba_tiny_s1l8", **overrides)``, the arguments of `vision_ssm.create_model`. A
            model of timm serves as a baseline: ``dict(name="timm:deit_tiny_patch16_224", **keywords)``.
        num_classes: number of classes.
        loss: ``dict(type=...)``: CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy or
            BinaryCrossEntropy with their keywords. Mixed batches have soft targets and need one that takes them.
        mixup: keywords of `timm.data.Mixup`, or None.
        pretrained: weights for the backbone: a file (official or ours), True for the published ones, which are
            downloaded once, or the tag of one of several. If they were trained for another number of classes, this is
            an error unless `reset_head` is set.
        reset_head: keep the freshly initialised head instead of the one of `pretrained`.
        cuda_graphs: run the backbone through CUDA graphs in mode ``loss`` of training (see `GraphedCall`). Needs a
            CUDA device and an optimizer step after every iteration; the Runner refuses what does not fit.
        distillation: keywords of `Distillation` (``teacher``, ``checkpoint``, ``kind``, ``alpha``, ``temperature``,
            ``autocast``), for a model with two classifiers. Without it, or with kind ``"none"``, such a model learns
            with its first classifier alone, and the second one, which nothing would teach, is frozen.
    """

    def __init__(
        self,
        backbone: dict,
        num_classes: int,
        loss: dict,
        mixup: dict | None = None,
        pretrained: bool | str | None = None,
        reset_head: bool = False,
        cuda_graphs: bool = False,
        distillation: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=ImageBatch(num_classes, mixup))
        if mixup is not None and loss.get("type") not in SOFT_LOSSES:
            raise ValueError(
                f"mixup gives soft targets, which loss {loss.get('type')!r} does not take; use one of "
                f"{', '.join(SOFT_LOSSES)} (label smoothing is then mixup's label_smoothing)"
            )
        if mixup is None and loss.get("type") == "SoftTargetCrossEntropy":
            raise ValueError("SoftTargetCrossEntropy needs soft targets: set mixup=dict(...) or use another loss")
        if reset_head and not pretrained:
            raise ValueError(
                "reset_head=True says what to do with pretrained weights; set pretrained=FILE, or True, as well"
            )
        arguments = dict(backbone)
        if "name" not in arguments:
            raise ValueError("backbone needs the name of a model: backbone=dict(name=...)")
        self.num_classes = num_classes
        name = arguments.pop("name")
        self.backbone: Any = create_classifier(name, num_classes, **arguments)
        if pretrained:
            file, ema = find_pretrained(self.backbone, name, pretrained)
            report = load_classifier(self.backbone, file, reset_head, adapt_input=True, ema=ema)
            print_log(f"Pretrained weights: {report}", logger="current")
        self.loss = build_loss(loss)
        self.graphed = GraphedCall(self.backbone) if cuda_graphs else None
        keywords = check_distillation(distillation)
        self.distillation = None
        if keywords is not None:
            if not isinstance(self.backbone, Backbone):
                raise ValueError(f"distillation teaches models of this library; {backbone['name']} is one of timm's")
            self.distillation = Distillation(num_classes, self.backbone.in_chans, **keywords)
        elif isinstance(self.backbone, Backbone) and (untaught := self.backbone.taught_parameters()):
            for parameter in untaught:
                parameter.requires_grad_(False)
            print_log(
                "The classifier that learns from a teacher is frozen, because no distillation is set; evaluation still "
                "averages it with the other one. backbone.distilled=False leaves it out.",
                logger="current",
                level=logging.WARNING,
            )

    def init_weights(self) -> None:
        """Nothing to do: `create_classifier` has initialised or loaded every weight."""

    def forward(
        self, image: Tensor, label: Tensor | None = None, path: list[str] | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict]:
        """Logits (``tensor``), training loss (``loss``) or one result per image (``predict``).

        Args:
            image: (B, C, H, W).
            label: class indices (B,), or soft targets (B, num_classes) for mode ``loss``; not used in mode ``tensor``.
            path: B file names, for mode ``predict``.
            mode: ``tensor``, ``loss`` or ``predict``.

        Returns:
            ``tensor``: what the backbone returns, logits (B, num_classes) (two of them from a model with two
            classifiers in training mode). ``loss``: dict with ``loss`` and ``top1`` (%, against the label of largest
            weight). ``predict``: B dicts with ``logits`` (num_classes,) float32, ``label`` and ``path``.
        """
        teacher = self.distillation.teach(image) if self.distillation is not None and mode == "loss" else None
        graphed = self.graphed if mode == "loss" else None
        outputs = self.backbone(image) if graphed is None else graphed(image)
        if mode == "tensor":
            return outputs
        if label is None:
            raise ValueError(f"mode {mode!r} needs the labels of the images; mode 'tensor' gives logits without them")
        logits = (outputs[0] if isinstance(outputs, tuple) else outputs).float()
        if mode == "loss":
            hard = label if label.ndim == 1 else label.argmax(1)
            top1 = (logits.detach().argmax(1) == hard).float().mean() * 100
            with without_autocast(image):
                loss = self.loss(logits, label)
                if self.distillation is not None:
                    loss = self.distillation(loss, outputs, teacher)
            return {"loss": loss, "top1": top1}
        if mode == "predict":
            rows = zip(logits, label.tolist(), path or [""] * len(logits), strict=True)
            return [dict(logits=row, label=truth, path=file) for row, truth, file in rows]
        raise ValueError(f"unknown mode {mode!r}.{suggest(mode, ('tensor', 'loss', 'predict'))}")

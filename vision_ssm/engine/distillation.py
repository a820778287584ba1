"""Knowledge distillation: a frozen teacher sees the images of the student and adds its part to the loss.

As in DeiT (arXiv 2012.12877): a student with two classifiers learns from the labels with one and from the teacher with
the other (`vision_ssm.layers.DistilledHead`).
"""

from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn import functional as F

from vision_ssm.factory import create_model, find_family, list_models
from vision_ssm.registry import check_keywords, suggest
from vision_ssm.weights import load_weights

from .checkpoint import preserved_rng
from .timm_models import load_classifier

KINDS = ("hard", "soft", "none")


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str = "hard", temperature: float = 1.0) -> Tensor:
    """What the student's second classifier, `logits`, has to learn from the logits of the teacher, both (B, classes).

    ``"hard"``: cross-entropy with the class that the teacher prefers. ``"soft"``: ``T**2 / (B * classes)`` times the
    sum of the Kullback-Leibler divergences from the student's to the teacher's softmax at temperature T.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    ours, theirs = (F.log_softmax(values / temperature, dim=1) for values in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2 / logits.numel()


def check_distillation(distillation: dict | None) -> dict | None:
    """Keywords of `Distillation` for a config's ``distillation``; None where nothing is to be distilled."""
    if distillation is None:
        return None
    keywords = dict(distillation)
    check_keywords(Distillation, keywords, "distillation")
    kind = keywords.get("kind", "hard")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of distillation {kind!r}.{suggest(str(kind), KINDS)}")
    return None if kind == "none" else keywords


class Distillation:
    """``(1 - alpha) * base + alpha * distillation_loss(second logits, teacher(image))``.

    The teacher is no part of any module: it is neither saved with the student nor averaged, optimised, wrapped or
    switched to training mode, and copies and pickles of this object have none. `prepare` makes it, at the latest in the
    first iteration; making it leaves the random generators as they were, so that it has no part in a resume either.

    Args:
        num_classes: classes of student and teacher.
        in_chans: channels of the images.
        teacher: a model of this library or of timm by name, such as ``"regnety_160.deit_in1k"``.
        checkpoint: file with the teacher's weights.
        kind: ``"hard"`` or ``"soft"``, see `distillation_loss`.
        alpha: weight of the teacher, in [0, 1].
        temperature: of the softmax of kind ``"soft"``.
        autocast: let the teacher compute in the precision of the training step; float32 otherwise, as in the originals.

    Raises:
        ValueError, KeyError: a wrong or missing option. Nothing is read before `prepare`.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        *,
        teacher: str | None = None,
        checkpoint: str | None = None,
        kind: str = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        autocast: bool = False,
    ) -> None:
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise ValueError(
                f"distillation needs alpha in [0, 1] and a temperature above 0, got {alpha} and {temperature}"
            )
        if teacher is None or checkpoint is None:
            raise ValueError(
                "distillation needs a teacher with weights: distillation=dict(teacher=NAME, checkpoint=FILE), or "
                "kind='none' to train without one"
            )
        self.ours = teacher in list_models()
        if not self.ours and not timm.is_model(teacher):
            hint = suggest(teacher, [*list_models(), *timm.list_models()])
            raise KeyError(f"unknown teacher {teacher!r}, neither a model of timm nor of ours.{hint}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.teacher, self.checkpoint = teacher, Path(checkpoint)
        self.kind, self.alpha, self.temperature, self.autocast = kind, alpha, temperature, autocast
        self._model: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def prepare(self, device: torch.device | str) -> nn.Module:
        """The teacher, frozen and in evaluation mode, on `device`; made and loaded in the first call.

        Raises:
            FileNotFoundError: there is no checkpoint; the message says what to download. CheckpointError: it does not
                fit the teacher.
        """
        if self._model is None:
            if not self.checkpoint.is_file():
                raise FileNotFoundError(
                    f"the teacher {self.teacher} needs its weights in {self.checkpoint}, which does not exist."
                    f"{self._advice()} Set model.distillation.checkpoint=FILE if they lie elsewhere, or "
                    "model.distillation.kind=none to train without a teacher."
                )
            with preserved_rng():
                self._model = self._load().requires_grad_(False).eval()
            print_log(f"Teacher {self.teacher} with the weights of {self.checkpoint}", logger="current")
        return self._model.to(device)

    def _advice(self) -> str:
        if self.ours:
            url = find_family(self.teacher).published.get(self.teacher, {}).get("url")
        else:
            settings = timm.get_pretrained_cfg(self.teacher)
            url = settings.url if settings else None
        return f" Download {url} to that place." if url else ""

    def _load(self) -> nn.Module:
        if self.ours:
            model = create_model(self.teacher, num_classes=self.num_classes, in_chans=self.in_chans)
            load_weights(model, self.checkpoint, verbose=False)
            return model
        model = timm.create_model(self.teacher, num_classes=self.num_classes, in_chans=self.in_chans)
        called = f"the teacher {self.teacher} with {self.num_classes} classes and {self.in_chans} channels"
        load_classifier(model, self.checkpoint, called=called)
        return model

    @torch.no_grad()
    def teach(self, image: Tensor) -> Tensor:
        """image: (B, in_chans, H, W), as the student sees it. Returns the teacher's logits, (B, num_classes)."""
        teacher, kind = self.prepare(image.device), image.device.type
        enabled = self.autocast and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=enabled):
            return teacher(image).float()

    def __call__(self, base: Tensor, outputs: Any, teacher: Tensor) -> Tensor:
        """The whole loss.

        Args:
            base: loss of the first classifier, with the labels.
            outputs: of the student in training, a pair of logits (B, num_classes).
            teacher: what `teach` returned.

        Raises:
            TypeError: the student has one classifier only.
        """
        if not (isinstance(outputs, tuple) and len(outputs) == 2):
            raise TypeError(
                "distillation needs a model with two classifiers, which returns a pair of logits in training; this one "
                f"returns {type(outputs).__name__}. Take a distilled model (backbone=dict(..., distilled=True), where "
                "the family has it) or leave distillation out"
            )
        lesson = distillation_loss(outputs[1].float(), teacher, self.kind, self.temperature)
        return (1 - self.alpha) * base + self.alpha * lesson

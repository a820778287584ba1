"""Hooks of medical runs: an encoder that rests at first, a stop when the loss stands still, pictures and tables."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from vision_ssm.registry import HOOKS

from .checkpoint import write_text
from .figures import draw_pictures
from .hooks import RecordHook, counts_iterations, finished, position_in_words
from .medical_figures import class_colors, class_legend, grey_range, overlay, picture_of_slice, shown_slices
from .medical_metrics import VolumeEvaluation, VolumeMetric
from .medical_scores import SCORES


@HOOKS.register_module()
class FreezeEncoderHook(Hook):
    """Trains without the U-Net's encoder in the first epochs, as MSVM-UNet does behind pretrained weights.

    Which epochs these are depends on the epoch alone, so a resumed run goes on as an unbroken one.

    Args:
        epochs: how many epochs the encoder stays as it is.
    """

    priority = "NORMAL"

    def __init__(self, epochs: int) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}; leave the hook out to train everything")
        self.epochs = epochs

    def before_train(self, runner: Runner) -> None:
        if counts_iterations(runner):
            raise ValueError("FreezeEncoderHook counts epochs, and this run counts iterations: set train_cfg.by_epoch")
        if not hasattr(getattr(runner.bare_model, "unet", None), "encoder"):
            raise ValueError(f"FreezeEncoderHook needs a U-Net with an encoder; the model is {runner.model_name}")
        ddp = runner.distributed and not runner.cfg.get("fsdp")
        if ddp and not runner.cfg.get("find_unused_parameters", False):
            raise ValueError("with several processes a frozen encoder needs find_unused_parameters=True in the config")

    def before_train_epoch(self, runner: Runner) -> None:
        frozen = runner.epoch < self.epochs
        for parameter in runner.bare_model.unet.encoder.parameters():
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None


@HOOKS.register_module()
class StopOnPlateauHook(Hook):
    """Ends training when the mean training loss of an epoch has not fallen for some epochs.

    The losses are those of `RecordHook`, which a checkpoint holds, so a resumed run stops where an unbroken one does.
    The epoch after which training stops is validated.

    Args:
        patience: epochs without a new least loss.
    """

    priority = "LOW"  # behind the record, before the checkpoint

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, got {patience}")
        self.patience = patience

    def before_train(self, runner: Runner) -> None:
        if counts_iterations(runner):
            raise ValueError("StopOnPlateauHook counts epochs, and this run counts iterations: set train_cfg.by_epoch")
        loop: Any = runner.train_loop
        loop.stop_training = loop.stop_training or self._stands_still(runner, runner.epoch)

    def after_train_epoch(self, runner: Runner) -> None:
        done = runner.epoch + 1
        if done < runner.max_epochs and self._stands_still(runner, done):
            loop: Any = runner.train_loop
            loop.position["validation_due"] = loop.position["validation_due"] or runner.val_loop is not None
            loop.stop_training = True
            runner.logger.info(f"No lower training loss in {self.patience} epochs: training ends after epoch {done}")

    def _stands_still(self, runner: Runner, done: int) -> bool:
        """Whether the least loss of the first `done` epochs is at least `patience` epochs old."""
        record = next((hook for hook in runner.hooks if isinstance(hook, RecordHook)), None)
        if record is None:
            raise ValueError("StopOnPlateauHook needs RecordHook, whose losses it reads: keep default_hooks.record")
        losses = [row["train_loss"] for row in record.epochs() if row["epoch"] <= done]
        return bool(losses) and done - (losses.index(min(losses)) + 1) >= self.patience


def find_volumes(evaluator: Any) -> VolumeEvaluation | None:
    """What the `VolumeMetric` of an evaluator has found last, or None."""
    return next((metric.evaluation for metric in evaluator.metrics if isinstance(metric, VolumeMetric)), None)


def class_summary(evaluation: VolumeEvaluation) -> dict[str, Any]:
    """Scores per class and their means as plain values for JSON; None where a score is not defined."""
    means, counts = evaluation.class_means(), evaluation.outcome_counts()

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    return dict(
        cases=len(evaluation.cases),
        empty_masks=evaluation.rule,
        mean={name: plain(value) for name, value in evaluation.means().items()},
        classes={
            name: {
                **{score: plain(means[score][index]) for score in SCORES},
                **{outcome: int(found[index]) for outcome, found in counts.items()},
            }
            for index, name in enumerate(evaluation.classes)
        },
    )


@HOOKS.register_module()
class MedicalPicturesHook(Hook):
    """Draws predictions.png, truth left of prediction, and writes per_case.csv and per_class.json, after the last
    validation and after a test.

    Args:
        count: slices in the picture, spread over the volumes and in each over the slices with foreground.
        every: also after every so many validations; None for the end only.
    """

    priority = "LOW"

    def __init__(self, count: int = 12, every: int | None = None) -> None:
        if count < 1 or (every is not None and every < 1):
            raise ValueError(f"count and every must be at least 1, got {count} and {every}")
        self.count = count
        self.every = every
        self.validations = 0
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.seen = 0
        self.meta: Mapping[str, Any] = {}

    def before_val_epoch(self, runner: Runner) -> None:
        self.pictures, self.seen = [], 0

    def before_test_epoch(self, runner: Runner) -> None:
        self.pictures, self.seen = [], 0

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._wanted(runner):
            self._keep(runner.val_dataloader.dataset, data_batch, outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._keep(runner.test_dataloader.dataset, data_batch, outputs)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self._wanted(runner):
            self._write(runner, runner.val_evaluator, f"Validation after {position_in_words(runner)}")
        self.validations += 1

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.test_evaluator, "Test")

    def _wanted(self, runner: Runner) -> bool:
        stopped = getattr(runner.train_loop, "stop_training", False)
        due = self.every is not None and (self.validations + 1) % self.every == 0
        return finished(runner) or stopped or due

    def _keep(self, dataset: Any, data_batch: Any, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Draw slices of the volumes of a batch, as many as their share of `count`."""
        if not is_main_process():
            return
        self.meta = dataset.metainfo
        share = math.ceil(self.count / len(dataset))
        step = max(1, len(dataset) // self.count)
        for volume, found in zip(data_batch["volume"], outputs, strict=True):
            self.seen += 1
            if len(self.pictures) >= self.count or (self.seen - 1) % step:
                continue
            labels, target = found["prediction"], found["target"]
            colors = class_colors(dataset.metainfo, int(max(labels.max(), target.max())) + 1)
            limits = grey_range(volume.image)
            for place in shown_slices(np.maximum(labels, target), min(share, self.count - len(self.pictures))):
                picture = picture_of_slice(volume.image[place], limits)
                both = [overlay(picture, part[place], colors, volume.spacing[1:]) for part in (target, labels)]
                name = f"{volume.case} slice {place}" if len(volume.image) > 1 else volume.case
                self.pictures.append((name, np.concatenate(both, axis=1)))

    def _write(self, runner: Runner, evaluator: Any, title: str) -> None:
        if not is_main_process():
            return
        folder = Path(runner.work_dir)
        if self.pictures:
            heading = f"{title}: truth left, prediction right"
            draw_pictures(self.pictures, folder / "predictions.png", heading, class_legend(self.meta))
        self.pictures = []
        evaluation = find_volumes(evaluator)
        if evaluation is not None:
            evaluation.write_csv(folder / "per_case.csv")
            write_text(json.dumps(class_summary(evaluation), indent=1) + "\n", folder / "per_class.json")

"""Hooks of medical training: a frozen encoder in the first epochs, and a stop when the training loss stands still."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from vision_ssm.registry import HOOKS

from .hooks import RecordHook, counts_iterations


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
        if runner.distributed and not runner.cfg.get("find_unused_parameters", False):
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

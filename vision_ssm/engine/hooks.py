"""Hooks of a run: checkpoints, records and curves, pictures, the progress display, and the watch for NaN."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from vision_ssm.registry import HOOKS

from . import figures
from .checkpoint import POINTER, preserved_rng, rng_state, saved_checkpoints, set_rng_state, write_text
from .logs import RoutineFilter, console_handlers
from .metrics import find_evaluation, format_metric
from .sharding import gathered, is_sharded


def counts_iterations(runner: Runner) -> bool:
    """Whether training is measured in iterations instead of epochs."""
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def position_in_words(runner: Runner) -> str:
    """How far training is: ``"epoch 3"`` or ``"iteration 4000"``."""
    return f"iteration {runner.iter}" if counts_iterations(runner) else f"epoch {runner.epoch}"


def finished(runner: Runner) -> bool:
    """Whether the last iteration has been trained, or nothing is being trained."""
    return runner.train_loop is None or runner.iter >= runner.max_iters


def batch_images(batch: Any) -> Sequence:
    """Images of a batch: ours, or those of mmseg and mmdet."""
    if not isinstance(batch, dict):
        return ()
    return batch["image"] if "image" in batch else batch.get("inputs", ())


def batch_files(batch: Any) -> list[str]:
    """Files or cases of the images of a batch, as far as the batch says."""
    if not isinstance(batch, dict):
        return []
    samples = batch.get("data_samples") or ()
    return list(batch.get("path") or batch.get("case") or [getattr(sample, "img_path", "?") for sample in samples])


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Saves the run after epochs and, if asked, between iterations; and the best weights so far.

    A run that counts iterations has no epochs: it is saved every `every_iterations` and after its last iteration.

    Files in the work dir: ``epoch_N.pth`` and ``iter_N.pth`` (everything a resume needs), ``best_METRIC.pth``
    (weights), ``last_checkpoint`` (name of the newest). An older file is deleted only once a newer one is complete.
    With accumulated gradients a checkpoint waits for the next optimizer step, because pending ones are not saved.

    Args:
        every_epochs: epochs between checkpoints; the last epoch is always saved.
        every_iterations: iterations between checkpoints inside of epochs, or None.
        keep: number of resumable checkpoints to keep, at least 1.
        best: metric whose best value is kept, or None.
        greater: whether larger values of `best` are better.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        every_epochs: int = 1,
        every_iterations: int | None = None,
        keep: int = 2,
        best: str | None = "top1",
        greater: bool = True,
    ) -> None:
        if every_epochs < 1 or keep < 1 or (every_iterations is not None and every_iterations < 1):
            raise ValueError(
                "every_epochs, every_iterations and keep must be at least 1, got "
                f"{every_epochs}, {every_iterations} and {keep}"
            )
        self.every_epochs = every_epochs
        self.every_iterations = every_iterations
        self.keep = keep
        self.best = best
        self.greater = greater
        self._due = False

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        self._due = self._due or (self.every_iterations is not None and done % self.every_iterations == 0)
        if counts_iterations(runner):
            epoch_ends = False
            self._due = self._due or done == runner.max_iters
        else:
            epoch_ends = batch_idx + 1 == len(runner.train_dataloader)
        if self._due and not epoch_ends and runner.optim_wrapper.at_boundary(done):
            self._save(runner, f"iter_{done}.pth")

    def after_train_epoch(self, runner: Runner) -> None:
        if counts_iterations(runner):
            return
        done = runner.epoch + 1
        self._due = self._due or done % self.every_epochs == 0 or done == runner.max_epochs
        if self._due and runner.optim_wrapper.at_boundary(runner.iter):
            self._save(runner, f"epoch_{done}.pth")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.best is None or not metrics or runner.train_loop is None:
            return
        if self.best not in metrics:
            raise ValueError(f"CheckpointHook: there is no metric {self.best!r}; the evaluator gives {sorted(metrics)}")
        value = float(metrics[self.best])
        record = runner.message_hub.get_info("best_value")
        if record is None or (value > record if self.greater else value < record):
            runner.message_hub.update_info("best_value", value)
            runner.message_hub.update_info("best_at", position_in_words(runner))
            meta = {"metric": self.best, "value": value}
            name = f"best_{self.best.replace('/', '_')}.pth"
            runner.save_checkpoint(runner.work_dir, name, save_optimizer=False, save_param_scheduler=False, meta=meta)

    def after_train(self, runner: Runner) -> None:
        value = runner.message_hub.get_info("best_value")
        if value is not None:
            where = runner.message_hub.get_info("best_at")
            runner.logger.info(f"Best {self.best}: {format_metric(value)} after {where}")

    def _save(self, runner: Runner, name: str) -> None:
        self._due = False
        runner.save_checkpoint(runner.work_dir, name)
        if not is_main_process():
            return
        folder = Path(runner.work_dir)
        write_text(name + "\n", folder / POINTER)
        for old in saved_checkpoints(folder)[self.keep :]:
            if old.name != name:
                old.unlink()


@HOOKS.register_module()
class RecordHook(Hook):
    """Keeps loss, learning rate and accuracy of the whole run, across resumes; writes history.json and curves.png.

    Loss and accuracy are means over all processes.

    Args:
        seconds: least time between two drawings of curves.png; the last one is always drawn.
        metric: validation metric in curves.png.
        accuracy: output of the model's training step that is drawn with it and recorded as ``train_top1`` (for
            ``"top1"``) or ``train_accuracy``; left out where the model does not give it.
    """

    priority = "BELOW_NORMAL"
    COLUMNS = ("epoch", "loss", "lr", "top1")

    def __init__(self, seconds: float = 60.0, metric: str = "top1", accuracy: str = "top1") -> None:
        self.seconds = seconds
        self.metric = metric
        self.accuracy = accuracy
        self.iterations: list[tuple[float, ...]] = []
        self.validation: list[dict[str, float]] = []
        self._drawn = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        rates = runner.optim_wrapper.get_lr()
        lr = rates.get("base_lr", rates["lr"])[0]
        found = outputs["loss"].detach().float()
        accuracy = outputs[self.accuracy].detach().float().mean() if self.accuracy in outputs else found * math.nan
        values = torch.stack([found, accuracy])
        all_reduce(values, "mean")
        loss, top1 = values.tolist()
        self.iterations.append(((runner.iter + 1) / len(runner.train_dataloader), loss, lr, top1))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if runner.train_loop is None or not self.iterations:
            return
        numbers = {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, Real)}
        epoch = runner.iter / len(runner.train_dataloader)
        self.validation.append({"epoch": round(epoch) if epoch.is_integer() else epoch, **numbers})
        self._write(runner, draw=time.monotonic() - self._drawn > self.seconds)

    def after_train(self, runner: Runner) -> None:
        self._write(runner, draw=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        iterations = torch.tensor(self.iterations, dtype=torch.float64).view(-1, len(self.COLUMNS))
        checkpoint["history"] = {"iterations": iterations, "validation": [dict(row) for row in self.validation]}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and "history" in checkpoint:
            self.iterations = [tuple(row) for row in checkpoint["history"]["iterations"].tolist()]
            self.validation = [dict(row) for row in checkpoint["history"]["validation"]]

    def curves(self) -> figures.Curves:
        """The record as arrays."""
        table = np.asarray(self.iterations, dtype=np.float64).reshape(-1, len(self.COLUMNS))
        epochs, loss, lr, top1 = table.T
        return figures.Curves(epochs, loss, lr, top1, self.validation, self.metric)

    def epochs(self) -> list[dict[str, float]]:
        """One row per epoch: means of the training iterations, then the metrics of its validation."""
        table = np.asarray(self.iterations, dtype=np.float64).reshape(-1, len(self.COLUMNS))
        number = np.ceil(table[:, 0] - 1e-9).astype(int)
        validation = {math.ceil(row["epoch"]): row for row in self.validation}
        rows = []
        for epoch in np.unique(number).tolist():
            _, loss, lr, top1 = table[number == epoch].T
            row = {"epoch": epoch, "train_loss": loss.mean(), "lr": lr[-1]}
            if np.isfinite(top1).all():
                row["train_top1" if self.accuracy == "top1" else "train_accuracy"] = top1.mean()
            metrics = {f"val_{key}": value for key, value in validation.get(epoch, {}).items() if key != "epoch"}
            rows.append({key: value if key == "epoch" else float(value) for key, value in {**row, **metrics}.items()})
        return rows

    def _write(self, runner: Runner, draw: bool) -> None:
        if not is_main_process() or not self.iterations:
            return
        folder = Path(runner.work_dir)
        write_text(json.dumps(self.epochs(), indent=1) + "\n", folder / "history.json")
        if draw:
            figures.draw_curves(self.curves(), folder / "curves.png", folder.name)
            self._drawn = time.monotonic()


@HOOKS.register_module()
class PicturesHook(Hook):
    """Draws confusion_matrix.png and predictions.png, writes per_class.csv, after the last validation and after a test.
    Further sets of a `SeveralValLoop` or `SeveralTestLoop` get files of their own, predictions_NAME.png and so on.

    Args:
        every_epochs: also after every so many epochs; None for the end only.
        count: images in the grid of predictions.
    """

    priority = "LOWEST"  # weights are saved before anything is drawn

    def __init__(self, every_epochs: int | None = None, count: int = 40) -> None:
        self.every_epochs = every_epochs
        self.count = count

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if finished(runner) or (self.every_epochs is not None and runner.epoch % self.every_epochs == 0):
            self._draw_sets(runner.val_loop, Path(runner.work_dir), f"Validation after {position_in_words(runner)}")

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._draw_sets(runner.test_loop, Path(runner.work_dir), "Test")

    def _draw_sets(self, loop: Any, folder: Path, title: str) -> None:
        self.draw(loop.evaluator, folder, title, dataset=loop.dataloader.dataset)
        for name, (loader, evaluator) in getattr(loop, "others", {}).items():
            self.draw(evaluator, folder, f"{title}, {name}", f"_{name}", loader.dataset)

    def draw(self, evaluator: Any, folder: Path, title: str, ending: str = "", dataset: Any = None) -> None:
        """Write the three files for the evaluation that `evaluator` has just done.

        Args:
            evaluator: mmengine's, with a `ClassificationMetric`; otherwise nothing is written.
            folder: where to write.
            title: line above the pictures.
            ending: of the files' names.
            dataset: what was evaluated; its ``picture_of(path)``, where it has one, gives the pictures.
        """
        evaluation = find_evaluation(evaluator)
        if evaluation is None or not is_main_process():
            return
        figures.draw_confusion(evaluation, folder / f"confusion_matrix{ending}.png", title)
        pictures = getattr(dataset, "picture_of", None)
        figures.draw_predictions(evaluation, folder / f"predictions{ending}.png", self.count, title, pictures)
        lines = ["class,images,correct,accuracy,mistaken_for"]
        for row in evaluation.per_class():
            name, mistaken = (json.dumps(text, ensure_ascii=False) for text in (row["name"], row["mistaken_for"]))
            lines.append(f"{name},{row['images']},{row['correct']},{row['accuracy']:.2f},{mistaken}")
        write_text("\n".join(lines) + "\n", folder / f"per_class{ending}.csv")


class _ConsoleStream:
    """Lets a logging handler print above a live progress bar."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def write(self, text: str) -> None:
        if text.strip():
            self.console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""


@HOOKS.register_module()
class ProgressHook(Hook):
    """A live bar with loss, throughput and remaining time on a terminal; elsewhere the same numbers in log lines.

    Args:
        window: iterations over which throughput is averaged.
        stream: where to look for a terminal, standard output by default.
    """

    priority = "NORMAL"

    def __init__(self, window: int = 30, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.window = window
        self.progress: Progress | None = None

    def before_train(self, runner: Runner) -> None:
        self._times: deque[tuple[float, int]] = deque(maxlen=self.window + 1)
        if not is_main_process():
            return
        console = Console(file=self.stream or sys.stdout)
        if not console.is_terminal:
            return
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        for handler in console_handlers(runner.logger):
            handler.setStream(_ConsoleStream(console))
            handler.addFilter(RoutineFilter(("Epoch(train)", "Iter(train)")))
        self.task = self.progress.add_task("", total=runner.max_iters, completed=runner.iter, numbers="")
        self.progress.start()

    def before_train_epoch(self, runner: Runner) -> None:
        self._times.clear()
        self._describe_training(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._times.append((time.perf_counter(), len(batch_images(data_batch)) * runner.world_size))
        seen = sum(count for _, count in list(self._times)[1:])
        seconds = self._times[-1][0] - self._times[0][0]
        if not seen:
            return
        speed = seen / max(seconds, 1e-9)
        runner.message_hub.update_scalar("train/images_per_second", speed)
        if self.progress is not None:
            numbers = f"loss {outputs['loss'].item():.4f}  {speed:,.0f} images/s"
            self.progress.update(self.task, completed=runner.iter + 1, numbers=numbers)

    def before_val_epoch(self, runner: Runner) -> None:
        self._describe("validating")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._times.clear()
        self._describe_training(runner)

    def end_display(self, runner: Runner) -> None:
        """Take the bar down; the runner calls this at the end of training and when a run breaks off."""
        if self.progress is not None:
            self.progress.stop()

    def _describe_training(self, runner: Runner) -> None:
        if runner.train_loop is not None:
            epoch = f"epoch {min(runner.epoch + 1, runner.max_epochs)}/{runner.max_epochs}"
            self._describe("training" if counts_iterations(runner) else epoch)

    def _describe(self, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, description=text, refresh=True)  # a short epoch may end before the next one


class NonFiniteError(FloatingPointError):
    """Training met a NaN or an infinity; the message says where it arose."""


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stops training at the first non-finite loss or gradient, before weights change, and names where it arises.

    The iteration is repeated with the same images and random numbers, watching every module. Needs an optimizer wrapper
    of type ``vision_ssm.MixedPrecisionOptimWrapper``.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        self.runner = runner
        if self._guard not in runner.optim_wrapper.guards:
            runner.optim_wrapper.guards.append(self._guard)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._batch, self._rng = data_batch, rng_state()

    def _guard(self, what: str, value: Tensor) -> None:
        runner = self.runner
        model = runner.bare_model
        wrapper = runner.optim_wrapper
        broken = torch.isfinite(value).all().logical_not().float()
        if is_sharded(model):  # to repeat the iteration a process needs the parameters of all others
            all_reduce(broken, "max")
        if not broken:
            return
        with preserved_rng(), gathered(model):
            set_rng_state(self._rng)
            cause = find_non_finite(model, self._batch, lambda: wrapper.optim_context(model))
        became = str(float(value))
        if torch.isfinite(value).all():
            became += " here and not finite in another process"
        rates = wrapper.get_lr()
        files = ", ".join(batch_files(self._batch)[:3])
        raise NonFiniteError(
            f"the {what} became {became} in iteration {runner.iter + 1} (epoch {runner.epoch + 1}): {cause}\n"
            f"Precision {wrapper.precision}, lr {rates.get('base_lr', rates['lr'])[0]:.3g}; first images of the batch: "
            f"{files}\nNo weight was changed by this iteration. Usual remedies: a lower lr or a longer warm-up, "
            "gradient clipping (clip_grad), bf16 or fp32 instead of fp16. --resume continues from the last checkpoint."
        )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def _largest(value: Any) -> str:
    return ", ".join(f"{tuple(t.shape)} up to {t.detach().abs().max():.3g}" for t in _tensors(value)) or "none"


def find_non_finite(model: Any, data: dict, context: Callable[[], AbstractContextManager] = torch.enable_grad) -> str:
    """Where in one training iteration of `model` the first NaN or infinity appears.

    Args:
        model: an mmengine model (`data_preprocessor`, ``forward(**batch, mode="loss")``).
        data: batch of the loader.
        context: gives the context of the forward pass, such as autocast.

    Returns:
        A sentence that names an input image, a parameter, a module's output or a module's gradient.
    """
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not _finite(parameter):
            return f"parameter {name} is not finite"
    found: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def check(_: nn.Module, inputs: Sequence, output: Any) -> None:
            if found:
                return
            kind = f"{name} ({type(module).__name__})"
            if not _finite(output):
                found.append(f"first non-finite output in {kind}, whose inputs are {_largest(inputs)}")
                return
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: gradient(kind, grad))

        handles.append(module.register_forward_hook(check))

    gradients: list[str] = []

    def gradient(kind: str, grad: Tensor) -> None:
        if not gradients and not _finite(grad):
            gradients.append(kind)

    for name, module in model.named_modules():
        if name and not name.startswith("data_preprocessor"):
            watch(name, module)
    try:
        with context():
            batch = model.data_preprocessor(data, True)
            for image, path in zip(batch_images(batch), batch_files(batch), strict=True):
                if not _finite(image):
                    return f"the image {path} is not finite after its transform"
            losses = model(**batch, mode="loss")
        if found:
            return found[0]
        loss, _ = model.parse_losses(losses)
        if not _finite(loss):
            return "every module's output is finite, the loss itself is not"
        kept = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        loss.backward()
        broken = [name for name, parameter in model.named_parameters() if not _finite([parameter.grad])]
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
        if gradients:
            behind = f"; parameters with a non-finite gradient: {', '.join(broken[::-1][:5])}" if broken else ""
            return f"the backward pass is not finite from the output of {gradients[0]} on{behind}"
        if broken:
            return f"first non-finite gradient at parameter {broken[-1]}"
        others = "in another process, whose message names it, or " if get_world_size() > 1 else ""
        cause = f"{others}not in the model (memory or device error?)"
        return f"repeating the iteration gave finite numbers: the cause is {cause}"
    finally:
        for handle in handles:
            handle.remove()

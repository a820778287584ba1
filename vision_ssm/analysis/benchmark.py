"""Speed of models against each other, in one process, and only of models whose result is right.

Models take turns, so that whatever else the machine does hits all of them alike; medians and quartiles are reported.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vision_ssm

from ..backbones.family import ModelFamily
from .timing import (
    WARMUP,
    BenchmarkError,
    GraphedStep,
    RecordingError,
    allocated,
    describe_backends,
    exact_float32,
    first_line,
    fits_in_memory,
    on_device,
    peak_memory,
    release_memory,
    slowest_line,
    synchronize,
    time_in_turns,
    use_backend,
    used_backends,
)

_CHECK_SIZE = (64, 96)  # small, not square: the reference operators loop over every cell
_TOLERANCE = 1e-4
_GRADIENT_TOLERANCE = 1e-3  # rounding of the forward pass is amplified on the way back
_FAULTS = (RuntimeError, ValueError, AssertionError)
# Of logits in the precision that is timed. Other kernels round elsewhere, and a deep network makes 1e-2 of that in
# bfloat16; what is computed wrongly differs by far more.
_STEP_TOLERANCE = {None: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(frozen=True)
class ModelSettings:
    """How models are timed.

    Attributes:
        size: height and width of the images, which are random.
        batch: images per step.
        device: where to run.
        train: time a training step (forward, cross-entropy on random labels, backward, AdamW) instead of inference.
        amp: autocast dtype; None for float32.
        repeats: timed steps per model, after warm-up.
        warmup: steps before.
        channels_last: give images and weights that memory format.
        compile: run the models through `torch.compile`.
        graph: replay a CUDA graph of the step.
        profile: find the slowest line of one more step, which launches from Python.
    """

    size: tuple[int, int] = (224, 224)
    batch: int = 1
    device: torch.device = torch.device("cpu")
    train: bool = False
    amp: torch.dtype | None = None
    repeats: int = 20
    warmup: int = WARMUP
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    profile: bool = False


@dataclass
class Measurement:
    """Timing of one model. Times are seconds per batch.

    Attributes:
        name: the model, with ``timm:`` in front of timm's.
        size, batch: of the images.
        backend: implementation of our operators in use, or "-" for models without any.
        reason: why nothing faster is in use; "" if there is nothing, or no operator of ours.
        parameters: number of parameters.
        median, lower, upper: median and quartiles of the repetitions; None if there is a note.
        images_per_second: batch size over the median.
        peak_memory: bytes allocated at most during a step, with weights, gradients, optimizer state and images, but
            without what other models hold; None on the CPU.
        slowest: the kernel (on a CPU, the operator) that took most time in all its calls, with its share of the time of
            all; "" if nobody asked.
        note: why there are no times; "" if there are.
    """

    name: str
    size: tuple[int, int]
    batch: int
    backend: str = "-"
    reason: str = ""
    parameters: int = 0
    median: float | None = None
    lower: float | None = None
    upper: float | None = None
    images_per_second: float | None = None
    peak_memory: int | None = None
    slowest: str = ""
    note: str = ""


def build_model(name: str, size: tuple[int, int] = (224, 224)) -> nn.Module:
    """One of our models by name, or one of timm's as ``timm:NAME``, for images of `size`.

    Raises:
        KeyError: no such model; the message suggests some.
    """
    if not name.startswith("timm:"):
        return vision_ssm.create_model(name)
    theirs = name.removeprefix("timm:")
    if not timm.is_model(theirs):
        close = vision_ssm.registry.suggest(theirs, timm.list_models())
        raise KeyError(f"timm has no model {theirs!r}.{close}")
    config = timm.models.get_pretrained_cfg(theirs)
    fixed = config is not None and config.fixed_input_size
    return timm.create_model(theirs, img_size=size) if fixed else timm.create_model(theirs)


def check_model(
    name: str, model: nn.Module, device: torch.device, *, amp: torch.dtype | None = None, gradients: bool = False
) -> None:
    """Compare a model of ours, its logits or its feature maps, with itself on the reference operators.

    The image is small.

    Args:
        name: what messages call it.
        model: the model; it is not changed. Models of others have no reference and pass.
        device: where to run.
        amp: autocast dtype to compare the logits in, after float32.
        gradients: compare the gradients of all parameters too, in float32.

    Raises:
        BenchmarkError: logits or gradients differ.
    """
    if not isinstance(model, ModelFamily):
        return
    twin = copy.deepcopy(model).float().eval()
    image = torch.randn(1, model.in_chans, *_CHECK_SIZE, device=device)
    with exact_float32():
        logits, have = _logits_and_gradients(twin, image, gradients)
        half = None if amp is None else _flat(_inference(twin, image, amp)())
        with use_backend("reference"):
            exact_logits, want = _logits_and_gradients(twin, image, gradients)
            exact_half = None if amp is None else _flat(_inference(twin, image, amp)())
    exact = _Exact(twin, image, gradients)
    _demand(name, "logits are", _distance(logits, exact_logits), _TOLERANCE, lambda: exact.rounding(exact_logits))
    # A gradient that cancels, as that of a scale in front of a norm does, is rounding: 1e-8 of the largest one
    floor = 1e-5 * max((gradient.norm() for gradient in want.values()), default=torch.zeros(()))
    for key, gradient in want.items():
        error = _distance(have[key], gradient, floor)
        rounding = partial(exact.rounding, gradient, key, floor)
        _demand(name, f"gradient of {key} is", error, _GRADIENT_TOLERANCE, rounding)
    if half is not None and exact_half is not None:
        precision = str(amp).removeprefix("torch.")
        error = _distance(half, exact_half)
        _demand(name, f"{precision} logits are", error, _STEP_TOLERANCE[amp], lambda: exact.rounding(exact_half))


class _Exact:
    """Logits and gradients of a model in float64, computed if they are asked for.

    A model may amplify rounding: MHS-VM weights the routes of a scan by their differences, which cancel. Two ways to
    compute it are then as far from each other as from what is exact.
    """

    def __init__(self, model: nn.Module, image: Tensor, gradients: bool):
        self._given = model, image, gradients
        self._found: tuple[Tensor, dict[str, Tensor]] | None = None

    def rounding(self, want: Tensor, key: str | None = None, floor: Tensor | float = 0.0) -> float:
        """How far the reference's logits, or its gradient `key`, are from the exact ones."""
        if self._found is None:
            model, image, gradients = self._given
            with use_backend("reference"):
                self._found = _logits_and_gradients(copy.deepcopy(model).double(), image.double(), gradients)
        logits, found = self._found
        return _distance(want, logits if key is None else found[key], floor)


def _logits_and_gradients(model: nn.Module, image: Tensor, gradients: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a mean square of the logits, or of a random sum of maps, whose mean square their norm fixes; no autocast."""
    with torch.autocast(image.device.type, enabled=False), torch.set_grad_enabled(gradients):
        outputs = model(image)
        logits = _flat(outputs)
        if not gradients:
            return logits, {}
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(0)
        factors = logits if isinstance(outputs, Tensor) else torch.randn(logits.shape, generator=generator).to(logits)
        found = torch.autograd.grad((factors * logits).mean(), list(parameters.values()), allow_unused=True)
    return logits.detach(), {key: gradient for key, gradient in zip(parameters, found) if gradient is not None}


def _flat(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Logits as they are; the values of several maps in one vector."""
    return outputs if isinstance(outputs, Tensor) else torch.cat([output.flatten() for output in outputs])


def _distance(have: Tensor, want: Tensor, floor: Tensor | float = 0.0) -> float:
    have, want = have.float(), want.float()
    return ((have - want).norm() / (want.norm() + floor)).item()


def _demand(
    name: str,
    subject: str,
    error: float,
    tolerance: float,
    rounding: Callable[[], float] = lambda: 0.0,
    reference: str = "the reference operators'",
) -> None:
    """`rounding` gives the error of the reference itself; if three times that is above `tolerance`, it is allowed."""
    if not error < tolerance:  # so that NaN is an error too
        tolerance = max(tolerance, 3 * rounding())
    if not error < tolerance:
        raise BenchmarkError(
            f"{name} is not timed: its {subject} {error:.1e} away from {reference} (allowed {tolerance:.0e}); "
            "run the operator tests first"
        )


@dataclass
class _Contender:
    row: Measurement
    step: Callable[[], Any] | None = None


def benchmark_models(names: Sequence[str], settings: ModelSettings, *, check: bool = True) -> list[Measurement]:
    """Time models in turns.

    Args:
        names: ours by name, timm's as ``timm:NAME``.
        settings: how to time them.
        check: compare models of ours with their reference operators first.

    Returns:
        One row per model. One that ran out of memory or cannot be recorded, and one of timm's that cannot run, has a
        note instead of times.

    Raises:
        KeyError: unknown model.
        BenchmarkError: a model of ours computes something else than its reference, a compiled or recorded model
            something else than the plain one, or the settings do not go together.
    """
    device = settings.device
    if settings.graph and device.type != "cuda":
        raise BenchmarkError(f"CUDA graphs need a CUDA device, not {device}")
    if settings.compile:
        torch.compiler.reset()  # or graphs of other sizes would make sizes symbolic
    contenders = {name: _Contender(Measurement(name, settings.size, settings.batch)) for name in dict.fromkeys(names)}
    release_memory(device)
    with on_device(device):
        for contender in contenders.values():
            try:
                fits = _prepare(contender, settings, check)
            except _FAULTS as error:
                # a model of others may refuse a size, and any a recording; the rest of the models goes on
                if not isinstance(error, RecordingError) and not contender.row.name.startswith("timm:"):
                    raise
                contender.row.note = first_line(error)
            else:
                contender.row.note = "" if fits else "out of memory"
        steps = {name: contender.step for name, contender in contenders.items() if contender.step is not None}
        timings = time_in_turns(steps, device, settings.repeats)
    rows = []
    for name, contender in contenders.items():
        if name in timings:
            time = timings[name]
            rate = settings.batch / time.median
            rows.append(replace(contender.row, **vars(time), images_per_second=rate))
        else:
            rows.append(replace(contender.row, note=contender.row.note or "out of memory"))
    return rows


def _prepare(contender: _Contender, settings: ModelSettings, check: bool) -> bool:
    """Build, check and warm up a model; False if the GPU has not enough memory for it."""
    row, device = contender.row, settings.device
    model = build_model(row.name, settings.size)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())

    def prepare() -> None:
        before = allocated(device)
        model.to(device)
        if check:
            check_model(row.name, model, device, amp=settings.amp, gradients=settings.train)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        model.to(memory_format=layout)  # type: ignore[call-overload]
        images = torch.randn(settings.batch, 3, *settings.size, device=device).contiguous(memory_format=layout)
        plain = _inference(model.eval(), images, settings.amp)
        one = _inference(model, images[:1], settings.amp)
        row.backend, row.reason = describe_backends(used_backends(one))
        model.train(settings.train)
        runner: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if settings.compile else model
        make: Callable[..., Callable[[], Any]] = (
            partial(_training, model, recorded=settings.graph) if settings.train else _inference
        )
        step = make(runner, images, settings.amp)
        for _ in range(settings.warmup):
            step()
        synchronize(device)
        row.peak_memory = peak_memory(step, device, before)
        if settings.profile:
            row.slowest = slowest_line(step, device)
        if settings.graph:
            step = GraphedStep(step, device)
        if settings.train and settings.graph and not step().isfinite():
            raise BenchmarkError(f"{row.name} is not timed: its loss is not finite in a recorded training step")
        if not settings.train and (settings.graph or settings.compile):
            wanted = plain().clone()
            error = _distance(step(), wanted)
            _demand(row.name, "output is", error, _STEP_TOLERANCE[settings.amp], reference="that of the plain model")
        contender.step = step

    return fits_in_memory(prepare, device)


def _inference(model: Callable[[Tensor], Tensor], images: Tensor, amp: torch.dtype | None) -> Callable[[], Tensor]:
    def infer() -> Tensor:
        with torch.inference_mode(), torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
            return model(images)

    return infer


def _loss(logits: Tensor) -> Tensor:
    """Against class 0, or 0 everywhere, of logits (B, classes) or scores (B, classes, H, W)."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
    return F.cross_entropy(logits, logits.new_zeros((len(logits), *logits.shape[2:]), dtype=torch.long))


def _training(
    model: nn.Module, runner: Callable[[Tensor], Tensor], images: Tensor, amp: torch.dtype | None, recorded: bool
) -> Callable[[], Tensor]:
    """`recorded`: the step is to become a CUDA graph."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=images.is_cuda, capturable=recorded)

    def update() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
            outputs = runner(images)
            # a distilled head returns two in training, deep supervision scores of several sizes
            heads = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum(_loss(logits) for logits in heads)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return update

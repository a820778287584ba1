"""Speed of models against each other, in one process, and only of models whose result is right.

Models take turns, so that whatever else the machine does hits all of them alike; medians and quartiles are reported.
"""

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import timm
import torch
from torch import nn

import vision_ssm

from ..backbones.base import Backbone
from ..ops import select_backend

_CHECK_SIZE = (64, 96)  # small, not square: the reference operators loop over every cell
_TOLERANCE = 1e-4
_WARMUP = 3


class BenchmarkError(RuntimeError):
    """A model that must not be timed, because what it computes is wrong."""


@dataclass
class Measurement:
    """Timing of one model. Times are seconds per batch.

    Attributes:
        name: the model, with ``timm:`` in front of timm's.
        backend: implementation of the scan in use, or "-" for models without one.
        parameters: number of parameters.
        median, lower, upper: median and quartiles of the repetitions.
        images_per_second: batch size over the median.
        peak_memory: bytes allocated at most on the GPU; None on the CPU.
    """

    name: str
    backend: str
    parameters: int
    median: float
    lower: float
    upper: float
    images_per_second: float
    peak_memory: int | None

    def as_dict(self) -> dict:
        return asdict(self)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a figure depends on beside the code: device, threads, versions, TF32."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "tf32": str(torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else False),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def build_model(name: str, **settings) -> nn.Module:
    """One of our models by name, or one of timm's as ``timm:NAME``."""
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), **settings)
    return vision_ssm.create_model(name, **settings)


@contextmanager
def _reference_operators():
    before = os.environ.get("VISION_SSM_BACKEND")
    os.environ["VISION_SSM_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VISION_SSM_BACKEND"]
        else:
            os.environ["VISION_SSM_BACKEND"] = before


def check_model(name: str, model: nn.Module, device: torch.device) -> None:
    """Compare a model of ours with itself on the reference operators, in float32, on a small image.

    Raises:
        BenchmarkError: the logits differ.
    """
    if not isinstance(model, Backbone):
        return
    twin = copy.deepcopy(model).float().eval()
    image = torch.randn(1, model.in_chans, *_CHECK_SIZE, device=device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        have = twin(image)
        with _reference_operators():
            want = twin(image)
    error = ((have - want).norm() / want.norm()).item()
    if not error < _TOLERANCE:
        raise BenchmarkError(
            f"{name} is not timed: its logits are {error:.1e} away from the reference operators'"
            f" (allowed {_TOLERANCE:.0e}); run the operator tests first"
        )


def _step(model: nn.Module, images: torch.Tensor, train: bool, amp: torch.dtype | None) -> Callable[[], None]:
    device = images.device.type

    def forward() -> torch.Tensor:
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            return model(images)

    def infer() -> None:
        with torch.inference_mode():
            forward()

    if not train:
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()
        optimizer.step()

    return update


def benchmark_models(
    names: Sequence[str],
    *,
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    device: str | torch.device = "cpu",
    train: bool = False,
    amp: torch.dtype | None = None,
    repeats: int = 20,
    channels_last: bool = False,
) -> list[Measurement]:
    """Time models in turns.

    Args:
        names: ours by name, timm's as ``timm:NAME``.
        size: height and width of the images, which are random.
        batch: images per step.
        device: where to run.
        train: time a training step (forward, backward, AdamW) instead of inference.
        amp: autocast dtype; None for float32.
        repeats: timed steps per model, after warm-up.
        channels_last: give images and weights that memory format.

    Raises:
        BenchmarkError: a model of ours computes something else than its reference.
    """
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=layout)
    steps: dict[str, Callable[[], None]] = {}
    models: dict[str, nn.Module] = {}
    for name in names:
        model = build_model(name).to(device)
        check_model(name, model, device)
        if channels_last:
            model = model.to(memory_format=layout)
        models[name] = model.train(train)
        steps[name] = _step(model, images, train, amp)
    for step in steps.values():
        for _ in range(_WARMUP):
            step()
    peaks = {name: _peak_memory(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    return [_summary(name, models[name], times[name], batch, images, peaks[name]) for name in names]


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _summary(
    name: str, model: nn.Module, times: list[float], batch: int, images: torch.Tensor, peak: int | None
) -> Measurement:
    lower, median, upper = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return Measurement(
        name=name,
        backend=select_backend(images, "scan_2d").name if isinstance(model, Backbone) else "-",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        median=median,
        lower=lower,
        upper=upper,
        images_per_second=batch / median,
        peak_memory=peak,
    )

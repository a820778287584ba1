"""The clock of the benchmarks: medians of steps that take turns, memory, CUDA graphs, the ceiling of the memory bus.

Times are seconds and sizes bytes everywhere; only tables convert them.
"""

import functools
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import Backend, select_backend
from ..ops.backend import ENVIRONMENT_VARIABLE, OPERATORS, demanded_backend
from ..version import __version__

WARMUP = 3
SHORTEST_SAMPLE = 5e-3  # s; the launch of the first kernel, some 10 us, is then less than a hundredth of a sample
_Key = TypeVar("_Key", bound=Hashable)
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


class BenchmarkError(RuntimeError):
    """Something that must not be timed, because what it computes is wrong, or that cannot be timed as asked."""


class RecordingError(BenchmarkError):
    """A step that cannot become a CUDA graph."""


def first_line(error: Exception) -> str:
    """What `error` says, in one line; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in seconds."""

    median: float
    lower: float
    upper: float


def summarize(times: list[float]) -> Timing:
    """Median and quartiles; of a single time, that time."""
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, lower, upper)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a figure depends on beside code and versions: device, threads, how float32 products are computed."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "tf32": f"matmul {_on(cuda and torch.backends.cuda.matmul.allow_tf32)}, "
        f"convolution {_on(cuda and torch.backends.cudnn.allow_tf32)}",
        "cudnn.benchmark": _on(cuda and torch.backends.cudnn.benchmark),
    }


def _on(switch: bool) -> str:
    return "on" if switch else "off"


def describe_versions() -> dict[str, str]:
    """Versions of this library and of what it runs on."""
    versions = {
        "vision_ssm": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    try:
        import triton
    except ImportError:
        return versions
    return versions | {"triton": triton.__version__}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Operators run on backend `name`, backward passes started inside included."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32: a comparison in float32 would otherwise see the 10 bits of a convolution on one of its sides."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


class _OperatorLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, Backend] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("vision_ssm::")
        if func.namespace == "vision_ssm" and name in OPERATORS:
            self.used[name] = select_backend(args[0], name)
        return func(*args, **(kwargs or {}))


def used_backends(call: Callable[[], Any]) -> dict[str, Backend]:
    """The backend that each of our operators takes while `call` runs; empty if it calls none of them."""
    log = _OperatorLog()
    with log, torch.no_grad():
        call()
    return log.used


def describe_backends(used: Mapping[str, Backend]) -> tuple[str, str]:
    """Backends in use, and the reasons why none of them is faster, as two short texts."""
    if demanded_backend() == "reference":  # the twins are plain PyTorch, which calls none of our operators
        return "reference", f"{ENVIRONMENT_VARIABLE}=reference asks for it"
    names = {backend.name for backend in used.values()}
    if len(names) < 2:
        text = next(iter(names), "-")
    else:
        text = ", ".join(f"{operator} {backend.name}" for operator, backend in sorted(used.items()))
    return text, "; ".join(dict.fromkeys(backend.reason for backend in used.values() if backend.reason))


def on_device(device: torch.device) -> Any:
    """Context in which `device` is the current GPU; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], Any], device: torch.device, passes: int = 1) -> float:
    """Time of one of `passes` steps in a row: between two events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(passes):
                step()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000 / passes
    begin = time.perf_counter()
    for _ in range(passes):
        step()
    return (time.perf_counter() - begin) / passes


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, cycles of objects and the allocator's stock included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _says_out_of_memory(error: RuntimeError) -> bool:
    """Libraries below PyTorch say it in errors of their own."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


def fits_in_memory(action: Callable[[], Any], device: torch.device) -> bool:
    """Run `action`; False, with what it held given back, if the GPU has not enough memory for it."""
    try:
        action()
        return True
    except RuntimeError as error:
        if not _says_out_of_memory(error):
            raise
    release_memory(device)  # outside of the handler, whose traceback would keep the tensors alive
    return False


def time_in_turns(
    steps: Mapping[_Key, Callable[[], Any]], device: torch.device, repeats: int, shortest: float = 0.0
) -> dict[_Key, Timing]:
    """Time steps that are warm already, taking turns, so that whatever else the machine does hits all of them alike.

    Args:
        steps: what to run, by name.
        device: where they run.
        repeats: samples per step.
        shortest: seconds; a sample is as many runs of its step in a row as take that long.

    Returns:
        The time of one run by name, without the steps that ran out of memory.
    """
    times: dict[_Key, list[float]] = {name: [] for name in steps}
    passes = dict.fromkeys(steps, 1)

    def sample(name: _Key) -> None:
        times[name].append(seconds(steps[name], device, passes[name]))

    def turn() -> None:
        for name in list(times):
            if not fits_in_memory(functools.partial(sample, name), device):
                del times[name]

    if shortest:
        turn()
        for name, first in times.items():
            passes[name] = max(1, round(shortest / max(first.pop(), 1e-7)))
    for _ in range(repeats):
        turn()
    return {name: summarize(values) for name, values in times.items()}


def peak_memory(step: Callable[[], Any], device: torch.device, before: int) -> int | None:
    """Bytes allocated at most during `step` beyond `before`, itself in bytes; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def slowest_line(step: Callable[[], Any], device: torch.device) -> str:
    """The kernel of `step` (on a CPU, the operator) that takes most time in all its calls, and its share of all."""
    kinds = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profile:
        step()
        synchronize(device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {line.key: getattr(line, field) for line in profile.key_averages()}
    if not any(times.values()):
        return ""
    longest = max(times, key=times.__getitem__)
    return f"{_short_name(longest)} {100 * times[longest] / sum(times.values()):.0f} %"


def _short_name(kernel: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].rsplit("::", 1)[-1].strip()


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on `device` now; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: what autograd made for one of them may serve the next only on the same stream."""
    return torch.cuda.Stream(device)


class GraphedStep:
    """A step recorded as a CUDA graph; calling it replays the kernels without the launches from Python.

    The step runs `WARMUP` times on the stream of the recording first. What it builds lazily in its first run, such as
    an autograd graph whose backward pass it repeats, therefore lives on that stream, as a recording needs.

    Attributes:
        output: what the step returned while it was recorded; a replay fills the same tensors anew.

    Raises:
        BenchmarkError: `device` is no GPU. RecordingError: the step waits for the GPU or does else what graphs cannot.
    """

    def __init__(self, step: Callable[[], Any], device: torch.device):
        if device.type != "cuda":
            raise BenchmarkError(f"CUDA graphs need a CUDA device, not {device}")
        self._graph = torch.cuda.CUDAGraph()
        self._step = step  # owns what the recorded kernels read: a model's parameters, say
        with torch.cuda.device(device):
            stream = _recording_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    step()
            torch.cuda.synchronize(device)
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self.output = step()
            except RuntimeError as error:
                if _says_out_of_memory(error):
                    raise
                raise RecordingError(f"cannot be recorded as a CUDA graph: {first_line(error)}") from error

    def __call__(self) -> Any:
        self._graph.replay()
        return self.output


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes read and written per second by a large copy within the memory of `device`: what no kernel can exceed."""
    size = _COPY_BYTES.get(device.type, _COPY_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(repeats)]
    return 2 * size / statistics.median(times)


def second_level_cache(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0

"""Speed over image size, of models or of operators in the place of a model that they have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .benchmark import ModelSettings, benchmark_models
from .benchmark_ops import CASES, OperatorSettings, benchmark_operator
from .timing import Timing


@dataclass(frozen=True)
class Point:
    """One contender at one image size.

    Attributes:
        label: the model, or the operator and its implementation.
        size: side of the square image, in pixels.
        batch: images per step.
        backend: what our operators ran on, or "-".
        time: seconds per step; None if there is a note.
        peak_memory: bytes allocated at most during a step; None on a CPU.
        note: why there is no time; "" if there is.
    """

    label: str
    size: int
    batch: int
    backend: str
    time: Timing | None
    peak_memory: int | None
    note: str

    @property
    def per_image(self) -> float | None:
        """Seconds per image."""
        return None if self.time is None else self.time.median / self.batch


def batch_at(size: int, pixels: int) -> int:
    """Images of `size` x `size` in a batch of about `pixels` pixels; at least one."""
    return max(1, round(pixels / size**2))


def sweep_models(
    names: Sequence[str],
    settings: ModelSettings,
    sizes: Sequence[int],
    pixels: int,
    progress: Callable[[str], None] = print,
) -> list[Point]:
    """Time models on square images of several sizes, with about as many pixels in every batch.

    Args:
        names: as for `benchmark_models`.
        settings: how to time them; its size and batch are not used.
        sizes: sides in pixels. Models are checked once, at the first.
        pixels: per batch.
        progress: called with a line before each size.
    """
    points = []
    for index, size in enumerate(sizes):
        batch = batch_at(size, pixels)
        progress(f"{size} x {size}, batch {batch}")
        rows = benchmark_models(names, replace(settings, size=(size, size), batch=batch), check=index == 0)
        for row in rows:
            timed = row.median is not None and row.lower is not None and row.upper is not None
            time = Timing(row.median, row.lower, row.upper) if timed else None  # type: ignore[arg-type]
            points.append(Point(row.name, size, batch, row.backend, time, row.peak_memory, row.note))
    return points


def sweep_operators(
    names: Sequence[str],
    settings: OperatorSettings,
    sizes: Sequence[int],
    pixels: int,
    copy: float,
    progress: Callable[[str], None] = print,
) -> list[Point]:
    """Time operators on the maps of square images of several sizes; forward, or forward and backward together.

    Args:
        names: keys of `CASES` that belong to a stage of a model.
        settings: how to time them; with `backward` a point is a forward and a backward pass.
        sizes: sides of the images in pixels. Operators are checked once, at the first.
        pixels: of the images, per batch.
        copy: bytes per second of a large copy.
        progress: called with a line before each size.

    Raises:
        BenchmarkError: a case belongs to no stage, or an operator is wrong.
    """
    quantity = "forward+backward" if settings.backward else "forward"
    points = []
    for index, size in enumerate(sizes):
        batch = batch_at(size, pixels)
        progress(f"{size} x {size}, batch {batch}")
        for name in names:
            case = replace(CASES[name].of_image(size), batch=batch)
            for row in benchmark_operator(name, case, settings, copy=copy, check=index == 0):
                label = name if row.implementation == "vision_ssm" else f"{name}, {row.implementation}"
                time = row.times.get(quantity)
                points.append(Point(label, size, batch, row.backend, time, row.peak_memory, row.note))
    return points

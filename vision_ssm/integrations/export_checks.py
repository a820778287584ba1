"""What an export checks: packages, sizes and names before the work, and what the written file computes after it."""

import contextlib
import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbones.base import MIN_IMAGE_SIZE
from ..backbones.family import ModelFamily

BATCHES = (1, 3)  # numbers of images that a written file is run with
TOLERANCE = 1e-4
LOWEST_OPSET = 18


class ExportError(RuntimeError):
    """A model that cannot be exported here, or a written file that computes something else."""


def missing_package(name: str) -> str:
    """A sentence about a package that is not installed; empty if it is."""
    if importlib.util.find_spec(name) is not None:
        return ""
    return f"{name} is not installed; pip install 'vision_ssm[export]' brings it"


def needs_packages(*names: str) -> None:
    """Raise `ExportError` if one of these packages is not installed."""
    for name in names:
        if absent := missing_package(name):
            raise ExportError(absent)


def check_opset(opset: int) -> None:
    """`ValueError` unless PyTorch's exporter and the installed onnx know this version of the operators."""
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not LOWEST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset must be between {LOWEST_OPSET}, the lowest that PyTorch writes, and {newest}, the newest of the "
            f"installed onnx; got {opset}"
        )


def checked_size(model: ModelFamily, size: Any) -> tuple[int, int]:
    """Height and width of the images; `ValueError` if they are none, or below the library's least."""
    if size is None:
        size = model.pretrained_cfg["input_size"][1:]
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ValueError(f"size is a height and a width in pixels, got {size!r}")
    height, width = size
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(f"images must be at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, got {height} x {width}")
    return height, width


@contextlib.contextmanager
def published(file: str | os.PathLike, suffix: str, overwrite: bool) -> Iterator[Path]:
    """A place to write `file` to, which gets its name when the block ends well, and is deleted otherwise.

    Files that were written beside it come along.

    Raises:
        FileExistsError: there is such a file, and not `overwrite`. OSError: the folder cannot be written to.
        ValueError: a name without the `suffix`.
    """
    target = Path(file)
    if target.suffix != suffix:
        raise ValueError(f"the file's name should end with {suffix}, got {target.name!r}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; --overwrite (overwrite=True) replaces it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        yield folder / target.name
        beside = target.with_name(f"{target.name}.data")  # where weights are that do not fit into the file
        if not (folder / beside.name).exists():
            if overwrite:
                beside.unlink(missing_ok=True)
        elif beside.exists() and not overwrite:
            raise FileExistsError(f"{beside} exists already; --overwrite (overwrite=True) replaces it")
        for written in sorted(folder.iterdir(), key=lambda path: path.name == target.name):  # the file itself last
            os.replace(written, target.parent / written.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(
    run: Callable[[Tensor], Sequence[Any]],
    images: Tensor,
    wanted: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    file: str,
) -> float:
    """The largest difference between outputs of a written file and those of the model, over their deviation.

    Args:
        run: runs the file.
        images: as many as the largest of `BATCHES`.
        wanted: for each of `BATCHES`, the outputs of the model for so many of the images.
        names: of the outputs.
        file: how messages call the file.

    Returns:
        The largest over all outputs of the largest absolute difference, divided by the standard deviation of the
        values of that output for the most images (by the largest absolute value where they are all alike).

    Raises:
        ExportError: the file does not run, or gives other shapes or numbers that are not finite.
    """
    worst = 0.0
    for count, references in zip(BATCHES, wanted):
        try:
            outputs = run(images[:count])
        except Exception as problem:  # of any runtime
            raise ExportError(f"{file} is not kept: it does not run for {count} images: {problem}") from problem
        for name, output, reference, all_values in zip(names, outputs, references, wanted[-1], strict=True):
            if output.shape != reference.shape:
                raise ExportError(
                    f"{file} is not kept: for {count} images its {name} is {tuple(output.shape)}, the model's "
                    f"{tuple(reference.shape)}"
                )
            scale = all_values.std(correction=0) or all_values.abs().max() or 1.0
            error = float((output.to(reference.device) - reference).abs().max() / scale)
            if not math.isfinite(error):
                raise ExportError(f"{file} is not kept: its {name}, or the model's, is not finite for random images")
            worst = max(worst, error)
    return worst

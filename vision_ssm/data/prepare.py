"""Preparing and checking image folders: the commands of ``tools/prepare_data.py``."""

import argparse
import contextlib
import errno
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vision_ssm.data.decode import UnreadableImageError, load_image, read_header
from vision_ssm.data.image_folder import SPLIT_NAMES, ImageFolder, check_same_classes

DIGITS_SEED = 0
DIGITS_VAL_FRACTION = 0.2
DIGITS_SIZE = 32
_BLOCK = 1024

_DIGITS_README = """\
Optical recognition of handwritten digits

1,797 scans of handwritten digits, 8 x 8 pixels, 17 grey levels (0 to 16), one class per digit. This is the test part of
the UCI data set as shipped with scikit-learn (sklearn.datasets.load_digits).

Origin:   E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
          https://doi.org/10.24432/C50P49
Licence:  Creative Commons Attribution 4.0 International (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/
Changes:  grey levels scaled from 0..16 to 0..255 (rounded){resized}; stored as 8-bit grey PNG.

Layout:   train/DIGIT/NNNN.png and val/DIGIT/NNNN.png, NNNN being the row in load_digits().
Split:    {train} training and {val} validation images, stratified: {percent:.0f} % of each digit (rounded) go to val,
          chosen by numpy.random.RandomState({seed}). split.txt lists every file. The split is random over images,
          so the same writers occur in both parts: the accuracy says nothing about unseen writers.
Made by:  python tools/prepare_data.py digits OUT --size {size}
"""


class PrepareError(Exception):
    """A data folder cannot be written or checked; the message says why and what to do."""


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def digits_split(labels: np.ndarray, seed: int = DIGITS_SEED) -> np.ndarray:
    """The fixed stratified split of the digits.

    Args:
        labels: (N,) integers.
        seed: Of `numpy.random.RandomState`, whose stream never changes between numpy versions.

    Returns:
        (N,) bool, True for validation: 20 % of each class, rounded.
    """
    generator = np.random.RandomState(seed)
    validation = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        validation[generator.permutation(rows)[: round(DIGITS_VAL_FRACTION * len(rows))]] = True
    return validation


def digit_image(pixels: np.ndarray, size: int = DIGITS_SIZE) -> Image.Image:
    """One scan as an 8-bit grey image.

    Args:
        pixels: (8, 8), values 0 to 16.
        size: Side of the result in pixels; anything but 8 is a bicubic enlargement.
    """
    image = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _digit_files(size: int) -> tuple[dict[str, Image.Image], str, str]:
    """All images by relative path, the text of split.txt and that of README.txt."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PrepareError(
            f"the digits come with scikit-learn, which does not import ({error}): pip install scikit-learn"
        ) from error
    digits = load_digits()
    validation = digits_split(digits.target)
    files: dict[str, Image.Image] = {}
    for row, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        files[f"{'val' if validation[row] else 'train'}/{label}/{row:04d}.png"] = digit_image(pixels, size)
    split = "".join(f"{path}\n" for path in sorted(files))
    readme = _DIGITS_README.format(
        resized="" if size == 8 else f" and enlarged to {size} x {size} (bicubic)",
        train=int((~validation).sum()),
        val=int(validation.sum()),
        percent=100 * DIGITS_VAL_FRACTION,
        seed=DIGITS_SEED,
        size=size,
    )
    return files, split, readme


def _same_digits(out: Path, files: dict[str, Image.Image], split: str) -> bool:
    """Whether `out` already holds exactly these images."""
    try:
        if (out / "split.txt").read_text() != split:
            return False
        if sorted(path.relative_to(out).as_posix() for path in out.glob("*/*/*")) != sorted(files):
            return False
        return all(
            np.array_equal(np.asarray(load_image(out / path, channels=1)), np.asarray(image))
            for path, image in files.items()
        )
    except (OSError, UnreadableImageError):
        return False


def _is_digits_folder(out: Path) -> bool:
    """Whether `out` was written by `write_digits`, so that replacing it destroys nothing else."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (out / "README.txt").read_text().startswith(_DIGITS_README.split("\n", 1)[0]):
            return {path.name for path in out.iterdir()} <= {"README.txt", "split.txt", "train", "val"}
    return False


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block has succeeded and vanishes when it has not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PrepareError(f"cannot write to {str(out.parent)!r}: {error.strerror}. Choose another folder.") from error
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        if out.exists():
            out.rename(temporary / "old")
        content.rename(out)
    except OSError as error:
        hint = " Free some space or choose another disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise PrepareError(f"cannot write {str(out)!r}: {error.strerror}. It is as it was before.{hint}") from error
    finally:
        if not out.exists() and (temporary / "old").exists():
            (temporary / "old").rename(out)
        shutil.rmtree(temporary, ignore_errors=True)


def write_digits(out: str | os.PathLike, size: int = DIGITS_SIZE, overwrite: bool = False) -> bool:
    """Write scikit-learn's handwritten digits as PNG files in ImageNet layout.

    OUT/train/0 ... OUT/val/9, split.txt and README.txt appear at once, when everything has been written.

    Args:
        out: Folder to create. If it already holds the same images nothing is done.
        size: Side of the images in pixels.
        overwrite: Replace digits of another size or an incomplete set. Other folders are never replaced.

    Returns:
        True if the images were written, False if they were there already.

    Raises:
        PrepareError: `out` holds something else, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    if size < 8:
        raise PrepareError(f"--size must be at least 8, the size of the scans, got {size}")
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{str(out)!r} is a file; the digits need a folder of their own")
    files, split, readme = _digit_files(size)
    if out.is_dir() and any(out.iterdir()):
        if _same_digits(out, files, split):
            return False
        if not _is_digits_folder(out):
            raise PrepareError(
                f"{str(out)!r} is not empty and holds something other than these digits. Choose another folder;"
                " this one is left as it is, even with --overwrite."
            )
        if not overwrite:
            raise PrepareError(
                f"{str(out)!r} holds digits of another size, or an incomplete set. Pass --overwrite to replace them."
            )
    with _replacing(out) as folder, _progress() as progress:
        for path, image in progress.track(files.items(), description="writing digits"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / path)
        (folder / "split.txt").write_text(split)
        (folder / "README.txt").write_text(readme)
    return True


@dataclass
class SplitReport:
    """What `check_folder` found in one split."""

    split: str
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    unreadable: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    modes: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        return sum(self.class_counts)


def find_splits(root: Path) -> list[str]:
    """Names of the split folders in `root`, or [""] if the class folders are directly in it."""
    present = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    return present or [""]


def _check_split(dataset: ImageFolder, split: str, min_size: int, workers: int) -> SplitReport:
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    report = SplitReport(split, dataset.classes, tuple(counts.tolist()))

    def inspect(index: int) -> tuple[str, tuple[int, int] | None, str]:
        path = dataset.path(index)
        try:
            size, mode, kind = read_header(path)
            load_image(path)
        except UnreadableImageError as error:
            return str(error), None, ""
        return path, size, f"{kind} {mode}"

    # Threads: Pillow decodes outside of the interpreter lock. Blocks: a queue of a million tasks would fill the memory.
    with ThreadPoolExecutor(workers) as pool, _progress() as progress:
        task = progress.add_task(f"checking {split or 'images'}", total=len(dataset))
        for start in range(0, len(dataset), _BLOCK):
            block = range(start, min(start + _BLOCK, len(dataset)))
            for text, size, mode in pool.map(inspect, block):
                progress.advance(task)
                if size is None:
                    report.unreadable.append(text)
                    continue
                report.modes[mode] += 1
                if min(size) < min_size:
                    report.too_small.append(f"{text!r} is {size[0]} x {size[1]}")
                report.smallest = min(report.smallest or size, size, key=math.prod)
                report.largest = max(report.largest or size, size, key=math.prod)
    return report


def check_folder(
    root: str | os.PathLike,
    splits: Sequence[str] | None = None,
    min_size: int = 1,
    workers: int = 4,
) -> tuple[list[SplitReport], list[str]]:
    """Decode every image of a data folder in ImageNet layout.

    Args:
        root: Data folder.
        splits: Sub-folders to check; default: those of `SPLIT_NAMES` that exist, else `root` itself.
        min_size: Smallest allowed side in pixels.
        workers: Threads.

    Returns:
        One report per split, and a list of problems in words; it is empty if the data is fine.

    Raises:
        PrepareError: The folder does not exist or is not in ImageNet layout.
    """
    root = Path(root).expanduser()
    reports: list[SplitReport] = []
    datasets: list[ImageFolder] = []
    problems: list[str] = []
    for split in splits or find_splits(root):
        try:
            dataset = ImageFolder(root, split, allow_empty_classes=True)
        except (OSError, ValueError) as error:
            raise PrepareError(str(error)) from error
        report = _check_split(dataset, split, min_size, workers)
        where = f"{split}: " if split else ""
        empty = [name for name, count in zip(report.classes, report.class_counts, strict=True) if not count]
        problems += [f"{where}class folder {name!r} has no image" for name in empty]
        problems += [f"{where}{message}" for message in report.unreadable]
        problems += [f"{where}smaller than {min_size} pixels: {message}" for message in report.too_small]
        for other in datasets:
            try:
                check_same_classes(other, dataset)
            except ValueError as error:
                problems.append(str(error))
        datasets.append(dataset)
        reports.append(report)
    return reports, problems


def _table(reports: Sequence[SplitReport]) -> Table:
    table = Table("", *(report.split or "images" for report in reports), box=SIMPLE)
    facts = {
        "classes": [str(len(report.classes)) for report in reports],
        "images": [str(report.images) for report in reports],
        "images per class": [f"{min(report.class_counts)} to {max(report.class_counts)}" for report in reports],
        "unreadable": [str(len(report.unreadable)) for report in reports],
        "smallest (height x width)": [_dimensions(report.smallest) for report in reports],
        "largest": [_dimensions(report.largest) for report in reports],
        "formats": ["\n".join(f"{mode}: {count}" for mode, count in report.modes.most_common()) for report in reports],
    }
    for name, values in facts.items():
        table.add_row(name, *values)
    return table


def _dimensions(size: tuple[int, int] | None) -> str:
    return "-" if size is None else f"{size[0]} x {size[1]}"


def _digits_command(options: argparse.Namespace, console: Console) -> int:
    written = write_digits(options.out, options.size, options.overwrite)
    reports = [ImageFolder(options.out, split) for split in ("train", "val")]
    counts = ", ".join(f"{len(dataset)} {dataset.split}" for dataset in reports)
    state = "written to" if written else "already complete in"
    size = f"{options.size} x {options.size} pixels"
    console.print(f"digits {state} {options.out}: {counts} images, {size}", soft_wrap=True, highlight=False)
    return 0


def _check_command(options: argparse.Namespace, console: Console) -> int:
    reports, problems = check_folder(options.root, options.split, options.min_size, options.workers)
    console.print(_table(reports))
    if options.list is not None:
        try:
            Path(options.list).write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
        except OSError as error:
            raise PrepareError(f"cannot write the list {options.list!r}: {error.strerror}") from error
    for problem in problems[: options.show]:
        console.print(problem, soft_wrap=True, markup=False, highlight=False)
    if len(problems) > options.show:
        console.print(f"and {len(problems) - options.show} more (--list FILE writes all)")
    if problems:
        console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)} found")
    else:
        console.print(f"no problem found in {sum(report.images for report in reports)} images")
    return 1 if problems else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Make or check image folders for classification (ImageNet layout: ROOT/SPLIT/CLASS/image).",
        epilog="examples:\n"
        "  python tools/prepare_data.py digits data/digits\n"
        "  python tools/prepare_data.py check data/imagenet --workers 16 --min-size 32",
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    digits = commands.add_parser(
        "digits",
        help="write the 1,797 UCI digit scans that scikit-learn ships",
        description="Write the 1,797 handwritten digits (UCI, CC BY 4.0) that scikit-learn ships as 8-bit grey PNG\n"
        "files: OUT/train/0 ... OUT/val/9, with a fixed stratified 80/20 split listed in OUT/split.txt.",
        epilog="examples:\n"
        "  python tools/prepare_data.py digits data/digits\n"
        "  python tools/prepare_data.py digits data/digits8 --size 8     # the scans as they are\n"
        "  python tools/prepare_data.py digits data/digits --size 64 --overwrite",
        formatter_class=raw,
    )
    digits.add_argument("out", metavar="OUT", help="folder to create")
    digits.add_argument(
        "--size",
        type=_positive,
        default=DIGITS_SIZE,
        help=f"side in pixels; the 8 x 8 scans are enlarged bicubically (default {DIGITS_SIZE})",
    )
    digits.add_argument("--overwrite", action="store_true", help="replace digits of another size or an incomplete set")
    digits.set_defaults(run=_digits_command)
    check = commands.add_parser(
        "check",
        help="decode every image of a folder and report what is wrong",
        description="Decode every image below ROOT and report unreadable files, sizes, formats and images per class.\n"
        "Exit code: 0 fine, 1 problems found, 2 not an image folder.",
        epilog="examples:\n"
        "  python tools/prepare_data.py check data/digits\n"
        "  python tools/prepare_data.py check /data/imagenet --split train --workers 16 --list problems.txt",
        formatter_class=raw,
    )
    check.add_argument("root", metavar="ROOT", help="data folder")
    check.add_argument("--split", nargs="+", help="sub-folders to check (default: train, val, test, whichever exist)")
    check.add_argument("--min-size", type=_positive, default=1, help="report images with a side below this many pixels")
    check.add_argument(
        "--workers", type=_positive, default=min(8, os.cpu_count() or 1), help="threads (default %(default)s)"
    )
    check.add_argument("--show", type=int, default=20, help="problems to print (default %(default)s)")
    check.add_argument("--list", metavar="FILE", help="write all problems to this file, one a line")
    check.set_defaults(run=_check_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code (2: the command cannot do its work)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options, Console())
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no half-written data is left", file=sys.stderr)
        return 130

"""Preparing and checking data sets: the commands of ``tools/prepare_data.py``."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vision_ssm.data.check_dense import DenseDataError, DenseReport, check_layout
from vision_ssm.data.check_medical import MEDICAL_LAYOUTS, check_medical
from vision_ssm.data.decode import UnreadableImageError, load_image, read_header
from vision_ssm.data.digits import DIGITS_SIZE, write_digits
from vision_ssm.data.image_folder import SPLIT_NAMES, ImageFolder, check_same_classes
from vision_ssm.data.prepare_drawn import add_drawn_commands, positive
from vision_ssm.data.prepare_medical import add_medical_commands
from vision_ssm.data.progress import tracked_map
from vision_ssm.data.shapes import LAYOUTS
from vision_ssm.data.writing import PrepareError

_CLASSES_SHOWN = 20


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

    for text, size, mode in tracked_map(inspect, range(len(dataset)), workers, f"checking {split or 'images'}"):
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
    if options.layout is None:
        if options.num_classes is not None:
            raise PrepareError("--num-classes belongs to --layout ade20k or cityscapes")
        reports, problems = check_folder(options.root, options.split, options.min_size, options.workers)
        console.print(_table(reports))
        _show_problems(options, console, problems, sum(report.images for report in reports))
        return 1 if problems else 0
    if options.min_size != 1:
        raise PrepareError("--min-size is for folders of classes; it cannot be combined with --layout")
    if options.num_classes is not None and options.layout not in ("ade20k", "cityscapes", *MEDICAL_LAYOUTS):
        raise PrepareError(f"--num-classes belongs to --layout ade20k or cityscapes, got --layout {options.layout}")
    try:
        check = check_medical if options.layout in MEDICAL_LAYOUTS else check_layout
        found = check(
            options.root, options.layout, options.split, num_classes=options.num_classes, workers=options.workers
        )
    except DenseDataError as error:
        raise PrepareError(str(error)) from error
    console.print(_dense_table(found))
    for report in found:
        for warning in report.warnings:
            console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)
    problems = [problem for report in found for problem in report.problems]
    _show_problems(options, console, problems, sum(report.images for report in found))
    return 1 if problems else 0


def _dense_table(reports: Sequence[DenseReport]) -> Table:
    table = Table("", *(report.label for report in reports), box=SIMPLE)
    table.add_row("images", *(str(report.images) for report in reports))
    for fact in dict.fromkeys(fact for report in reports for fact in report.facts):
        table.add_row(fact, *(report.facts.get(fact, "-") for report in reports))
    # Half of ADE20K's classes would fill the screen: the most frequent ones, and how many more there are.
    totals = Counter[str]()
    for report in reports:
        totals.update(report.counts)
    names = [name for name, count in totals.most_common() if count]
    for name in names[:_CLASSES_SHOWN]:
        table.add_row(f"class {name}", *(str(report.counts.get(name, "-")) for report in reports))
    if len(names) > _CLASSES_SHOWN:
        table.add_row(f"{len(names) - _CLASSES_SHOWN} more classes")
    return table


def _show_problems(options: argparse.Namespace, console: Console, problems: Sequence[str], images: int) -> None:
    """Print the first problems and their number, and write all to the file of ``--list``."""
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
        console.print(f"no problem found in {images} images")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Make small data sets, and check data sets: for classification (ImageNet layout,\n"
        "ROOT/SPLIT/CLASS/image), for dense prediction (layouts of ADE20K, Cityscapes and COCO), and for medical\n"
        "segmentation (layouts of Synapse, ACDC and ISIC, mask folders, NIfTI and DICOM).",
        epilog="examples:\n"
        "  python tools/prepare_data.py digits data/digits\n"
        "  python tools/prepare_data.py shapes data/shapes_ade20k --layout ade20k\n"
        "  python tools/prepare_data.py arrows data/arrows\n"
        "  python tools/prepare_data.py check data/imagenet --workers 16 --min-size 32\n"
        "  python tools/prepare_data.py check data/coco --layout coco",
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
        type=positive,
        default=DIGITS_SIZE,
        help=f"side in pixels; the 8 x 8 scans are enlarged bicubically (default {DIGITS_SIZE})",
    )
    digits.add_argument("--overwrite", action="store_true", help="replace digits of another size or an incomplete set")
    digits.set_defaults(run=_digits_command)
    add_drawn_commands(commands)
    add_medical_commands(commands)
    _add_check(commands)
    return parser


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    check = commands.add_parser(
        "check",
        help="read every file of a data set and report what is wrong",
        description="Decode every image below ROOT and report unreadable files, sizes, formats and images per class.\n"
        "With --layout also what belongs to the images: label maps or COCO's annotations.\n"
        "Exit code: 0 fine, 1 problems found, 2 not a data folder.",
        epilog="examples:\n"
        "  python tools/prepare_data.py check data/digits\n"
        "  python tools/prepare_data.py check /data/imagenet --split train --workers 16 --list problems.txt\n"
        "  python tools/prepare_data.py check /data/ADEChallengeData2016 --layout ade20k\n"
        "  python tools/prepare_data.py check data/shapes_ade20k --layout ade20k --num-classes 7\n"
        "  python tools/prepare_data.py check data/Task09_Spleen --layout nifti",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("root", metavar="ROOT", help="data folder")
    check.add_argument("--layout", choices=(*LAYOUTS, *MEDICAL_LAYOUTS), help="of ROOT (default: one folder per class)")
    check.add_argument(
        "--split", nargs="+",
        help="parts to check (default: all of the layout; of a folder of classes train, val, test, whichever exist)",
    )  # fmt: skip
    check.add_argument(
        "--num-classes", type=positive,
        help="of label maps (default: 150 for ade20k, 19 for cityscapes, those of the set for medical layouts)",
    )
    check.add_argument("--min-size", type=positive, default=1, help="report images with a side below this many pixels")
    check.add_argument(
        "--workers", type=positive, default=min(8, os.cpu_count() or 1), help="threads (default %(default)s)"
    )
    check.add_argument("--show", type=int, default=20, help="problems to print (default %(default)s)")
    check.add_argument("--list", metavar="FILE", help="write all problems to this file, one a line")
    check.set_defaults(run=_check_command)


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

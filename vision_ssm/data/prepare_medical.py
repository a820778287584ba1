"""The medical commands of ``tools/prepare_data.py``: drawn data sets, and NIfTI to slices."""

import argparse
import os
from pathlib import Path

from rich.console import Console

from vision_ssm.data.lesions import LESIONS_SIZE, LESIONS_TRAIN, LESIONS_VAL, write_lesions
from vision_ssm.data.medical_cases import TEST_FOLDERS, Case, Reading, dataset_labels, find_cases
from vision_ssm.data.medical_intensity import ABDOMEN_WINDOW
from vision_ssm.data.medical_splits import fixed_split
from vision_ssm.data.medical_volume import ORIENTATION, MedicalDataError
from vision_ssm.data.organ_layouts import (
    ORGAN_LAYOUTS,
    ORGANS_CASES,
    ORGANS_DEPTH,
    ORGANS_SIZE,
    SynapseWriter,
    already_there,
    write_organs,
)
from vision_ssm.data.progress import tracked_map
from vision_ssm.data.writing import PrepareError, replacing

_README = """\
Slices of NIfTI volumes in the form of Synapse (TransUNet)

Source:   {root}
Classes:  {classes}
Layout:   train_npz/CASE_sliceNNN.npz (image, label), test_vol_h5/CASE.npy.h5 (image, label; attribute spacing),
          lists/lists_Synapse/{{train,test_vol}}.txt
Cases:    {train} to train, {test} to test
Values:   image in [0, 1], {scaling}; slices run {orientation}
Made by:  python tools/prepare_data.py nifti ROOT OUT{flags}
"""


def convert_nifti(
    root: str | os.PathLike, out: str | os.PathLike, reading: Reading, *, test: float = 0.2, seed: int = 42,
    split_file: str | os.PathLike | None = None, classes: tuple[str, ...] | None = None, flags: str = "",
    workers: int = 2,
) -> tuple[int, int] | None:
    """Write NIfTI or DICOM cases with label maps as slices and volumes in the form of Synapse.

    Args:
        root: Data folder in a layout of `find_cases`.
        out: Folder to create; it appears at once.
        reading: How volumes are read; ``num_classes`` are counted from `classes` where it is None.
        test: Fraction of the cases that become test volumes. Where ``imagesTs`` and ``labelsTs`` exist, those are they.
        seed: Of the division into training and test.
        split_file: Division to use, whose ``val`` cases become test volumes; default: drawn, and written to
            ``OUT/splits.json``.
        classes: Names of the classes; default: those of ``dataset.json``.
        flags: The command's flags, for the README.
        workers: Threads.

    Returns:
        Numbers of training and test cases; None if `out` holds the result of the same command already.

    Raises:
        PrepareError: `out` is not empty or cannot be written.
        MedicalDataError: Data that cannot be used, which is named.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser().resolve()
    cases = {case.name: case for case in find_cases(root)}
    names = classes or dataset_labels(root)
    if names is not None and reading.num_classes is None:
        reading = Reading(reading.orientation, reading.window, reading.rescale, len(names), reading.check_units)
    scaling = "percentiles of each volume" if reading.window is None else "window {:g} to {:g}".format(*reading.window)

    def readme(train: list[Case], held_out: list[Case]) -> str:
        return _README.format(
            root=root.resolve(), classes="not named" if names is None else ", ".join(names), train=len(train),
            test=len(held_out), scaling=scaling, orientation=reading.orientation or "as stored", flags=flags,
        )  # fmt: skip

    has_test = all((root / folder).is_dir() for folder in TEST_FOLDERS)

    def divided(file: Path) -> tuple[list[Case], list[Case]]:
        if has_test:
            return list(cases.values()), find_cases(root, test=True)
        parts = [fixed_split(file, list(cases), part, val=test, seed=seed) for part in ("train", "val")]
        return [cases[name] for name in parts[0]], [cases[name] for name in parts[1]]

    written = out / "splits.json"
    # only a folder that this command made says how its cases were divided
    known = (out / "README.txt").is_file() and (has_test or split_file or written.is_file())
    if already_there(out, readme(*divided(Path(split_file or written))) if known else ""):
        return None
    with replacing(out) as folder:
        train, held_out = divided(Path(split_file or folder / "splits.json"))
        writer = SynapseWriter(folder)

        def convert(item: tuple[str, Case]) -> list[str]:
            volume = reading.volume(item[1])
            if volume.mask is None or volume.image.shape[1] != 1:
                raise MedicalDataError(
                    f"case {item[1].name!r} has {volume.image.shape[1]} channels; the form of Synapse holds one"
                )
            return writer.write_case(item[0], item[1].name, volume.image[:, 0], volume.mask, volume.spacing)

        lists: dict[str, list[str]] = {"train": [], "test": []}
        items = [("train", case) for case in train] + [("test", case) for case in held_out]
        for (part, _), lines in zip(items, tracked_map(convert, items, workers, "converting")):
            lists[part] += lines
        writer.finish(lists, {})
        (folder / "README.txt").write_text(readme(train, held_out), encoding="utf-8")
    return len(train), len(held_out)


def _organs_command(options: argparse.Namespace, console: Console) -> int:
    written = write_organs(
        options.out, options.layout, cases=options.cases, size=options.size, depth=options.depth, seed=options.seed,
        workers=options.workers,
    )  # fmt: skip
    state = "written to" if written else "already complete in"
    console.print(
        f"organs {state} {options.out} ({options.layout}): {options.cases} volumes", soft_wrap=True, highlight=False
    )
    return 0


def _lesions_command(options: argparse.Namespace, console: Console) -> int:
    written = write_lesions(
        options.out, train=options.train, val=options.val, size=options.size, seed=options.seed,
        workers=options.workers,
    )  # fmt: skip
    state = "written to" if written else "already complete in"
    counts = f"{options.train} train, {options.val} val images"
    console.print(f"lesions {state} {options.out}: {counts}", soft_wrap=True, highlight=False)
    return 0


def _nifti_command(options: argparse.Namespace, console: Console) -> int:
    window = None if options.percentiles else tuple(options.window)
    flags = " --percentiles" if options.percentiles else " --window {:g} {:g}".format(*options.window)
    if options.rescale:
        flags += " --rescale {:g} {:g}".format(*options.rescale)
    for name in ("orientation", "test", "seed", "split_file", "num_classes"):
        if getattr(options, name) is not None:
            flags += f" --{name.replace('_', '-')} {getattr(options, name)}"
    orientation = None if options.orientation == "stored" else options.orientation
    try:
        reading = Reading(
            orientation, window, tuple(options.rescale) if options.rescale else None, options.num_classes
        )
        counts = convert_nifti(
            options.root, options.out, reading, test=options.test, seed=options.seed, split_file=options.split_file,
            flags=flags, workers=options.workers,
        )  # fmt: skip
    except ValueError as error:  # MedicalDataError is one
        raise PrepareError(str(error)) from error
    state = "already complete in" if counts is None else f"{counts[0]} training and {counts[1]} test cases written to"
    console.print(f"slices: {state} {options.out}", soft_wrap=True, highlight=False)
    return 0


def add_medical_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``organs``, ``lesions`` and ``nifti`` to the commands of ``tools/prepare_data.py``."""
    raw = argparse.RawDescriptionHelpFormatter
    workers = min(8, os.cpu_count() or 1)
    organs = commands.add_parser(
        "organs",
        help="draw CT-like volumes with labelled organs",
        description="Draw CT-like abdomens with five touching organs, noise, a smooth field, thick slices and slices\n"
        "without organs, and write them in the layout on disk of a real data set. OUT/README.txt says what the"
        " classes\nare, OUT/overview.png shows some. Equal seeds give equal voxels, whatever the number of workers.",
        epilog="examples:\n"
        "  python tools/prepare_data.py organs data/organs --layout synapse\n"
        "  python tools/prepare_data.py organs data/organs_nifti --layout nifti --cases 8 --size 128 --depth 40",
        formatter_class=raw,
    )
    organs.add_argument("out", metavar="OUT", help="folder to create; one that holds something else is never touched")
    organs.add_argument("--layout", required=True, choices=ORGAN_LAYOUTS, help="what the data is to look like on disk")
    organs.add_argument("--cases", type=int, default=ORGANS_CASES, help="volumes in all (default %(default)s)")
    organs.add_argument("--size", type=int, default=ORGANS_SIZE, help="rows and columns (default %(default)s)")
    organs.add_argument("--depth", type=int, default=ORGANS_DEPTH, help="slices of a volume (default %(default)s)")
    organs.set_defaults(run=_organs_command)
    lesions = commands.add_parser(
        "lesions",
        help="draw dermoscopy images with lesion masks",
        description="Draw skin lesions with hair, vignetting and irregular borders, some of low contrast, in the\n"
        "layout of ISIC 2017 and 2018: OUT/{train,val}/{images,masks}/*.png. Equal seeds give equal pixels.",
        epilog="examples:\n  python tools/prepare_data.py lesions data/lesions",
        formatter_class=raw,
    )
    lesions.add_argument("out", metavar="OUT", help="folder to create; one that holds something else is never touched")
    lesions.add_argument("--train", type=int, default=LESIONS_TRAIN, help="training pictures (default %(default)s)")
    lesions.add_argument("--val", type=int, default=LESIONS_VAL, help="validation pictures (default %(default)s)")
    lesions.add_argument("--size", type=int, default=LESIONS_SIZE, help="rows and columns (default %(default)s)")
    lesions.set_defaults(run=_lesions_command)
    for command in (organs, lesions):
        command.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
        command.add_argument("--workers", type=int, default=workers, help="threads (default %(default)s)")
    _add_nifti(commands, workers)


def _add_nifti(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", workers: int) -> None:
    nifti = commands.add_parser(
        "nifti",
        help="turn NIfTI or DICOM volumes with label maps into slices",
        description="Write the slices of NIfTI volumes (or DICOM series) and their label maps in the form of Synapse:\n"
        "OUT/train_npz/*.npz, OUT/test_vol_h5/*.npy.h5 and OUT/lists/lists_Synapse. ROOT holds imagesTr and labelsTr\n"
        "(nnU-Net), or images and labels; a folder in images is one DICOM series.",
        epilog="examples:\n"
        "  python tools/prepare_data.py nifti data/Task09_Spleen data/spleen --window -125 275\n"
        "  python tools/prepare_data.py nifti data/heart_mr data/heart --percentiles --test 0.25",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nifti.add_argument("root", metavar="ROOT", help="data folder")
    nifti.add_argument("out", metavar="OUT", help="folder to create; one that holds something else is never touched")
    scale = nifti.add_mutually_exclusive_group()
    scale.add_argument(
        "--window", nargs=2, type=float, default=list(ABDOMEN_WINDOW), metavar=("LOW", "HIGH"),
        help="intensities that become 0 and 1 (default -125 275, Hounsfield units)",
    )  # fmt: skip
    scale.add_argument("--percentiles", action="store_true", help="scale by percentiles of each volume (MR)")
    nifti.add_argument(
        "--rescale", nargs=2, type=float, metavar=("SLOPE", "INTERCEPT"), help="applied first, such as 1 -1024"
    )
    nifti.add_argument(
        "--orientation", default=ORIENTATION,
        help="sides that columns, rows and slices run towards: LPS axial, LIA coronal, PIL sagittal, or 'stored'"
        " (default %(default)s)",
    )  # fmt: skip
    nifti.add_argument(
        "--test", type=float, default=0.2, help="fraction of cases that become test volumes (default %(default)s)"
    )
    nifti.add_argument("--split-file", metavar="FILE", help="division to use (nnU-Net's splits_final.json, fold 0)")
    nifti.add_argument("--num-classes", type=int, help="labels must be below it (default: of dataset.json, else any)")
    nifti.add_argument("--seed", type=int, default=42, help="of the division (default %(default)s)")
    nifti.add_argument("--workers", type=int, default=workers, help="threads (default %(default)s)")
    nifti.set_defaults(run=_nifti_command)

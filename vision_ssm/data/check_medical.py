"""Checks of medical data before training: every file is read as the data sets read it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.decode import UnreadableImageError
from vision_ssm.data.dense_report import DenseReport, listed, missing, spread
from vision_ssm.data.medical_arrays import AcdcSlices, AcdcVolumes, SynapseSlices, SynapseVolumes
from vision_ssm.data.medical_base import (
    ACDC_CLASSES,
    ISIC_CLASSES,
    SYNAPSE_CLASSES,
    MedicalDataset,
    SampleDataset,
    VolumeDataset,
)
from vision_ssm.data.medical_cases import TEST_FOLDERS, Reading, dataset_labels, find_cases
from vision_ssm.data.medical_folders import IsicImages, MaskFolder
from vision_ssm.data.medical_intensity import check_hounsfield
from vision_ssm.data.medical_volume import MedicalDataError, Volume
from vision_ssm.data.progress import tracked_map
from vision_ssm.registry import suggest

QUICK_ITEMS = 64
"""Items that a quick check reads."""
_Item = tuple[np.ndarray, np.ndarray, tuple[float, float, float] | None]


class _RawVolumes(VolumeDataset):
    """NIfTI and DICOM volumes with the intensities of the files; one without label map has an empty one."""

    def __init__(self, root: Path, classes: Sequence[str], test: bool) -> None:
        super().__init__(root, classes)
        self._chosen = find_cases(root, test=test, labelled=not test)
        self._hounsfield = _is_ct(root)

    def cases(self) -> list[str]:
        return [case.name for case in self._chosen]

    def volume(self, index: int) -> Volume:
        case = self._chosen[index]
        volume = Reading(num_classes=self.num_classes).stored(case)
        if self._hounsfield:
            check_hounsfield(volume.image, str(case.images[0]))
        return volume


def _is_ct(root: Path) -> bool:
    """Whether ``dataset.json`` says that the first channel is a CT."""
    try:
        content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        channels = content.get("channel_names") or content.get("modality") or {}
        return str(channels.get("0", "")).upper() == "CT"
    except (OSError, ValueError, AttributeError):
        return False


def check_dataset(dataset: MedicalDataset, label: str = "data", full: bool = True, workers: int = 4) -> DenseReport:
    """Read the items of a medical data set and note what is wrong.

    Problems: files that cannot be used (see the data set). Warnings: items whose mask is empty, and classes that occur
    in none (full check).

    Args:
        dataset: One of the medical data sets.
        label: Begins every message.
        full: Read every item and show a progress bar; else `QUICK_ITEMS` of them.
        workers: Threads.
    """
    report = DenseReport(label, images=len(dataset))
    chosen = list(range(len(dataset))) if full else spread(range(len(dataset)), QUICK_ITEMS)
    totals = np.zeros(dataset.num_classes, dtype=np.int64)
    sizes, spacings, empty = [], set(), []
    least, most = np.inf, -np.inf

    def read(index: int) -> _Item | str:
        try:
            return _item(dataset, index)
        except (MedicalDataError, UnreadableImageError) as error:
            return str(error)

    for index, found in zip(chosen, tracked_map(read, chosen, workers, f"{label}: reading" if full else None)):
        if isinstance(found, str):
            report.problem(found)
            continue
        image, mask, spacing = found
        sizes.append((mask.shape[-2], mask.shape[-1]))
        if spacing is not None:
            spacings.add(spacing)
        least, most = min(least, float(image.min())), max(most, float(image.max()))
        labels = (mask >= 0.5) if mask.dtype.kind == "f" else mask
        totals += np.bincount(labels.reshape(-1).astype(np.int64), minlength=dataset.num_classes)
        if not labels.any():
            empty.append(dataset.cases()[index])
    report.note_sizes(sizes)
    if sizes:
        report.facts["intensities"] = f"{least:.4g} to {most:.4g}"
        report.counts = dict(zip(dataset.classes, totals.tolist()))
    if spacings:
        sides = np.array(sorted(spacings))
        ranges = zip(sides.min(0), sides.max(0))
        report.facts["spacing D, H, W (mm)"] = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
    report.facts["empty masks"] = str(len(empty))
    if empty and len(empty) == len(sizes):
        report.warn(f"all {len(empty)} masks that were read are empty (background only)")
    elif empty and isinstance(dataset, VolumeDataset):
        report.warn(f"{len(empty)} of {len(sizes)} masks are empty (background only): {listed(empty)}")
    absent = [name for name, pixels in report.counts.items() if not pixels]
    if full and absent:
        report.warn(f"{len(absent)} of {dataset.num_classes} classes occur in no mask: {listed(absent)}")
    return report


def _item(dataset: MedicalDataset, index: int) -> _Item:
    if isinstance(dataset, VolumeDataset):
        volume = dataset.volume(index)
        mask = np.zeros((1, *volume.image.shape[2:]), dtype=np.int64) if volume.mask is None else volume.mask
        return volume.image, mask, volume.spacing
    if isinstance(dataset, SampleDataset):
        return *dataset.load(index), None
    raise TypeError(f"expected a medical data set, got {type(dataset).__name__}")


Maker = Callable[[Path, Sequence[str]], MedicalDataset]


def _synapse(root: Path) -> dict[str, Maker]:
    return {
        "train": lambda folder, classes: SynapseSlices(folder, classes=classes),
        "test_vol": lambda folder, classes: SynapseVolumes(folder, classes=classes),
    }


def _acdc(root: Path) -> dict[str, Maker]:
    return {
        "train": lambda folder, classes: AcdcSlices(folder, "train", classes=classes),
        "valid": lambda folder, classes: AcdcSlices(folder, "valid", classes=classes),
        "test": lambda folder, classes: AcdcVolumes(folder, "test", classes=classes),
    }


def _isic(root: Path) -> dict[str, Maker]:
    return {
        "train": lambda folder, classes: IsicImages(folder, "train", classes=classes),
        "val": lambda folder, classes: IsicImages(folder, "val", classes=classes),
    }


def _masks(root: Path) -> dict[str, Maker]:
    def maker(split: str) -> Maker:
        return lambda folder, classes: MaskFolder(folder, split, classes=classes)

    present = [name for name in ("train", "val", "test") if (root / name / "images").is_dir()]
    return {split: maker(split) for split in present or ["all"]}


def _nifti(root: Path) -> dict[str, Maker]:
    makers: dict[str, Maker] = {"train": lambda folder, classes: _RawVolumes(folder, classes, test=False)}
    if (root / TEST_FOLDERS[0]).is_dir():
        makers["test"] = lambda folder, classes: _RawVolumes(folder, classes, test=True)
    return makers


_LAYOUTS: dict[str, tuple[Callable[[Path], dict[str, Maker]], Sequence[str] | None]] = {
    "synapse": (_synapse, SYNAPSE_CLASSES), "acdc": (_acdc, ACDC_CLASSES), "isic": (_isic, ISIC_CLASSES),
    "masks": (_masks, ("background", "object")), "nifti": (_nifti, None),
}  # fmt: skip
MEDICAL_LAYOUTS = tuple(_LAYOUTS)


def check_medical(
    root: str | os.PathLike, layout: str, splits: Sequence[str] | None = None, *, num_classes: int | None = None,
    full: bool = True, workers: int = 4,
) -> list[DenseReport]:
    """Check a folder of medical data in a standard layout.

    Args:
        root: Data folder.
        layout: ``synapse``, ``acdc``, ``isic``, ``masks`` (image and mask folders) or ``nifti`` (and DICOM).
        splits: Default: all of the layout.
        num_classes: Background included; default: those of the layout, for ``nifti`` those of ``dataset.json``.
        full: Read every file; else some.
        workers: Threads.

    Returns:
        One report per split.

    Raises:
        MedicalDataError: No such folder, layout or split, or classes that nobody names.
    """
    root = Path(root).expanduser()
    if layout not in _LAYOUTS:
        raise MedicalDataError(f"unknown layout {layout!r}.{suggest(layout, MEDICAL_LAYOUTS)}")
    if not root.is_dir():
        raise MedicalDataError(missing(root, "data folder"))
    make, classes = _LAYOUTS[layout]
    if layout == "nifti":
        classes = dataset_labels(root)
    if num_classes is not None and (classes is None or len(classes) != num_classes):
        classes = ("background", *(f"label {label}" for label in range(1, num_classes)))
    if classes is None:
        raise MedicalDataError(f"{str(root)!r} has no dataset.json that names the classes; give their number")
    makers = make(root)
    for split in splits or ():
        if split not in makers:
            raise MedicalDataError(f"layout {layout!r} has no split {split!r} here.{suggest(split, makers)}")
    reports = []
    for split in splits or makers:
        try:
            dataset: Any = makers[split](root, classes)
        except MedicalDataError as error:
            report = DenseReport(split)
            report.problem(str(error))
        else:
            report = check_dataset(dataset, split, full, workers)
        reports.append(report)
    return reports

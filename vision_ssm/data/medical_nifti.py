"""NIfTI volumes and DICOM series with NIfTI label maps as data sets; the layouts on disk are those of `find_cases`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.medical_base import SampleDataset, VolumeDataset
from vision_ssm.data.medical_cases import TEST_FOLDERS, Case, Reading, SliceCache, dataset_labels, find_cases
from vision_ssm.data.medical_intensity import Window
from vision_ssm.data.medical_splits import SPLIT_FILE, fixed_split
from vision_ssm.data.medical_volume import ORIENTATION, MedicalDataError, Volume
from vision_ssm.registry import DATASETS

CACHE_FOLDER = ".slices"


def _classes(root: str | os.PathLike, classes: str | Sequence[str] | None) -> str | Sequence[str]:
    if classes is not None:
        return classes
    found = dataset_labels(root)
    if found is None:
        raise MedicalDataError(
            f"{str(root)!r} has no dataset.json that names the classes; give classes=(...), background first"
        )
    return found


def _chosen(
    root: Path, split: str, split_file: str | os.PathLike | None, **how: Any,
) -> list[Case]:
    """Cases of a split: ``test`` from its own folder where there is one, everything else by the split file."""
    if split == "test" and (root / TEST_FOLDERS[0]).is_dir():
        return find_cases(root, test=True)
    cases = {case.name: case for case in find_cases(root)}
    return [cases[name] for name in fixed_split(split_file or root / SPLIT_FILE, list(cases), split, **how)]


@DATASETS.register_module()
class NiftiSlices(SampleDataset):
    """Slices of NIfTI volumes or DICOM series with NIfTI label maps, read once and cached.

    Args:
        root: Data folder.
        split: ``train``, ``val``, ``test`` or ``all``; ``test`` is ``imagesTs`` with ``labelsTs`` where they exist.
        classes: See `MedicalDataset`; None: those of nnU-Net's ``dataset.json``.
        window: (low, high) intensities that become 0 and 1, such as (-125, 275) HU for the abdomen; None: percentiles
            of each volume.
        rescale: Slope and intercept for the stored intensities.
        check_units: Refuse intensities that do not look like Hounsfield units where the window does.
        orientation: Slicing direction; see `read_volume`.
        foreground_only: Leave out slices without any label.
        cache_dir: Folder for the slices; default ``ROOT/.slices``. See `SliceCache`.
        split_file, fold, folds, val, test, seed, group: See `fixed_split`.
        transform: See `SampleDataset`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, classes: str | Sequence[str] | None = None,
        window: Window | None = None, rescale: tuple[float, float] | None = None, check_units: bool = True,
        orientation: str | None = ORIENTATION, foreground_only: bool = False,
        cache_dir: str | os.PathLike | None = None, split_file: str | os.PathLike | None = None,
        fold: int = 0, folds: int | None = None, val: float = 0.2, test: float = 0.0, seed: int = 42,
        group: str | None = None, transform: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(root, _classes(root, classes), transform)
        reading = Reading(orientation, window, rescale, self.num_classes, check_units)
        chosen = _chosen(
            self.root, split, split_file, fold=fold, folds=folds, val=val, test=test, seed=seed, group=group
        )
        self.cache = SliceCache(cache_dir or self.root / CACHE_FOLDER, reading)
        self._slices = [
            (case, number)
            for case, facts in zip(chosen, self.cache.prepare(chosen))
            for number in range(facts["slices"]) if facts["foreground"][number] or not foreground_only
        ]  # fmt: skip
        if not self._slices:
            raise MedicalDataError(f"no slice of the split {split!r} of {str(self.root)!r} holds a label")
        self._cases = [f"{case.name}_slice{number:03d}" for case, number in self._slices]

    def cases(self) -> list[str]:
        return self._cases

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.cache.load(*self._slices[index])


@DATASETS.register_module()
class NiftiVolumes(VolumeDataset):
    """Whole NIfTI volumes or DICOM series with NIfTI label maps, intensities in [0, 1].

    Args:
        root, split, classes, window, rescale, check_units, orientation: See `NiftiSlices`.
        split_file, fold, folds, val, test, seed, group: See `fixed_split`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "val", *, classes: str | Sequence[str] | None = None,
        window: Window | None = None, rescale: tuple[float, float] | None = None, check_units: bool = True,
        orientation: str | None = ORIENTATION, split_file: str | os.PathLike | None = None,
        fold: int = 0, folds: int | None = None, val: float = 0.2, test: float = 0.0, seed: int = 42,
        group: str | None = None,
    ) -> None:
        super().__init__(root, _classes(root, classes))
        self.reading = Reading(orientation, window, rescale, self.num_classes, check_units)
        self._chosen = _chosen(
            self.root, split, split_file, fold=fold, folds=folds, val=val, test=test, seed=seed, group=group
        )

    def cases(self) -> list[str]:
        return [case.name for case in self._chosen]

    def volume(self, index: int) -> Volume:
        return self.reading.volume(self._chosen[index])

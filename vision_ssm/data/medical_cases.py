"""Cases of a folder of NIfTI volumes or DICOM series, and their slices cached on disk.

Layouts: nnU-Net's (``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``; ``imagesTs``, ``labelsTs``) and plain
(``images/CASE.nii.gz`` or ``images/CASE/*.dcm``, ``labels/CASE.nii.gz``).
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.dense_report import listed, missing
from vision_ssm.data.medical_files import NIFTI_ENDINGS, read_arrays, read_volume, stem_of
from vision_ssm.data.medical_intensity import Window, check_window, scale_intensities
from vision_ssm.data.medical_volume import ORIENTATION, MedicalDataError, Volume, check_orientation
from vision_ssm.data.progress import tracked_map

FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"), ("images", "masks"))
TEST_FOLDERS = ("imagesTs", "labelsTs")
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Case:
    """Files of one case: an image (file or DICOM folder) for each channel, and the label map if there is one."""

    name: str
    images: tuple[Path, ...]
    mask: Path | None


@dataclass(frozen=True)
class Reading:
    """How volumes are read; see `read_volume` and `scale_intensities`."""

    orientation: str | None = ORIENTATION
    window: Window | None = None
    rescale: tuple[float, float] | None = None
    num_classes: int | None = None
    check_units: bool = True

    def __post_init__(self) -> None:
        check_orientation(self.orientation)
        check_window(self.window)

    def stored(self, case: Case) -> Volume:
        """The case with the intensities of its files (and `rescale`)."""
        return read_volume(
            case.images, case.mask, case=case.name, orientation=self.orientation, num_classes=self.num_classes,
            rescale=self.rescale,
        )  # fmt: skip

    def volume(self, case: Case) -> Volume:
        """The case with intensities in [0, 1]."""
        return scale_intensities(self.stored(case), self.window, str(case.images[0]), self.check_units)


def find_cases(root: str | os.PathLike, test: bool = False, labelled: bool = True) -> list[Case]:
    """Cases below `root`, sorted by name.

    Args:
        root: Data folder, in one of the layouts above.
        test: Those of ``imagesTs`` and ``labelsTs``.
        labelled: Every image must have a label map; else images without one are taken as well.

    Raises:
        MedicalDataError: No such folder, no case, channels that are missing, images without label map, or label maps
            without image.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise MedicalDataError(missing(root, "data folder"))
    folders = [TEST_FOLDERS] if test else FOLDERS
    names = next((pair for pair in folders if all((root / name).is_dir() for name in pair[: 1 + labelled])), None)
    if names is None:
        expected = " or ".join(" and ".join(map(repr, pair)) for pair in folders)
        held = sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith("."))
        raise MedicalDataError(
            f"{str(root)!r} does not hold the folders {expected}; it holds {listed(held) or 'nothing'}"
        )
    images, labels = (root / name for name in names)
    masks = {stem_of(path.name): path for path in _entries(labels) if path.is_file()} if labels.is_dir() else {}
    channels: dict[str, list[Path]] = {}
    for path in _entries(images):
        stem = path.name if path.is_dir() else stem_of(path.name)
        # an image that has a label map of its own name carries no channel number, whatever it ends in
        numbered = None if stem in masks else re.fullmatch(r"(.+)_(\d{4})", stem)
        channels.setdefault(numbered.group(1) if numbered else stem, []).append(path)
    if not channels:
        raise MedicalDataError(f"{str(images)!r} holds neither NIfTI files nor folders with DICOM series")
    counts = {len(paths) for paths in channels.values()}
    if len(counts) > 1:
        few = [case for case, paths in channels.items() if len(paths) < max(counts)]
        raise MedicalDataError(
            f"cases in {str(images)!r} have {min(counts)} to {max(counts)} channels; channels are missing of"
            f" {listed(few)}"
        )
    alone, idle = [case for case in channels if case not in masks], [case for case in masks if case not in channels]
    if (alone and labelled) or idle:
        facts = [f"{len(alone)} images in {str(images)!r} have no label map: {listed(alone)}"] if alone else []
        facts += [f"{len(idle)} label maps in {str(labels)!r} have no image: {listed(idle)}"] if idle else []
        raise MedicalDataError("; ".join(facts))
    return [Case(case, tuple(paths), masks.get(case)) for case, paths in sorted(channels.items())]


def _entries(folder: Path) -> list[Path]:
    """NIfTI files and folders directly in `folder`, sorted."""
    return sorted(
        path for path in folder.iterdir()
        if not path.name.startswith(".") and (path.is_dir() or path.name.lower().endswith(NIFTI_ENDINGS))
    )  # fmt: skip


def dataset_labels(root: str | os.PathLike) -> tuple[str, ...] | None:
    """Names of the classes in nnU-Net's ``dataset.json``, background first; None where there is no such file.

    Raises:
        MedicalDataError: The file does not number its labels 0, 1, 2, ...
    """
    path = Path(root).expanduser() / "dataset.json"
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        if all(str(key).isdigit() for key in labels):  # the Decathlon's older form: number to name
            labels = {name: key for key, name in labels.items()}
        numbers = {int(number): str(name) for name, number in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedicalDataError(
            f"{str(path)!r} does not give one number for each class under 'labels' (regions are not"
            f" supported): {error!r}"
        ) from error
    if sorted(numbers) != list(range(len(numbers))):
        raise MedicalDataError(f"{str(path)!r} numbers its labels {sorted(numbers)}; 0, 1, 2, ... are expected")
    return tuple(numbers[number] for number in range(len(numbers)))


class SliceCache:
    """Slices of volumes as npz files that are read one at a time.

    A case lies in a folder named by a fingerprint of its files (size and time of change) and of the settings, so
    changed data or settings make new slices. A folder appears complete or not at all; a slice that cannot be read back
    is made again. Folders of former settings stay until somebody removes the cache.

    Args:
        folder: Where to; made when needed.
        reading: How volumes are read.
    """

    def __init__(self, folder: str | os.PathLike, reading: Reading) -> None:
        self.folder, self.reading = Path(folder).expanduser(), reading
        self._places: dict[str, Path] = {}

    def prepare(self, cases: Sequence[Case], workers: int = 2) -> list[dict[str, Any]]:
        """What is known of each case: ``slices``, their number, and ``foreground``, one bool for each."""
        absent = [case for case in cases if not (self._place(case) / "case.json").is_file()]
        if absent:
            for _ in tracked_map(self._build, absent, workers, f"caching {len(absent)} volumes"):
                pass
        return [self._facts(case) for case in cases]

    def load(self, case: Case, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Slice `number` of a case: image (C, H, W) float32 in [0, 1] and labels (H, W) int64."""
        path = self._place(case) / f"slice{number:04d}.npz"
        try:
            found = read_arrays(path, ("image", "label"))
        except MedicalDataError:  # cut off or removed since
            self._build(case, replace=True)
            found = read_arrays(path, ("image", "label"))
        return found["image"], found["label"].astype(np.int64)

    def _facts(self, case: Case) -> dict[str, Any]:
        path = self._place(case) / "case.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._build(case, replace=True)
            return json.loads(path.read_text(encoding="utf-8"))

    def _place(self, case: Case) -> Path:
        if case.name in self._places:
            return self._places[case.name]
        files = [
            file for path in (*case.images, *([case.mask] if case.mask else []))
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        ]  # fmt: skip
        marks = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
        text = json.dumps([_CACHE_VERSION, marks, vars(self.reading)])
        place = self.folder / f"{case.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._places[case.name] = place
        return place

    def _build(self, case: Case, replace: bool = False) -> None:
        place = self._place(case)
        volume = self.reading.volume(case)
        if volume.mask is None:
            raise MedicalDataError(f"case {case.name!r} has no label map, so it cannot train")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{case.name}.", dir=self.folder) as temporary:
                new = Path(temporary) / "new"
                new.mkdir()
                label_type = np.uint8 if volume.mask.max() <= 255 else np.int32
                for number, (image, mask) in enumerate(zip(volume.image, volume.mask)):
                    np.savez(new / f"slice{number:04d}.npz", image=image, label=mask.astype(label_type))
                facts = dict(slices=len(volume.image), foreground=volume.mask.any(axis=(1, 2)).tolist())
                (new / "case.json").write_text(json.dumps(facts), encoding="utf-8")
                if replace and place.exists():
                    place.rename(Path(temporary) / "old")
                try:
                    new.rename(place)
                except OSError:  # another process was faster, with the same content
                    if not place.is_dir():
                        raise
        except OSError as error:
            raise MedicalDataError(
                f"cannot write slices to the cache {str(self.folder)!r}: {error.strerror or error}. Name a folder with"
                " room that can be written with cache_dir=."
            ) from error

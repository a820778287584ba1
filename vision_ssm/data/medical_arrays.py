"""Synapse and ACDC in the folders and files that the papers publish: slices in npz, volumes in HDF5 or npz.

Image values are used as stored (Synapse: a CT clipped to [-125, 275] HU and scaled to [0, 1]); one channel.

Sources: TransUNet (arXiv 2102.04306) for Synapse, MT-UNet (arXiv 2111.04734) for ACDC, VM-UNet (arXiv 2402.02491) for
the lists, MSVM-UNet (arXiv 2408.13735) for the folder names it changed.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.dense_report import listed, missing
from vision_ssm.data.medical_base import SampleDataset, VolumeDataset, as_spacing
from vision_ssm.data.medical_files import read_arrays
from vision_ssm.data.medical_intensity import check_finite, check_range
from vision_ssm.data.medical_volume import MedicalDataError, Volume, labels_of
from vision_ssm.registry import DATASETS

SLICE_FOLDERS, VOLUME_FOLDERS = ("train_npz", "train_slice"), ("test_vol_h5", "test_vol")
"""Folders of Synapse's slices and volumes: the published name and MSVM-UNet's."""
_SYNAPSE_LISTS = ("lists/lists_Synapse", "lists/list_Synapse", "lists_Synapse", "list_Synapse")
_ACDC_LISTS = ("lists/lists_ACDC", "lists_ACDC")
Range = tuple[float, float]


def listed_files(
    root: Path, folders: Sequence[str], list_dir: str | os.PathLike | None, lists: Sequence[str], split: str,
    ending: str,
) -> list[Path]:
    """Files of a split in the order of its list ``SPLIT.txt``, one name or stem a line.

    Args:
        root: Data folder.
        folders: Where the files may lie, relative to `root`; the first that exists.
        list_dir: Folder of the list; None: the first of `lists` in `root` that has it. Without any, all files in order.
        lists: Usual places of the list.
        split: Name of the list.
        ending: Of the files.

    Raises:
        MedicalDataError: No folder, no list where `list_dir` says, an empty list, or files that are missing.
    """
    folder = next((root / name for name in folders if (root / name).is_dir()), None)
    if folder is None:
        raise MedicalDataError(missing(root / folders[0], f"{split} folder"))
    file: Path | None
    if list_dir is not None:
        file = Path(list_dir).expanduser() / f"{split}.txt"
        if not file.is_file():
            raise MedicalDataError(missing(file, "list of cases, a file"))
    else:
        file = next((root / name / f"{split}.txt" for name in lists if (root / name / f"{split}.txt").is_file()), None)
    present = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(ending))
    if file is None:
        if not present:
            raise MedicalDataError(f"{str(folder)!r} holds no file that ends in {ending!r}")
        warnings.warn(
            f"no list {split}.txt of {str(root)!r} (looked in {', '.join(lists)}): all {len(present)} files of"
            f" {str(folder)!r} are taken",
            stacklevel=4,
        )
        return [folder / name for name in present]
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    names = [line.removesuffix(ending) + ending for line in lines if line]
    if not names:
        raise MedicalDataError(f"the list {str(file)!r} is empty")
    known = set(present)
    absent = [name for name in names if name not in known]
    if absent:
        raise MedicalDataError(
            f"{len(absent)} of {len(names)} files that {str(file)!r} names are not in {str(folder)!r}: {listed(absent)}"
        )
    return [folder / name for name in names]


class _Arrays:
    """Reads pairs of arrays from npz and HDF5 files, and checks them."""

    def __init__(self, keys: tuple[str, str], num_classes: int, value_range: Range | None) -> None:
        self.keys, self.num_classes, self.value_range = keys, num_classes, value_range

    def read(self, path: Path, dimensions: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Image float32, labels int64 of the same shape, and the file's spacing if it has one."""
        found = read_arrays(path, self.keys)
        image, mask = (found[key] for key in self.keys)
        name = str(path)
        if image.shape != mask.shape or image.ndim not in dimensions or 0 in image.shape:
            expected = " or ".join({2: "(H, W)", 3: "(D, H, W)"}[count] for count in dimensions)
            raise MedicalDataError(
                f"{name!r}: {self.keys[0]} is {image.shape} and {self.keys[1]} {mask.shape}; both must be {expected},"
                " the same"
            )
        if image.dtype.kind not in "buif":
            raise MedicalDataError(f"{name!r}: {self.keys[0]} holds values of type {image.dtype}, not numbers")
        image = image.astype(np.float32)
        check_finite(image, name)
        if self.value_range is not None:
            check_range(image, name, *self.value_range)
        return image, labels_of(mask, name, self.num_classes), found.get("spacing")


class _ArraySlices(SampleDataset):
    """Slices in npz files."""

    def __init__(
        self, root: str | os.PathLike, files: list[Path], classes: str | Sequence[str], transform: dict | None,
        keys: tuple[str, str], value_range: Range | None,
    ) -> None:
        super().__init__(root, classes, transform)
        self.files = files
        self._cases = [path.name.removesuffix(".npz") for path in files]
        self._arrays = _Arrays(keys, self.num_classes, value_range)

    def cases(self) -> list[str]:
        return self._cases

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask, _ = self._arrays.read(self.files[index], (2,))
        return image[None], mask  # (H, W) -> (1, H, W)


class _ArrayVolumes(VolumeDataset):
    """Volumes in npz or HDF5 files."""

    def __init__(
        self, root: str | os.PathLike, files: list[Path], classes: str | Sequence[str], spacing: Sequence[float] | None,
        keys: tuple[str, str], value_range: Range | None,
    ) -> None:
        super().__init__(root, classes)
        self.files, self.spacing = files, spacing
        self._cases = [path.name.removesuffix(".npz").removesuffix(".npy.h5") for path in files]
        self._arrays = _Arrays(keys, self.num_classes, value_range)

    def cases(self) -> list[str]:
        return self._cases

    def volume(self, index: int) -> Volume:
        image, mask, stored = self._arrays.read(self.files[index], (2, 3))
        if image.ndim == 2:
            image, mask = image[None], mask[None]  # (H, W) -> (1, H, W)
        spacing = as_spacing(self.spacing, stored)
        return Volume(image[:, None], mask, spacing, None, self._cases[index])  # (D, H, W) -> (D, 1, H, W)


def _synapse_files(
    root: str | os.PathLike, split: str, list_dir: str | os.PathLike | None, folders: Sequence[str], ending: str,
) -> list[Path]:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise MedicalDataError(missing(folder, "data folder"))
    return listed_files(folder, folders, list_dir, _SYNAPSE_LISTS, split, ending)


def _acdc_files(root: str | os.PathLike, split: str, list_dir: str | os.PathLike | None) -> list[Path]:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise MedicalDataError(missing(folder, "data folder"))
    return listed_files(folder, (split,), list_dir, _ACDC_LISTS, split, ".npz")


@DATASETS.register_module()
class SynapseSlices(_ArraySlices):
    """Slices of Synapse as TransUNet prepared them: ``train_npz/caseXXXX_sliceYYY.npz`` with image, label (H, W).

    Args:
        root: Folder with ``train_npz`` (or ``train_slice``) and ``lists/lists_Synapse``.
        split: List ``SPLIT.txt`` of stems; one's own list may name some of the slices for validation.
        list_dir: Folder of the lists, where they lie elsewhere.
        classes: See `MedicalDataset`.
        transform: See `SampleDataset`.
        value_range: Intensities outside are an error; None: any.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, list_dir: str | os.PathLike | None = None,
        classes: str | Sequence[str] = "synapse", transform: dict[str, Any] | None = None,
        value_range: Range | None = (0.0, 1.0),
    ) -> None:
        files = _synapse_files(root, split, list_dir, SLICE_FOLDERS, ".npz")
        super().__init__(root, files, classes, transform, ("image", "label"), value_range)


@DATASETS.register_module()
class SynapseVolumes(_ArrayVolumes):
    """Test volumes of Synapse: ``test_vol_h5/caseXXXX.npy.h5`` with image, label (D, H, W).

    Args:
        root, split, list_dir, classes, value_range: See `SynapseSlices`.
        spacing: Millimetres along D, H, W. The published files do not tell it, and the papers compute distances with 1
            mm; None takes an attribute ``spacing`` of the file if there is one, else 1 mm.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "test_vol", *, list_dir: str | os.PathLike | None = None,
        classes: str | Sequence[str] = "synapse", spacing: Sequence[float] | None = None,
        value_range: Range | None = (0.0, 1.0),
    ) -> None:
        files = _synapse_files(root, split, list_dir, VOLUME_FOLDERS, ".npy.h5")
        super().__init__(root, files, classes, spacing, ("image", "label"), value_range)


@DATASETS.register_module()
class AcdcSlices(_ArraySlices):
    """Slices of ACDC as MT-UNet prepared them: ``SPLIT/*.npz`` with img, label (H, W); lists of file names.

    Args:
        root: Folder with ``train``, ``valid``, ``test`` and, if there are lists, ``lists_ACDC`` (also below ``lists``).
        split: ``train`` or ``valid``.
        list_dir, classes, transform, value_range: See `SynapseSlices`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, list_dir: str | os.PathLike | None = None,
        classes: str | Sequence[str] = "acdc", transform: dict[str, Any] | None = None,
        value_range: Range | None = None,
    ) -> None:
        super().__init__(root, _acdc_files(root, split, list_dir), classes, transform, ("img", "label"), value_range)


@DATASETS.register_module()
class AcdcVolumes(_ArrayVolumes):
    """Volumes of ACDC: ``test/*.npz`` with img, label (D, H, W); slices, as of ``valid``, are volumes of one slice.

    Args:
        root, split, list_dir, classes, value_range: See `AcdcSlices`.
        spacing: See `SynapseVolumes`; here an array ``spacing`` of the npz file.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "test", *, list_dir: str | os.PathLike | None = None,
        classes: str | Sequence[str] = "acdc", spacing: Sequence[float] | None = None,
        value_range: Range | None = None,
    ) -> None:
        super().__init__(root, _acdc_files(root, split, list_dir), classes, spacing, ("img", "label"), value_range)

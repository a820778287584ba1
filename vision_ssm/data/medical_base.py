"""What the medical data sets have in common: classes, samples that train, and whole volumes that are evaluated."""

import colorsys
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vision_ssm.data.dense_report import missing
from vision_ssm.data.medical_transforms import medical_transform
from vision_ssm.data.medical_volume import MedicalDataError, Volume
from vision_ssm.data.randomness import seeded
from vision_ssm.registry import suggest

SYNAPSE_CLASSES = (
    "background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach",
)  # fmt: skip
ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
ISIC_CLASSES = ("background", "lesion")
ORGANS_CLASSES = ("background", "liver", "spleen", "kidney", "stomach", "aorta")
"""Of the drawn volumes that ``tools/prepare_data.py organs`` makes."""
CLASS_SETS = {"synapse": SYNAPSE_CLASSES, "acdc": ACDC_CLASSES, "isic": ISIC_CLASSES, "organs": ORGANS_CLASSES}
_OKABE_ITO = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip

Size3 = tuple[float, float, float]


def class_palette(count: int) -> list[tuple[int, int, int]]:
    """RGB colours of `count` classes: black for the background, Okabe and Ito's colours, then hues far apart."""
    colours: list[tuple[int, int, int]] = [(0, 0, 0), *_OKABE_ITO]
    for index in range(max(count - len(colours), 0)):
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618 % 1, 0.6 + 0.4 * (index % 2), 0.95)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours[:count]


class MedicalDataset(Dataset):
    """Base of the data sets.

    Args:
        root: Data folder.
        classes: Names, background first, or a key of `CLASS_SETS`.

    Attributes:
        metainfo: dict with ``classes`` and ``palette``.

    Raises:
        MedicalDataError: No such folder.
        ValueError: Fewer than two classes, or an unknown key.
    """

    def __init__(self, root: str | os.PathLike, classes: str | Sequence[str]) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise MedicalDataError(missing(self.root, "data folder"))
        if isinstance(classes, str):
            if classes not in CLASS_SETS:
                raise ValueError(f"unknown classes {classes!r}.{suggest(classes, CLASS_SETS)}")
            classes = CLASS_SETS[classes]
        self.classes = tuple(classes)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are at least two different names, background first, got {self.classes!r}")
        self.metainfo: dict[str, Any] = dict(classes=self.classes, palette=class_palette(len(self.classes)))

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    def cases(self) -> list[str]:
        """Name of every item."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.cases())

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range for {len(self)} items")
        return position % len(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}, {len(self)} items, {self.num_classes} classes)"


class SampleDataset(MedicalDataset):
    """Images with masks, augmented.

    Args:
        root: Data folder.
        classes: See `MedicalDataset`.
        transform: Keywords of `medical_transform`; None: pictures in their own size.
    """

    def __init__(
        self, root: str | os.PathLike, classes: str | Sequence[str], transform: dict[str, Any] | None,
    ) -> None:
        super().__init__(root, classes)
        self.transform = None if transform is None else medical_transform(**transform)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, H, W) float32 and mask (H, W), int64 or (binary) float32 in [0, 1], before augmentation."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`: dict(image=float32 (C, H, W), mask=int64 or float32 (H, W), case=str, index=int).

        If `index` is a `Draw`, the augmentation is seeded from its coordinates and the global generators stay as they
        are.

        Raises:
            IndexError: Out of range.
            MedicalDataError, UnreadableImageError: A file that cannot be used, which is named.
        """
        position = self._position(index)
        image, mask = self.load(position)
        coordinates = getattr(index, "coordinates", None)
        if self.transform is not None:
            if coordinates is None:
                image, mask = self.transform(image, mask)
            else:
                with seeded(*coordinates):
                    image, mask = self.transform(image, mask)
        return dict(
            image=torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)),
            mask=torch.from_numpy(np.ascontiguousarray(mask)),
            case=self.cases()[position],
            index=position,
        )


class VolumeDataset(MedicalDataset):
    """Whole volumes."""

    def volume(self, index: int) -> Volume:
        """Volume `index` with its label map."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Volume]:
        """Item `index`: dict(volume=`Volume`).

        Raises:
            IndexError: Out of range.
            MedicalDataError, UnreadableImageError: A file that cannot be used, which is named.
        """
        return dict(volume=self.volume(self._position(index)))


def as_spacing(spacing: Sequence[float] | None, stored: np.ndarray | None = None) -> Size3:
    """Millimetres along D, H, W: those asked for, else those of the file, else 1.

    Raises:
        ValueError: Not three positive numbers.
    """
    if spacing is None:
        spacing = (1.0, 1.0, 1.0) if stored is None else stored.tolist()
    values = tuple(float(side) for side in spacing)
    if len(values) != 3 or not all(np.isfinite(values)) or min(values) <= 0:
        raise ValueError(f"spacing is three positive numbers of millimetres along D, H, W, got {values!r}")
    return values[0], values[1], values[2]

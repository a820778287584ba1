"""Pictures with masks as data sets: ISIC as VM-UNet lays it out, and folders of one's own.

ISIC's images are RGB, every picture stretched to 0..255 as VM-UNet's code (arXiv 2402.02491) does; those of
`MaskFolder` are in [0, 1].
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import functional as torchvision

from vision_ssm.data.medical_base import SampleDataset, VolumeDataset, as_spacing
from vision_ssm.data.medical_intensity import stretched
from vision_ssm.data.medical_pictures import check_pair, find_pairs, read_mask, read_picture, read_soft_mask
from vision_ssm.data.medical_splits import SPLIT_FILE, fixed_split
from vision_ssm.data.medical_volume import Volume
from vision_ssm.registry import DATASETS


@DATASETS.register_module()
class IsicImages(SampleDataset):
    """ISIC 2017 and 2018 as VM-UNet lays them out: ``SPLIT/images`` and ``SPLIT/masks``, paired by name.

    Masks are soft, float32 in [0, 1]: 8-bit grey divided by 255.

    Args:
        root: Folder with ``train`` and ``val``.
        split: One of them.
        classes, transform: See `SampleDataset`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, classes: str | Sequence[str] = "isic",
        transform: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(root, classes, transform)
        if self.num_classes != 2:
            raise ValueError(f"ISIC's masks are binary: classes are background and one more, got {self.classes!r}")
        self.pairs = find_pairs(self.root / split / "images", self.root / split / "masks")
        self._cases = list(self.pairs)

    def cases(self) -> list[str]:
        return self._cases

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        paths = self.pairs[self._cases[index]]
        image, mask = read_picture(paths[0]), read_soft_mask(paths[1])
        check_pair(image, mask, paths)
        return stretched(image), mask


@DATASETS.register_module()
class IsicVolumes(VolumeDataset):
    """`IsicImages` for evaluation, as volumes of one slice.

    Args:
        root, split, classes: See `IsicImages`.
        size: Image and mask are resized bilinearly to this side or (height, width), and the mask is cut at 1/2, as
            VM-UNet evaluates; None: pictures in their own size.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "val", *, classes: str | Sequence[str] = "isic",
        size: int | Sequence[int] | None = 256,
    ) -> None:
        self._images = IsicImages(root, split, classes=classes)
        super().__init__(root, classes)
        self.size = [size, size] if isinstance(size, int) else None if size is None else list(size)

    def cases(self) -> list[str]:
        return self._images.cases()

    def volume(self, index: int) -> Volume:
        image, mask = self._images.load(index)
        if self.size is not None:
            image = torchvision.resize(torch.from_numpy(image), self.size).numpy()
            mask = torchvision.resize(torch.from_numpy(mask)[None], self.size)[0].numpy()
        return Volume(image[None], (mask >= 0.5).astype(np.int64)[None], (1.0, 1.0, 1.0), None, self.cases()[index])


@DATASETS.register_module()
class MaskFolder(SampleDataset):
    """A folder of images and a folder of masks, paired by name.

    Images: any format, 8-bit, or 16-bit grey with its full depth; values [0, 1]. Masks: labels 0 to K - 1, or with two
    classes 0 and 255; int64.

    Args:
        root: Folder with ``SPLIT/images`` and ``SPLIT/masks``, or with ``images`` and ``masks``, which are divided by a
            split file.
        split: Part: ``train``, ``val``, ``test``, or (divided by file) ``all``.
        classes: See `MedicalDataset`.
        channels: 3 (RGB) or 1 (grey).
        images, masks: Names of the folders.
        split_file: Default: ``ROOT/splits.json``; see `fixed_split`.
        fold, folds, val, test, seed, group: See `fixed_split`.
        transform: See `SampleDataset`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "train", *, classes: str | Sequence[str] = ("background", "object"),
        channels: int = 3, images: str = "images", masks: str = "masks", split_file: str | os.PathLike | None = None,
        fold: int = 0, folds: int | None = None, val: float = 0.2, test: float = 0.0, seed: int = 42,
        group: str | None = None, transform: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(root, classes, transform)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
        self.channels = channels
        if (self.root / split / images).is_dir():
            self.pairs = find_pairs(self.root / split / images, self.root / split / masks)
        else:
            pairs = find_pairs(self.root / images, self.root / masks)
            names = fixed_split(
                split_file or self.root / SPLIT_FILE, list(pairs), split, fold=fold, folds=folds, val=val, test=test,
                seed=seed, group=group,
            )  # fmt: skip
            self.pairs = {name: pairs[name] for name in names}
        self._cases = list(self.pairs)

    def cases(self) -> list[str]:
        return self._cases

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        paths = self.pairs[self._cases[index]]
        image, mask = read_picture(paths[0], self.channels), read_mask(paths[1], self.num_classes)
        check_pair(image, mask, paths)
        return image, mask


@DATASETS.register_module()
class MaskFolderVolumes(VolumeDataset):
    """`MaskFolder` for evaluation, as volumes of one slice in the size of the files.

    Args:
        root: See `MaskFolder`.
        split: See `MaskFolder`.
        spacing: Millimetres along D, H, W; default 1.
        options: Further keywords of `MaskFolder`.
    """

    def __init__(
        self, root: str | os.PathLike, split: str = "val", *, spacing: Sequence[float] | None = None, **options: Any,
    ) -> None:
        self._images = MaskFolder(root, split, **options)
        super().__init__(root, self._images.classes)
        self.spacing = as_spacing(spacing)

    def cases(self) -> list[str]:
        return self._images.cases()

    def volume(self, index: int) -> Volume:
        image, mask = self._images.load(index)
        return Volume(image[None], mask[None], self.spacing, None, self.cases()[index])

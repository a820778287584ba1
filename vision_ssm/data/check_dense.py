"""Checks of data for dense prediction, before hours of training: one import for the engine and the command line.

`check_segmentation` and `check_coco` return a `DenseReport`; `raise_for_problems` turns reports into one error.
`check_layout` checks a folder in one of the layouts on disk that the configs expect.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vision_ssm.data.check_coco import check_coco
from vision_ssm.data.check_segmentation import check_segmentation
from vision_ssm.data.dense_report import DenseDataError, DenseReport, missing, raise_for_problems
from vision_ssm.data.figures import KEYPOINTS
from vision_ssm.registry import suggest

__all__ = [
    "DenseDataError", "DenseReport", "LAYOUT_SPLITS", "check_coco", "check_layout", "check_segmentation",
    "raise_for_problems",
]  # fmt: skip

LAYOUT_SPLITS = {
    "ade20k": ("training", "validation"),
    "cityscapes": ("train", "val"),
    "coco": ("train2017", "val2017"),
    "coco-keypoints": ("train2017", "val2017"),
}
"""Layouts and the splits that they have."""


def _ade20k(root: Path, split: str, num_classes: int | None, full: bool, workers: int) -> DenseReport:
    return check_segmentation(
        root / "images" / split, root / "annotations" / split, num_classes=num_classes or 150, reduce_zero_label=True,
        label=split, full=full, workers=workers,
    )  # fmt: skip


def _cityscapes(root: Path, split: str, num_classes: int | None, full: bool, workers: int) -> DenseReport:
    return check_segmentation(
        root / "leftImg8bit" / split, root / "gtFine" / split, image_suffix="_leftImg8bit.png",
        map_suffix="_gtFine_labelTrainIds.png", num_classes=num_classes or 19, label=split, full=full, workers=workers,
    )  # fmt: skip


def _coco(root: Path, split: str, num_classes: int | None, full: bool, workers: int) -> DenseReport:
    ann_file = root / "annotations" / f"instances_{split}.json"
    return check_coco(ann_file, root / split, label=split, full=full, workers=workers)


def _coco_keypoints(root: Path, split: str, num_classes: int | None, full: bool, workers: int) -> DenseReport:
    ann_file = root / "annotations" / f"person_keypoints_{split}.json"
    return check_coco(ann_file, root / split, keypoints=len(KEYPOINTS), label=split, full=full, workers=workers)


_CHECKS: dict[str, Callable[[Path, str, int | None, bool, int], DenseReport]] = {
    "ade20k": _ade20k, "cityscapes": _cityscapes, "coco": _coco, "coco-keypoints": _coco_keypoints,
}  # fmt: skip


def check_layout(
    root: str | os.PathLike,
    layout: str,
    splits: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    full: bool = True,
    workers: int = 4,
) -> list[DenseReport]:
    """Check a data folder in a standard layout.

    Args:
        root: Data folder, what configs call ``data_root``.
        layout: A key of `LAYOUT_SPLITS`.
        splits: Default: all of the layout.
        num_classes: Of the label maps; default: 150 for ``ade20k``, 19 for ``cityscapes``. COCO's files say it.
        full: Decode every file; else the quick check that training makes.
        workers: Threads.

    Returns:
        One report per split.

    Raises:
        DenseDataError: No such folder, layout or split.
    """
    root = Path(root).expanduser()
    if layout not in LAYOUT_SPLITS:
        raise DenseDataError(f"unknown layout {layout!r}.{suggest(layout, LAYOUT_SPLITS)}")
    if not root.is_dir():
        raise DenseDataError(missing(root, "data folder"))
    known = LAYOUT_SPLITS[layout]
    for split in splits or known:
        if split not in known:
            raise DenseDataError(f"layout {layout!r} has no split {split!r}.{suggest(split, known)}")
    return [_CHECKS[layout](root, split, num_classes, full, workers) for split in splits or known]

"""Pictures with masks, paired by name: dermoscopy, histology, ultrasound, X-ray and other two-dimensional images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vision_ssm.data.decode import UnreadableImageError, load_image, load_label_map, read_header
from vision_ssm.data.dense_report import files_below, is_image_name, listed, missing
from vision_ssm.data.medical_volume import MedicalDataError, labels_of

MASK_SUFFIXES = ("", "_segmentation", "_mask")
"""What a mask's name may add to its image's name (``_segmentation``: the ISIC archive)."""


def find_pairs(images: str | os.PathLike, masks: str | os.PathLike) -> dict[str, tuple[Path, Path]]:
    """Image and mask of every case, by the image's name without ending, sorted.

    A mask has its image's name, with one of `MASK_SUFFIXES` and any ending of an image; folders below are searched too.

    Raises:
        MedicalDataError: A folder that does not exist or holds no image, images without mask, masks without image, or
            two files of one name; the first are named.
    """
    pictures, labels = _by_stem(Path(images), "image folder"), _by_stem(Path(masks), "mask folder")
    suffix = max(MASK_SUFFIXES, key=lambda suffix: sum(stem + suffix in labels for stem in pictures))
    pairs = {stem: (path, labels[stem + suffix]) for stem, path in pictures.items() if stem + suffix in labels}
    alone = [path.name for stem, path in pictures.items() if stem not in pairs]
    taken = {mask for _, mask in pairs.values()}
    idle = [path.name for path in labels.values() if path not in taken]
    if alone or idle:
        facts = [f"{len(alone)} images in {str(images)!r} have no mask: {listed(alone)}"] if alone else []
        facts += [f"{len(idle)} masks in {str(masks)!r} have no image: {listed(idle)}"] if idle else []
        raise MedicalDataError("; ".join(facts) + ". A mask has the name of its image, with any ending.")
    return pairs


def _by_stem(folder: Path, kind: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise MedicalDataError(missing(folder, kind))
    names = [name for name in files_below(folder) if is_image_name(name)]
    if not names:
        raise MedicalDataError(f"{kind} {str(folder)!r} holds no image")
    found: dict[str, Path] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise MedicalDataError(f"{kind} {str(folder)!r} holds {found[stem].name!r} and {name!r}: which one counts?")
        found[stem] = folder / name
    return found


def read_picture(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
    """An image file as (C, H, W) float32 in [0, 1].

    16-bit grey keeps its 16 bits (65535 becomes 1); everything else is read as `load_image` does.

    Raises:
        UnreadableImageError: The file cannot be decoded.
    """
    _, mode, _ = read_header(path)
    if mode.startswith("I"):
        values = load_label_map(path)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError(
                f"image {os.fspath(path)!r} holds whole numbers from {values.min()} to {values.max()}, which do not fit"
                " 16 bits; convert it to 8 or 16 bit"
            )
        grey = values.astype(np.float32) / np.float32(65535)
        return np.repeat(grey[None], channels, axis=0)  # (H, W) -> (C, H, W)
    picture = np.asarray(load_image(path, channels), dtype=np.float32) / np.float32(255)
    return np.ascontiguousarray(np.atleast_3d(picture).transpose(2, 0, 1))  # (H, W[, C]) -> (C, H, W)


def read_mask(path: str | os.PathLike, num_classes: int = 2) -> np.ndarray:
    """A mask file as labels (H, W) int64.

    Values 0 to `num_classes` - 1 are labels; palettes count by index. With two classes 0 and 255 (or 65535) are the
    labels 0 and 1, and of a JPEG, whose edges are blurred, values from 128 on are 1.

    Raises:
        UnreadableImageError: The file cannot be decoded.
        MedicalDataError: Colours, or values that are no labels.
    """
    values, kind = _grey_values(path)
    name = os.fspath(path)
    if kind == "JPEG":
        if num_classes != 2:
            raise MedicalDataError(
                f"mask {name!r} is a JPEG, whose compression changes labels; save the masks of {num_classes}"
                " classes as PNG"
            )
        return (values >= 128).astype(np.int64)
    if num_classes == 2 and values.max() > 1:
        present = np.unique(values).tolist()
        if present[-1] in (255, 65535) and set(present) <= {0, present[-1]}:
            return (values > 0).astype(np.int64)
        raise MedicalDataError(
            f"mask {name!r} holds the values {listed([str(value) for value in present])}; a mask of two classes holds 0"
            " and 1, or 0 and 255. Threshold it, or name more classes."
        )
    return labels_of(values, name, num_classes)


def read_soft_mask(path: str | os.PathLike) -> np.ndarray:
    """A binary mask file as (H, W) float32 in [0, 1]: 8-bit grey divided by 255, or 0 and 1 as they are."""
    values, _ = _grey_values(path)
    top = 1 if values.max() <= 1 else 255 if values.max() <= 255 else 65535
    return (values / top).astype(np.float32)


def _grey_values(path: str | os.PathLike) -> tuple[np.ndarray, str]:
    """Values of a mask file, (H, W) int64, and its format; three equal channels are one."""
    _, mode, kind = read_header(path)
    if mode in ("RGB", "RGBA", "LA"):
        try:
            with open(path, "rb") as file, Image.open(file) as image:
                colours = np.asarray(image)[..., : 3 if mode.startswith("RGB") else 1]
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise UnreadableImageError(f"cannot read image {os.fspath(path)!r}: {error}") from error
        if kind != "JPEG" and (colours != colours[..., :1]).any():
            raise MedicalDataError(
                f"mask {os.fspath(path)!r} is in colour; one label a pixel is expected: convert its colours to labels"
                " and save it as 8-bit grey or palette"
            )
        return colours[..., 0].astype(np.int64), kind
    return load_label_map(path), kind


def check_pair(image: np.ndarray, mask: np.ndarray, paths: Sequence[Path]) -> None:
    """Raise `MedicalDataError` unless an image (C, H, W) and its mask (H, W) have the same size."""
    if image.shape[1:] != mask.shape:
        sizes = [" x ".join(map(str, shape)) for shape in (image.shape[1:], mask.shape)]
        raise MedicalDataError(
            f"image {str(paths[0])!r} is {sizes[0]} pixels, its mask {str(paths[1])!r} {sizes[1]} (height x width)"
        )

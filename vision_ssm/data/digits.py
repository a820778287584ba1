"""The handwritten digits that scikit-learn ships, as an image folder."""

import contextlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vision_ssm.data.decode import UnreadableImageError, load_image
from vision_ssm.data.progress import progress_bar
from vision_ssm.data.writing import PrepareError, replacing

DIGITS_SEED = 0
DIGITS_VAL_FRACTION = 0.2
DIGITS_SIZE = 32

_DIGITS_README = """\
Optical recognition of handwritten digits

1,797 scans of handwritten digits, 8 x 8 pixels, 17 grey levels (0 to 16), one class per digit. This is the test part of
the UCI data set as shipped with scikit-learn (sklearn.datasets.load_digits).

Origin:   E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
          https://doi.org/10.24432/C50P49
Licence:  Creative Commons Attribution 4.0 International (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/
Changes:  grey levels scaled from 0..16 to 0..255 (rounded){resized}; stored as 8-bit grey PNG.

Layout:   train/DIGIT/NNNN.png and val/DIGIT/NNNN.png, NNNN being the row in load_digits().
Split:    {train} training and {val} validation images, stratified: {percent:.0f} % of each digit (rounded) go to val,
          chosen by numpy.random.RandomState({seed}). split.txt lists every file. The split is random over images,
          so the same writers occur in both parts: the accuracy says nothing about unseen writers.
Made by:  python tools/prepare_data.py digits OUT --size {size}
"""


def digits_split(labels: np.ndarray, seed: int = DIGITS_SEED) -> np.ndarray:
    """The fixed stratified split of the digits.

    Args:
        labels: (N,) integers.
        seed: Of `numpy.random.RandomState`, whose stream never changes between numpy versions.

    Returns:
        (N,) bool, True for validation: 20 % of each class, rounded.
    """
    generator = np.random.RandomState(seed)
    validation = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        validation[generator.permutation(rows)[: round(DIGITS_VAL_FRACTION * len(rows))]] = True
    return validation


def digit_image(pixels: np.ndarray, size: int = DIGITS_SIZE) -> Image.Image:
    """One scan as an 8-bit grey image.

    Args:
        pixels: (8, 8), values 0 to 16.
        size: Side of the result in pixels; anything but 8 is a bicubic enlargement.
    """
    image = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _digit_files(size: int) -> tuple[dict[str, Image.Image], str, str]:
    """All images by relative path, the text of split.txt and that of README.txt."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PrepareError(
            f"the digits come with scikit-learn, which does not import ({error}): pip install scikit-learn"
        ) from error
    digits = load_digits()
    validation = digits_split(digits.target)
    files: dict[str, Image.Image] = {}
    for row, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        files[f"{'val' if validation[row] else 'train'}/{label}/{row:04d}.png"] = digit_image(pixels, size)
    split = "".join(f"{path}\n" for path in sorted(files))
    readme = _DIGITS_README.format(
        resized="" if size == 8 else f" and enlarged to {size} x {size} (bicubic)",
        train=int((~validation).sum()),
        val=int(validation.sum()),
        percent=100 * DIGITS_VAL_FRACTION,
        seed=DIGITS_SEED,
        size=size,
    )
    return files, split, readme


def _same_digits(out: Path, files: dict[str, Image.Image], split: str) -> bool:
    """Whether `out` already holds exactly these images."""
    try:
        if (out / "split.txt").read_text() != split:
            return False
        if sorted(path.relative_to(out).as_posix() for path in out.glob("*/*/*")) != sorted(files):
            return False
        return all(
            np.array_equal(np.asarray(load_image(out / path, channels=1)), np.asarray(image))
            for path, image in files.items()
        )
    except (OSError, UnreadableImageError):
        return False


def _is_digits_folder(out: Path) -> bool:
    """Whether `out` was written by `write_digits`, so that replacing it destroys nothing else."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (out / "README.txt").read_text().startswith(_DIGITS_README.split("\n", 1)[0]):
            return {path.name for path in out.iterdir()} <= {"README.txt", "split.txt", "train", "val"}
    return False


def write_digits(out: str | os.PathLike, size: int = DIGITS_SIZE, overwrite: bool = False) -> bool:
    """Write scikit-learn's handwritten digits as PNG files in ImageNet layout.

    OUT/train/0 ... OUT/val/9, split.txt and README.txt appear at once, when everything has been written.

    Args:
        out: Folder to create. If it already holds the same images nothing is done.
        size: Side of the images in pixels.
        overwrite: Replace digits of another size or an incomplete set. Other folders are never replaced.

    Returns:
        True if the images were written, False if they were there already.

    Raises:
        PrepareError: `out` holds something else, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    if size < 8:
        raise PrepareError(f"--size must be at least 8, the size of the scans, got {size}")
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{str(out)!r} is a file; the digits need a folder of their own")
    files, split, readme = _digit_files(size)
    if out.is_dir() and any(out.iterdir()):
        if _same_digits(out, files, split):
            return False
        if not _is_digits_folder(out):
            raise PrepareError(
                f"{str(out)!r} is not empty and holds something other than these digits. Choose another folder;"
                " this one is left as it is, even with --overwrite."
            )
        if not overwrite:
            raise PrepareError(
                f"{str(out)!r} holds digits of another size, or an incomplete set. Pass --overwrite to replace them."
            )
    with replacing(out) as folder, progress_bar() as progress:
        for path, image in progress.track(files.items(), description="writing digits"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / path)
        (folder / "split.txt").write_text(split)
        (folder / "README.txt").write_text(readme)
    return True

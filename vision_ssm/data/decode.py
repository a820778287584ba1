"""Any image file to an 8-bit grey or RGB picture, by stated rules."""

import os
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name endings taken for images, compared in lower case."""

# What Pillow's readers raise on files that are cut off, damaged or no image at all.
_DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
    struct.error, zlib.error, Image.DecompressionBombError,
)
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class UnreadableImageError(RuntimeError):
    """A file that cannot be decoded; the message holds its path and the reason."""


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"integer pixels from {values.min()} to {values.max()} do not fit 16 bits; convert the file to 8 or 16 bit"
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODING_ERRORS:
        return image  # damaged metadata: the pixels themselves are fine


def to_eight_bit(image: Image.Image, channels: int = 3) -> Image.Image:
    """Convert a decoded image of any Pillow mode to 8-bit ``RGB`` (`channels` 3) or ``L`` (`channels` 1).

    - Transparency (alpha channel, transparent palette entry or colour) is composited on white.
    - 16-bit grey is scaled, 65535 becomes 255. 16-bit colour keeps its high byte (this is how Pillow reads it).
    - CMYK and YCbCr are converted by Pillow's formulas, without a colour profile.
    - Colour to grey is ITU-R 601 luma.

    Raises:
        ValueError: Floating-point pixels or integers beyond 16 bits, whose range nobody can know.
    """
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels have no agreed range; convert the file to 8 or 16 bit")
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _eight_bit(image)
    elif image.has_transparency_data or image.mode in ("La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB" if channels == 3 else "L")


def load_image(path: str | os.PathLike, channels: int = 3) -> Image.Image:
    """Read an image file as 8-bit ``RGB`` or ``L``, turned upright by its EXIF orientation.

    Of an animation or a multi-page file the first frame is taken. See `to_eight_bit` for the conversions.

    Raises:
        UnreadableImageError: The file is missing, cut off, damaged, no image, or its pixels have no 8-bit form.
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            image.load()
            return to_eight_bit(_upright(image), channels)
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(f"cannot read image {os.fspath(path)!r}: {error or type(error).__name__}") from error


def read_header(path: str | os.PathLike, upright: bool = False) -> tuple[tuple[int, int], str, str]:
    """((height, width) as stored, Pillow mode, format) of an image file, without decoding its pixels.

    With `upright`, height and width are those after turning by the EXIF orientation, as `load_image` does.

    Raises:
        UnreadableImageError: The file is missing or no image.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            size = image.height, image.width
            if upright and "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                size = size[::-1]
            return size, image.mode, image.format or "?"
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(f"cannot read image {os.fspath(path)!r}: {error or type(error).__name__}") from error


def load_label_map(path: str | os.PathLike) -> np.ndarray:
    """The numbers stored in an image file with one channel, (H, W) int64: grey levels, or indices of a palette.

    Raises:
        UnreadableImageError: The file is missing, cut off, damaged, no image, or has more than one channel.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            values = np.asarray(image)
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(f"cannot read image {os.fspath(path)!r}: {error or type(error).__name__}") from error
    if values.ndim != 2 or values.dtype.kind == "f":
        raise UnreadableImageError(f"image {os.fspath(path)!r} (mode {image.mode}) is not one whole number a pixel")
    return values.astype(np.int64)

"""Intensities of medical images: which unit they are in, and how they become network input."""

import numpy as np

from vision_ssm.data.medical_volume import MedicalDataError, Volume

ABDOMEN_WINDOW = (-125.0, 275.0)
"""Hounsfield units that TransUNet's preprocessing of Synapse clips to."""
PERCENTILES = (0.5, 99.5)
"""Of the intensities of one volume, which become 0 and 1 where there is no window."""
Window = tuple[float, float]


def check_finite(values: np.ndarray, path: str) -> None:
    """Raise `MedicalDataError` if an image holds values that are not finite."""
    wrong = values.size - int(np.isfinite(values).sum())
    if wrong:
        raise MedicalDataError(
            f"image {path!r} holds {wrong} of {values.size} values that are not finite; replace them (often by the"
            " value of air) before training"
        )


def check_range(values: np.ndarray, path: str, low: float, high: float) -> None:
    """Raise `MedicalDataError` if intensities that must be scaled to [low, high] are not."""
    least, most = float(values.min()), float(values.max())
    slack = 1e-3 * (high - low)
    if least < low - slack or most > high + slack:
        raise MedicalDataError(
            f"image {path!r} has intensities from {least:g} to {most:g}; this set is scaled to [{low:g}, {high:g}] (a"
            " CT clipped to [-125, 275] HU and scaled). Convert it (python tools/prepare_data.py nifti), or give"
            " value_range=None if that is what it should be."
        )


def check_hounsfield(values: np.ndarray, path: str) -> None:
    """Raise `MedicalDataError` if intensities that must be Hounsfield units look like another unit.

    In Hounsfield units air is -1000 and fat -100, so a picture of a body holds values well below zero and above it.
    """
    least, most = float(values.min()), float(values.max())
    if -2 <= least and most <= 2:
        found = "it looks scaled already. Give window=None, or the values in Hounsfield units"
    elif least >= 0 and most > 255:
        found = "it looks unsigned (HU + 1024?) or like another modality. Give rescale=(1, -1024), or window=None"
    elif least >= 0:
        found = "it looks like 8-bit grey levels or another modality. Give window=None, or Hounsfield units"
    else:
        return
    raise MedicalDataError(
        f"image {path!r} has intensities from {least:g} to {most:g}, but a window in Hounsfield units (air -1000, water"
        f" 0) is to be applied: {found}."
    )


def check_window(window: Window | None) -> None:
    """Raise `ValueError` unless `window` is None or a pair (low, high) with low < high."""
    if window is not None and (len(window) != 2 or not window[0] < window[1]):
        raise ValueError(f"window must be (low, high) with low < high, or None for percentiles, got {window!r}")


def scale_intensities(volume: Volume, window: Window | None, path: str, check_units: bool = True) -> Volume:
    """The volume with float32 intensities in [0, 1].

    Args:
        volume: Volume of a file.
        window: (low, high) that become 0 and 1, values beyond are clipped; with low < 0 it is taken for Hounsfield
            units. None (MR and other images without a unit): `PERCENTILES` of each channel of this volume.
        path: File, for messages.
        check_units: Refuse intensities that are no Hounsfield units (see `check_hounsfield`).

    Raises:
        MedicalDataError: Another unit than the window's, or an image of one value only (without a window).
    """
    image = volume.image
    if window is None:
        low, high = np.percentile(image, PERCENTILES, axis=(0, 2, 3), keepdims=True)  # (1, C, 1, 1) each
        if (low >= high).any():
            raise MedicalDataError(f"image {path!r} holds one value almost everywhere, {low.ravel()[0]:g}: it is empty")
    else:
        low, high = window
        if check_units and low < 0:
            check_hounsfield(image, path)
    scaled = (np.clip(image, low, high) - low) / (high - low)
    return Volume(
        scaled.astype(np.float32), volume.mask, volume.spacing, volume.affine, volume.case, volume.grid
    )


def stretched(image: np.ndarray) -> np.ndarray:
    """An image (C, H, W) whose least value becomes 0 and whose greatest 255; of one value only, all becomes 0."""
    low, high = image.min(), image.max()
    return (image - low) * np.float32(255 / (high - low) if high > low else 0)

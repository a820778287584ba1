"""A folder with one DICOM series as a volume.

Slices are ordered by their position in the patient (DICOM PS3.3 C.7.6.2.1.1), never by file name or instance number.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.dense_report import listed
from vision_ssm.data.medical_intensity import check_finite
from vision_ssm.data.medical_volume import Grid, MedicalDataError, check_affine, optional

_NEEDED = ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns")
_UNEVEN = 0.05  # of the distance between slices


def read_dicom(folder: str | os.PathLike) -> tuple[np.ndarray, Grid]:
    """Voxels of a DICOM series, (X, Y, Z) float32 with the modality's slope and intercept (CT: Hounsfield units).

    X runs along rows, Y along columns, Z along the slices in the direction of the normal.

    Args:
        folder: Folder with the slices of one series, one file each. Files that are not DICOM are passed over unless
            their name ends in ``.dcm``.

    Raises:
        MedicalDataError: No slice, more than one series, tags that are missing, slices of different shape or
            orientation, the same place twice, a slice that is missing, colour, multi-frame files, or pixels that cannot
            be decoded.
    """
    folder = Path(folder)
    slices = _headers(folder)
    first_path, first = slices[0]
    for path, data in slices:
        _check_slice(path, data)
        for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            here, there = (np.asarray(getattr(header, tag), dtype=float) for header in (data, first))
            if not np.allclose(here, there, atol=1e-3):
                raise MedicalDataError(
                    f"slices of {str(folder)!r} differ in {tag}: {there.tolist()} in {first_path.name!r},"
                    f" {here.tolist()} in {path.name!r}. Keep one kind of slice in the folder."
                )
    along_row, along_column = np.asarray(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    positions = np.array([header.ImagePositionPatient for _, header in slices], dtype=np.float64)  # (D, 3)
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[index] for index in order], positions[order]
    row_spacing, column_spacing = (float(value) for value in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = _step(folder, slices, positions, normal)
    affine[:3, 3] = positions[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts towards left and posterior
    check_affine(affine, str(folder))
    voxels = np.stack([_pixels(path, header) for path, header in slices], axis=-1)  # (Y, X) each -> (Y, X, Z)
    check_finite(voxels, str(folder))
    return voxels.swapaxes(0, 1), Grid((voxels.shape[1], voxels.shape[0], voxels.shape[2]), affine)


def _headers(folder: Path) -> list[tuple[Path, Any]]:
    pydicom = optional("pydicom")
    slices = []
    series: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or path.name == "DICOMDIR":
            continue
        try:
            header = pydicom.dcmread(path)
        except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError) as error:
            if path.suffix.lower() == ".dcm" or not isinstance(error, pydicom.errors.InvalidDicomError):
                raise MedicalDataError(f"cannot read DICOM file {str(path)!r}: {error}") from error
            continue
        slices.append((path, header))
        series.setdefault(str(header.get("SeriesInstanceUID", "without a UID")), []).append(path.name)
    if not slices:
        raise MedicalDataError(f"folder {str(folder)!r} holds no DICOM slice")
    if len(series) > 1:
        names = [f"{uid} ({len(files)} files, such as {files[0]!r})" for uid, files in series.items()]
        raise MedicalDataError(
            f"folder {str(folder)!r} holds {len(series)} series: {listed(names)}. Give each a folder of its own."
        )
    return slices


def _check_slice(path: Path, header: Any) -> None:
    if int(header.get("NumberOfFrames", 1) or 1) > 1:
        raise MedicalDataError(f"{str(path)!r} is a multi-frame DICOM file; convert it to NIfTI (dcm2niix) first")
    absent = [tag for tag in _NEEDED if header.get(tag) in (None, "")]
    if absent:
        raise MedicalDataError(
            f"{str(path)!r} lacks {', '.join(absent)}: without them nobody knows where its pixels lie. Is it a report,"
            " a localiser or a secondary capture?"
        )
    if int(header.get("SamplesPerPixel", 1)) != 1 or header.get("PhotometricInterpretation") != "MONOCHROME2":
        raise MedicalDataError(
            f"{str(path)!r} is stored as {header.get('PhotometricInterpretation')}; grey slices"
            " (MONOCHROME2) are expected"
        )


def _step(folder: Path, slices: list[tuple[Path, Any]], positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(3,) millimetres from a slice to the next."""
    if len(slices) == 1:
        header = slices[0][1]
        thickness = header.get("SpacingBetweenSlices") or header.get("SliceThickness")
        if thickness is None:
            warnings.warn(f"the only slice of {str(folder)!r} does not say its thickness; 1 mm is taken", stacklevel=4)
        return normal * float(1.0 if thickness is None else thickness)
    gaps = np.diff(positions @ normal)
    typical = float(np.median(gaps))
    for index in np.flatnonzero(gaps <= 1e-3).tolist():
        names = [repr(slices[i][0].name) for i in (index, index + 1)]
        raise MedicalDataError(
            f"slices {' and '.join(names)} of {str(folder)!r} lie at the same place; is the series complete twice, or"
            " of several time points?"
        )
    for index in np.flatnonzero(np.abs(gaps - typical) > max(_UNEVEN * typical, 0.01)).tolist():
        names = [repr(slices[i][0].name) for i in (index, index + 1)]
        raise MedicalDataError(
            f"slices {' and '.join(names)} of {str(folder)!r} are {gaps[index]:g} mm apart, the others {typical:g} mm:"
            " a slice is missing, or the series is unevenly spaced. Complete or resample it."
        )
    return (positions[-1] - positions[0]) / (len(slices) - 1)


def _pixels(path: Path, header: Any) -> np.ndarray:
    """(Y, X) float32 intensities of a slice."""
    pixels = optional("pydicom.pixels")
    try:
        values = pixels.apply_modality_lut(header.pixel_array, header)
    # pydicom names what it lacks (a decoder, a tag, bytes) by many classes of exception
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError, OSError) as error:
        raise MedicalDataError(f"cannot decode the pixels of {str(path)!r}: {error}") from error
    return np.asarray(values, dtype=np.float32)

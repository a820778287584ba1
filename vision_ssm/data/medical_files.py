"""Reading and writing medical files: NIfTI, DICOM series, and arrays in npz and HDF5.

Nothing is unpickled. NIfTI goes through nibabel, DICOM through pydicom (`medical_dicom`), HDF5 through h5py. MONAI's
readers are not used: they warn about, or pass over, headers that would make a result wrong (slices missing from a
series, a fourth dimension, a spacing of zero), and those are errors here.
"""

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vision_ssm.data.dense_report import listed
from vision_ssm.data.medical_intensity import check_finite
from vision_ssm.data.medical_volume import (
    ORIENTATION,
    Grid,
    MedicalDataError,
    Volume,
    check_affine,
    check_orientation,
    check_same_grid,
    labels_of,
    optional,
)

NIFTI_ENDINGS = (".nii.gz", ".nii")
PathLike = str | os.PathLike
# what NumPy and h5py raise on files that are cut off, damaged or of another kind
_DAMAGED = (
    OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


def stem_of(name: str) -> str:
    """A file name without its ending; ``.nii.gz`` and ``.npy.h5`` are endings too."""
    for ending in (*NIFTI_ENDINGS, ".npy.h5"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return os.path.splitext(name)[0]


def read_arrays(path: PathLike, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` or HDF5 file (``.h5``, ``.hdf5``) by key.

    Args:
        path: File.
        keys: Arrays that must be there. ``spacing`` is read as well where the file has it (HDF5: as an attribute).

    Raises:
        MedicalDataError: No such file, an unreadable file, pickled objects, or a key that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise MedicalDataError(f"there is no file {str(path)!r}")
    try:
        if path.suffix.lower() in (".h5", ".hdf5"):
            with optional("h5py").File(path, "r") as file:
                found = {key: np.asarray(file[key]) for key in keys if key in file}
                present = list(file)
                if "spacing" in file.attrs:
                    found["spacing"] = np.asarray(file.attrs["spacing"])
        else:
            with np.load(path, allow_pickle=False) as file:
                present = list(file)
                found = {key: file[key] for key in (*keys, "spacing") if key in present}
    except _DAMAGED as error:
        raise MedicalDataError(
            f"cannot read {str(path)!r}: {error or type(error).__name__}. The file is damaged or of another kind"
            " (pickled objects are never loaded); make it again."
        ) from error
    missing = [key for key in keys if key not in found]
    if missing:
        raise MedicalDataError(
            f"{str(path)!r} has no array {' and no '.join(map(repr, missing))}; it holds"
            f" {listed(present) or 'nothing'}. Expected: {', '.join(keys)}."
        )
    return found


@contextmanager
def _nibabel_errors(path: Path) -> Iterator[ModuleType]:
    nibabel = optional("nibabel")
    damaged = (
        OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
    )
    try:
        yield nibabel
    except MedicalDataError:
        raise
    except damaged as error:
        raise MedicalDataError(f"cannot read NIfTI file {str(path)!r}: {error or type(error).__name__}") from error


def read_nifti(path: PathLike, as_labels: bool = False) -> tuple[np.ndarray, Grid]:
    """Voxels of a NIfTI file in the file's order, (X, Y, Z), and their grid.

    Two-dimensional files get a third axis of one voxel, and trailing axes of one voxel are dropped. Spacings in metres
    or micrometres are turned into millimetres.

    Args:
        path: ``.nii`` or ``.nii.gz`` file.
        as_labels: Values as stored; else float32 with the header's slope and intercept.

    Raises:
        MedicalDataError: Unreadable, more than three dimensions, an affine that cannot be used (see `check_affine`),
            or (images) values that are not finite.
    """
    path = Path(path)
    name = str(path)
    with _nibabel_errors(path) as nibabel:
        image = nibabel.load(path)
        shape = image.shape
        _check_zooms(nibabel, image, name)
        if len(shape) > 3 and any(side != 1 for side in shape[3:]):
            raise MedicalDataError(
                f"{name!r} has {len(shape)} dimensions, {' x '.join(map(str, shape))}; one volume has three. Split time"
                " points or channels into files of their own (CASE_0000.nii.gz, CASE_0001.nii.gz, ...)."
            )
        if image.get_data_dtype().kind not in "buif":
            raise MedicalDataError(f"{name!r} holds values of type {image.get_data_dtype()}, not plain numbers")
        if len(shape) < 2 or 0 in shape:
            raise MedicalDataError(f"{name!r} has the shape {shape}, which is no image")
        values = np.asanyarray(image.dataobj) if as_labels else image.get_fdata(dtype=np.float32)
        affine = _affine(image, name)
    voxels = values.reshape(*shape[:2], shape[2] if len(shape) > 2 else 1)  # (X, Y[, Z[, 1 ...]]) -> (X, Y, Z)
    check_affine(affine, name)
    if not as_labels:
        check_finite(voxels, name)
    x, y, z = voxels.shape
    return voxels, Grid((x, y, z), affine)


def _check_zooms(nibabel: ModuleType, image: Any, name: str) -> None:
    """Refuse a spacing of zero along an axis of several voxels, which nibabel would replace by 1 mm."""
    with nibabel.openers.ImageOpener(image.get_filename()) as file:
        raw = image.header_class.from_fileobj(file, check=False)
    zooms = raw["pixdim"][1:4].tolist()
    if any(side > 1 and not zoom > 0 for side, zoom in zip(image.shape, zooms)):
        raise MedicalDataError(
            f"{name!r} has a voxel spacing of {' x '.join(f'{zoom:g}' for zoom in zooms)} mm in its header; every"
            " spacing must be positive. Repair the header (pixdim) with the spacing of the scanner."
        )


def _affine(image: Any, name: str) -> np.ndarray:
    """(4, 4) of a NIfTI image in millimetres; what a reader should know about it is warned of."""
    affine = np.asarray(image.affine, dtype=np.float64)
    header = image.header
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        warnings.warn(
            f"{name!r} does not say its orientation (sform and qform codes are 0). Its axes are taken as left,"
            " anterior, superior, NIfTI's fallback; give orientation=None to use slices as they are stored.",
            stacklevel=4,
        )
    elif sform and qform and not np.allclose(image.get_sform(), image.get_qform(), atol=1e-2, rtol=1e-3):
        warnings.warn(f"sform and qform of {name!r} differ; the sform is used, as nibabel does", stacklevel=4)
    scale = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine


def read_volume(
    images: PathLike | Sequence[PathLike],
    mask: PathLike | None = None,
    *,
    case: str | None = None,
    orientation: str | None = ORIENTATION,
    num_classes: int | None = None,
    rescale: tuple[float, float] | None = None,
) -> Volume:
    """Read a volume, with its label map, as `Volume`.

    Args:
        images: NIfTI file or folder with one DICOM series; several: one for each channel, on one grid.
        mask: NIfTI label map on the grid of the images, in any orientation.
        case: Default: the name of the first file without ending and without a channel number such as ``_0000``.
        orientation: Sides of the patient that the axes W, H, D run towards: "LPS" axial, "LIA" coronal, "PIL" sagittal
            slices; None: as stored, slices along the last axis.
        num_classes: Labels must be below it.
        rescale: Slope and intercept for the intensities, such as (1, -1024) for an unsigned CT.

    Raises:
        MedicalDataError: See `read_nifti`, `read_dicom`, `check_same_grid`, `labels_of`.
        ValueError: Unknown orientation.
    """
    check_orientation(orientation)
    paths = [Path(images)] if isinstance(images, (str, os.PathLike)) else [Path(path) for path in images]
    channels: list[np.ndarray] = []
    stored: Grid | None = None
    turned: Grid | None = None
    for path in paths:
        voxels, grid = _read_image(path)
        array, new = _turn(voxels, grid, orientation)
        if turned is None:
            stored, turned = grid, new
        else:
            check_same_grid(turned, new, str(paths[0]), str(path))
        channels.append(array.astype(np.float32, copy=False))
    if turned is None:
        raise ValueError("no image is given")
    image = np.stack(channels, axis=1)  # (D, H, W) each -> (D, C, H, W)
    if rescale is not None:
        image = image * np.float32(rescale[0]) + np.float32(rescale[1])
    labels = None
    if mask is not None:
        values, grid = read_nifti(mask, as_labels=True)
        array, new = _turn(values, grid, orientation)
        check_same_grid(turned, new, str(paths[0]), str(mask))
        labels = labels_of(array, str(mask), num_classes)
    x, y, z = turned.spacing
    name = case or _case_name(paths[0])
    return Volume(np.ascontiguousarray(image), labels, (z, y, x), turned.affine, name, stored)


def _read_image(path: Path) -> tuple[np.ndarray, Grid]:
    if path.is_dir():
        from vision_ssm.data.medical_dicom import read_dicom

        return read_dicom(path)
    if not path.is_file():
        raise MedicalDataError(f"there is no image {str(path)!r}")
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise MedicalDataError(
            f"{str(path)!r} is neither a NIfTI file ({', '.join(NIFTI_ENDINGS)}) nor a folder with a DICOM series"
        )
    return read_nifti(path)


def _case_name(path: Path) -> str:
    stem = path.name if path.is_dir() else stem_of(path.name)
    return stem[:-5] if len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit() else stem


def _turn(voxels: np.ndarray, grid: Grid, orientation: str | None) -> tuple[np.ndarray, Grid]:
    """Voxels (X, Y, Z) as a view (D, H, W) whose axes run as asked, and the grid of (W, H, D)."""
    turned, transform = grid.turned(orientation)
    array = optional("nibabel.orientations").apply_orientation(voxels, transform)
    return array.transpose(2, 1, 0), turned  # (W, H, D) -> (D, H, W)


def write_nifti(path: PathLike, values: np.ndarray, volume: Volume) -> None:
    """Write values (D, H, W) of a volume as NIfTI, on the voxels and with the affine of the file it was read from.

    The file appears complete or not at all.

    Args:
        path: ``.nii.gz`` or ``.nii``.
        values: Labels or any numbers; whole numbers become uint8, int16 or int32, whichever holds them first.
        volume: Says where the voxels lie.

    Raises:
        MedicalDataError: The file cannot be written.
        ValueError: Another shape than the volume, or a name that does not end in ``.nii`` or ``.nii.gz``.
    """
    path = Path(path)
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise ValueError(f"the name of a NIfTI file ends in {' or '.join(NIFTI_ENDINGS)}, got {str(path)!r}")
    nibabel = optional("nibabel")
    voxels, affine = volume.stored(values)
    if voxels.dtype.kind in "bui":
        low, high = int(voxels.min()), int(voxels.max())
        kinds = (np.uint8, np.int16, np.int32)  # the types that every program reads
        fitting = [kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
        voxels = voxels.astype(fitting[0] if fitting else np.float32)
    else:
        voxels = voxels.astype(np.float32)
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):  # a qform cannot hold a sheared affine
        image.set_qform(None, code="unknown")
    ending = next(ending for ending in NIFTI_ENDINGS if path.name.lower().endswith(ending))
    temporary = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise MedicalDataError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()

"""Medical volumes in memory: axes, spacing and orientation, and what images and label maps must agree on.

Arrays are (D, C, H, W): slices first, as networks take them. A file's voxels are turned so that the array axes W, H, D
run towards stated sides of the patient, by default left, posterior, superior ("LPS"): axial slices as radiologists look
at them and as DICOM and SimpleITK order them. `Volume.affine` belongs to the turned array, `Volume.grid` remembers the
file's own voxels, and `Volume.stored` turns a result back.
"""

import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from vision_ssm.data.dense_report import DenseDataError, listed

ORIENTATION = "LPS"
"""Sides of the patient that the array axes W, H, D run towards unless another order is asked for."""
_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
_SHEAR = 0.5  # degrees off a right angle before a warning


class MedicalDataError(DenseDataError):
    """Medical data that cannot be used; the message names the file, what it holds and what is expected."""


def optional(name: str) -> ModuleType:
    """The module `name` of the extra ``medical``.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f"medical data need {package}: pip install 'vision_ssm[medical]' ({error})") from error


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxels of a file.

    Attributes:
        shape: Voxels along the file's axes x, y, z.
        affine: (4, 4) from voxel indices (x, y, z) to millimetres towards right, anterior, superior (NIfTI's RAS+).
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along x, y, z."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    def turned(self, orientation: str | None) -> tuple["Grid", np.ndarray]:
        """The same voxels with axes towards the sides `orientation`, and nibabel's transform that gets there."""
        orientations = optional("nibabel.orientations")
        start = orientations.io_orientation(self.affine)
        end = start if orientation is None else orientations.axcodes2ornt(tuple(orientation))
        transform = orientations.ornt_transform(start, end)
        order = np.argsort(transform[:, 0])
        x, y, z = (self.shape[axis] for axis in order.tolist())
        return Grid((x, y, z), self.affine @ orientations.inv_ornt_aff(transform, self.shape)), transform


def check_orientation(orientation: str | None) -> None:
    """Raise `ValueError` unless `orientation` is None or one letter for each axis, such as "LPS" or "RAS"."""
    if orientation is None:
        return
    letters = set(orientation) if isinstance(orientation, str) and len(orientation) == 3 else set()
    if len(letters | {_OPPOSITE.get(letter, "") for letter in letters}) != 6 or not letters <= set(_OPPOSITE):
        raise ValueError(
            f"orientation must name one side for each of the axes W, H, D, such as 'LPS' (axial) or 'RAS', or be None"
            f" (as stored), got {orientation!r}"
        )


def check_affine(affine: np.ndarray, path: str) -> None:
    """Look at the affine (4, 4) of a file before anything is computed with it.

    Axes that are not at right angles (a tilted gantry, a registration) are used as they are: slices stay slices, and
    distances count the spacing along each axis as if it were. A warning says so.

    Raises:
        MedicalDataError: Values that are not finite, a spacing of zero, or axes that lie in one plane.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise MedicalDataError(f"{path!r} has an affine that is not a finite 4 x 4 matrix: {affine.tolist()}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() <= 1e-6:
        raise MedicalDataError(
            f"{path!r} has a voxel spacing of {' x '.join(f'{side:g}' for side in spacing)} mm; every spacing must be"
            " positive. Repair the header (pixdim, sform, qform) with the spacing of the scanner."
        )
    axes = affine[:3, :3] / spacing
    if abs(np.linalg.det(axes)) < 1e-3:
        raise MedicalDataError(f"{path!r} has an affine whose axes lie in one plane: {affine[:3, :3].tolist()}")
    cosines = np.abs(axes.T @ axes - np.eye(3)).max()
    angle = math.degrees(math.asin(min(float(cosines), 1.0)))
    if angle > _SHEAR:
        warnings.warn(
            f"{path!r} has axes {angle:.1f} degrees off a right angle (sheared affine). Slices are used as they are,"
            " and distances in millimetres take the axes as perpendicular; resample the file if that matters.",
            stacklevel=3,
        )


@dataclass(eq=False)
class Volume:
    """An image of D slices, and its label map if there is one.

    Attributes:
        image: (D, C, H, W) float32.
        mask: (D, H, W) int64, 0 is background; None where nobody has drawn one.
        spacing: Millimetres between voxels along D, H and W.
        affine: (4, 4) from indices (w, h, d) to millimetres towards right, anterior, superior; None where unknown.
        case: Name of the case, in messages, tables and file names.
        grid: Voxels of the file that the volume was read from; None where it has no place in the world.
    """

    image: np.ndarray
    mask: np.ndarray | None
    spacing: tuple[float, float, float]
    affine: np.ndarray | None
    case: str
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 4:
            raise ValueError(f"the image of a volume is (D, C, H, W), got {self.image.shape} for {self.case!r}")
        slices, _, height, width = self.image.shape
        if self.mask is not None and self.mask.shape != (slices, height, width):
            raise MedicalDataError(
                f"case {self.case!r}: image and label map differ in shape: {(slices, height, width)} and"
                f" {self.mask.shape} (D, H, W)"
            )
        if len(self.spacing) != 3 or not all(math.isfinite(side) and side > 0 for side in self.spacing):
            raise MedicalDataError(
                f"case {self.case!r} has the spacing {tuple(self.spacing)} mm along D, H, W; three positive numbers are"
                " expected"
            )

    def stored(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (D, H, W) as an array (X, Y, Z) in the file's own order of voxels, and its affine (4, 4).

        Without a file's grid the array is (W, H, D) and the affine is that of the volume, or the spacing alone.

        Raises:
            ValueError: `labels` has another shape than the volume.
        """
        expected = (self.image.shape[0], *self.image.shape[2:])
        if labels.shape != expected:
            raise ValueError(f"labels of case {self.case!r} are {labels.shape}, the volume is {expected} (D, H, W)")
        voxels = np.ascontiguousarray(labels.transpose(2, 1, 0))  # (D, H, W) -> (W, H, D)
        affine = np.diag([*self.spacing[::-1], 1.0]) if self.affine is None else self.affine
        if self.grid is None:
            return voxels, affine
        orientations = optional("nibabel.orientations")
        back = orientations.ornt_transform(
            orientations.io_orientation(affine), orientations.io_orientation(self.grid.affine)
        )
        return np.ascontiguousarray(orientations.apply_orientation(voxels, back)), self.grid.affine


def check_same_grid(image: Grid, mask: Grid, image_path: str, mask_path: str) -> None:
    """Compare the grids of an image and its label map, both turned to the same orientation.

    Raises:
        MedicalDataError: They differ in shape, or some voxel lies more than a tenth of a voxel elsewhere.
    """
    if image.shape != mask.shape:
        raise MedicalDataError(
            f"image {image_path!r} is {_times(image.shape)} voxels, its label map {mask_path!r} {_times(mask.shape)}"
            " (in the same orientation). Resample the label map onto the image's grid, order 0."
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
    corners[:, :3] *= np.array(image.shape) - 1
    apart = np.linalg.norm((corners @ (image.affine - mask.affine).T)[:, :3], axis=1).max()
    if apart > 0.1 * min(image.spacing):
        raise MedicalDataError(
            f"image {image_path!r} and its label map {mask_path!r} have the same shape, but their affines place voxels"
            f" up to {apart:.3g} mm apart (spacing {_times(image.spacing)} and {_times(mask.spacing)} mm). Resample the"
            " label map onto the image's grid, or, if only its header is wrong, copy the image's affine to it."
        )


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)


def labels_of(values: np.ndarray, path: str, num_classes: int | None = None) -> np.ndarray:
    """Stored label values as int64, in the same shape.

    Args:
        values: Whole numbers of any dtype.
        path: For messages.
        num_classes: Labels reach from 0 (background) to `num_classes` - 1; None: any.

    Raises:
        MedicalDataError: Fractions, negative numbers, or labels beyond `num_classes`, which are listed.
    """
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise MedicalDataError(
                f"label map {path!r} holds fractions from {np.nanmin(values):g} to {np.nanmax(values):g}; labels are"
                " whole numbers. Was it resampled with interpolation, or is it an image?"
            )
    elif values.dtype.kind not in "bui":
        raise MedicalDataError(f"label map {path!r} holds values of type {values.dtype}, not whole numbers")
    labels = values.astype(np.int64)
    if labels.size and labels.min() < 0:
        raise MedicalDataError(f"label map {path!r} holds negative labels, down to {labels.min()}")
    if num_classes is not None and labels.size and labels.max() >= num_classes:
        beyond = np.unique(labels[labels >= num_classes]).tolist()
        raise MedicalDataError(
            f"label map {path!r} holds the labels {listed([str(label) for label in beyond])}, but {num_classes} classes"
            f" (background included) have the labels 0 to {num_classes - 1}. Name more classes, or map these labels."
        )
    return labels

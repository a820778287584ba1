"""Training augmentations of the medical papers, image and label map together.

``dict(policy="synapse", size=224)`` is a complete description; the data sets take it as `transform`.

- ``synapse``: VM-UNet (arXiv 2402.02491) on Synapse, after TransUNet (arXiv 2102.04306): quarter turns with a flip, or
  small rotations.
- ``isic``: VM-UNet on ISIC: flips, rotation, bilinear resize.
- ``msvmunet``: MSVM-UNet (arXiv 2408.13735): up to four of ten operations in random order. The authors take them from
  imgaug, which is no longer maintained; they are written here with SciPy.
- ``none``: resize only.

A transform is called as ``transform(image, mask)`` with image (C, H, W) float32 and mask (H, W), int64 labels or
float32 in [0, 1] (binary, soft edges), and returns both in the new size. Randomness comes from numpy's global
generator, which the data set seeds for each sample, so that a resumed run repeats it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import functional as torchvision
from torchvision.transforms.functional import InterpolationMode

from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.medical_volume import optional
from vision_ssm.registry import suggest

Pair = tuple[np.ndarray, np.ndarray]
MedicalTransform = Callable[[np.ndarray, np.ndarray], Pair]
Operation = Callable[[np.ndarray, np.ndarray], Pair]


def zoom_pair(image: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> Pair:
    """Image (C, H, W) by cubic splines and label map (H, W) by nearest neighbour to `size` (height, width).

    As TransUNet does with SciPy's zoom, corner pixels on corner pixels; cubic splines overshoot a little at edges. What
    lies a rounding error outside is read as if mirrored, and not as nothing: that would be the last row at 512 -> 224.
    """
    if image.shape[1:] == size:
        return image, mask
    zoom = optional("scipy.ndimage").zoom
    factors = size[0] / image.shape[1], size[1] / image.shape[2]
    image = np.stack([zoom(channel, factors, order=3, mode="mirror") for channel in image])
    return image, zoom(mask, factors, order=0, mode="mirror")


def _as_size(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"size must be a positive integer or a pair (height, width) of them, got {size!r}")
    return pair[0], pair[1]


@strict_keywords
def resize_only(size: int | Sequence[int] = 224) -> MedicalTransform:
    """Cubic zoom to `size`, no augmentation."""
    target = _as_size(size)
    return lambda image, mask: zoom_pair(image, mask, target)


@strict_keywords
def synapse_transform(size: int | Sequence[int] = 224, *, degrees: int = 20) -> MedicalTransform:
    """VM-UNet's augmentation of Synapse slices.

    With probability 1/2 a turn by a multiple of 90 degrees and a flip along a random axis; else with probability 1/2 a
    rotation by a whole angle in [-degrees, degrees), nearest neighbour, corners filled with 0. Then zoom to `size`.
    """
    target = _as_size(size)
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees!r}")

    def transform(image: np.ndarray, mask: np.ndarray) -> Pair:
        if np.random.random() > 0.5:
            turns, axis = np.random.randint(0, 4), np.random.randint(0, 2)
            image = np.flip(np.rot90(image, turns, axes=(1, 2)), axis + 1)
            mask = np.flip(np.rot90(mask, turns), axis)
        elif np.random.random() > 0.5:
            rotate = optional("scipy.ndimage").rotate
            angle = np.random.randint(-degrees, degrees)
            image = np.stack([rotate(channel, angle, order=0, reshape=False) for channel in image])
            mask = rotate(mask, angle, order=0, reshape=False)
        return zoom_pair(image, mask, target)

    return transform


@strict_keywords
def isic_transform(size: int | Sequence[int] = 256, *, angle: float | None = None) -> MedicalTransform:
    """VM-UNet's augmentation of dermoscopy images: both flips and a rotation, each with probability 1/2, then resize.

    Image and binary mask are resized bilinearly, which leaves soft edges in the mask; int64 labels by nearest.

    Args:
        size: Side, or (height, width), of the output.
        angle: Of the rotation in degrees. None draws it anew for every sample. The authors' code draws it once, when
            the transform is made, and keeps it for the whole training; give a number to do the same.
    """
    target = list(_as_size(size))

    def transform(image: np.ndarray, mask: np.ndarray) -> Pair:
        # tensors keep whole labels exact up to 2**24 in float32, far above any number of classes
        pair = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in (image, mask[None])]
        if np.random.random() < 0.5:
            pair = [torchvision.hflip(part) for part in pair]
        if np.random.random() < 0.5:
            pair = [torchvision.vflip(part) for part in pair]
        if np.random.random() < 0.5:
            turn = np.random.uniform(0, 360) if angle is None else angle
            pair = [torchvision.rotate(part, turn) for part in pair]
        soft = mask.dtype.kind == "f"
        modes = InterpolationMode.BILINEAR, InterpolationMode.BILINEAR if soft else InterpolationMode.NEAREST
        picture, labels = (torchvision.resize(part, target, mode) for part, mode in zip(pair, modes))
        return picture.numpy(), labels[0].numpy().astype(mask.dtype, copy=False)

    return transform


@strict_keywords
def msvmunet_transform(
    size: int | Sequence[int] = 224,
    *,
    most: int = 4,
    noise: float = 1.275,
    blur: float = 1.0,
    contrast: tuple[float, float] = (0.5, 1.5),
    scale: tuple[float, float] = (0.5, 2.0),
    degrees: float = 40.0,
    shear: float = 16.0,
    warp: tuple[float, float] = (0.008, 0.03),
    shift: float = 0.2,
) -> MedicalTransform:
    """MSVM-UNet's augmentation: 0 to `most` of ten operations, in random order, then zoom to `size`.

    The operations: flip up-down and flip left-right (each with probability 1/2 once chosen), noise, blur, contrast,
    scale, rotation, shear, warp, shift. Images are interpolated linearly, labels by nearest neighbour, outside is 0.

    Args:
        size: Side, or (height, width), of the output.
        most: Most operations for one sample.
        noise: Standard deviation of the Gaussian noise. The authors' 1.275 is made for grey levels up
            to 255, while slices reach from 0 to 1: it drowns the picture. 0.005 is what 1.275 means for such slices.
        blur: Standard deviation of the Gaussian blur in pixels.
        contrast: Range of the factor on the intensities.
        scale: Range of the factors along rows and columns, drawn independently.
        degrees: Largest rotation.
        shear: Largest shear angle, along rows.
        warp: Range of the standard deviation of the points of a 4 x 4 grid that the picture is warped by, as a fraction
            of its sides.
        shift: Largest shift as a fraction of the sides.
    """
    target = _as_size(size)
    for name, value in (("most", most), ("noise", noise), ("blur", blur), ("shift", shift)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")

    def uniform(low: float, high: float) -> float:
        return float(np.random.uniform(low, high))

    def noisy(image: np.ndarray, mask: np.ndarray) -> Pair:
        return image + np.random.normal(0, noise, image.shape).astype(np.float32), mask

    def blurred(image: np.ndarray, mask: np.ndarray) -> Pair:
        return optional("scipy.ndimage").gaussian_filter(image, (0, blur, blur)), mask

    def contrasted(image: np.ndarray, mask: np.ndarray) -> Pair:
        return image * np.float32(uniform(*contrast)), mask  # imgaug's centre of floating-point images is 0

    def scaled(image: np.ndarray, mask: np.ndarray) -> Pair:
        return _affine(image, mask, np.diag([1 / uniform(*scale), 1 / uniform(*scale)]))

    def rotated(image: np.ndarray, mask: np.ndarray) -> Pair:
        angle = math.radians(uniform(-degrees, degrees))
        cos, sin = math.cos(angle), math.sin(angle)
        return _affine(image, mask, np.array([[cos, -sin], [sin, cos]]))

    def sheared(image: np.ndarray, mask: np.ndarray) -> Pair:
        return _affine(image, mask, np.array([[1.0, 0.0], [math.tan(math.radians(uniform(-shear, shear))), 1.0]]))

    def shifted(image: np.ndarray, mask: np.ndarray) -> Pair:
        by = [uniform(-shift, shift) * side for side in mask.shape]
        return _affine(image, mask, np.eye(2), by)

    def warped(image: np.ndarray, mask: np.ndarray) -> Pair:
        return _warp(image, mask, uniform(*warp))

    operations: list[Operation] = [
        _flip(1), _flip(2), noisy, blurred, contrasted, scaled, rotated, sheared, warped, shifted,
    ]  # fmt: skip

    def transform(image: np.ndarray, mask: np.ndarray) -> Pair:
        count = np.random.randint(0, min(most, len(operations)) + 1)
        for index in np.random.permutation(len(operations))[:count]:
            image, mask = operations[index](image, mask)
        return zoom_pair(image, mask, target)

    return transform


def _flip(axis: int) -> Operation:
    def flip(image: np.ndarray, mask: np.ndarray) -> Pair:
        if np.random.random() < 0.5:
            return np.flip(image, axis), np.flip(mask, axis - 1)
        return image, mask

    return flip


def _affine(image: np.ndarray, mask: np.ndarray, matrix: np.ndarray, shift: Sequence[float] = (0.0, 0.0)) -> Pair:
    """Sample image and mask at ``matrix @ (x - centre) + centre - shift`` for every pixel x (row, column)."""
    affine = optional("scipy.ndimage").affine_transform
    centre = (np.array(mask.shape) - 1) / 2
    offset = centre - matrix @ centre - np.asarray(shift)
    image = np.stack([affine(channel, matrix, offset, order=1) for channel in image])
    return image, affine(mask, matrix, offset, order=0)


def _warp(image: np.ndarray, mask: np.ndarray, strength: float) -> Pair:
    """Warp by normal displacements of a 4 x 4 grid of points, linear in between."""
    ndimage = optional("scipy.ndimage")
    height, width = mask.shape
    where = np.indices(mask.shape, dtype=np.float64)  # (2, H, W)
    knots = np.stack([where[0] * 3 / max(height - 1, 1), where[1] * 3 / max(width - 1, 1)])
    for axis, side in enumerate(mask.shape):
        moves = np.random.normal(0, strength * side, (4, 4))
        where[axis] += ndimage.map_coordinates(moves, knots, order=1, mode="nearest")
    image = np.stack([ndimage.map_coordinates(channel, where, order=1) for channel in image])
    return image, ndimage.map_coordinates(mask, where, order=0)


POLICIES: dict[str, Callable[..., MedicalTransform]] = {
    "synapse": synapse_transform,
    "isic": isic_transform,
    "msvmunet": msvmunet_transform,
    "none": resize_only,
}


def medical_transform(policy: str = "none", **options: Any) -> MedicalTransform:
    """Build a transform from plain values.

    Args:
        policy: A key of `POLICIES`.
        options: Keywords of its function, such as ``size``.

    Raises:
        ValueError: Unknown policy, or an option out of range.
        TypeError: Unknown keyword; the message names the valid ones.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}.{suggest(policy, POLICIES)} Valid: {', '.join(POLICIES)}.")
    return POLICIES[policy](**options)

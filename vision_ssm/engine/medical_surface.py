"""Distances between the surfaces of segmented regions in millimetres, for HD95 and ASD.

A voxel of a region is on its surface when a neighbour across one of its faces is not in the region or lies outside of
the volume: the definition of MONAI's ``get_mask_edges`` and of medpy. Distances run from the centre of each surface
voxel to the nearest one of the other region. Only SciPy is needed: a k-d tree over the surface voxels serves ordinary
regions, and a feature transform of the box around both serves noise, which has surface everywhere.
"""

from collections.abc import Sequence

import numpy as np

DENSE = 30
"""With fewer voxels of the box than this per surface voxel, the feature transform is the faster way."""


def surface_voxels(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Surfaces of the regions of label 1 .. `count`.

    Args:
        labels: integers, any number of dimensions.
        count: how many labels are looked for.

    Returns:
        `count` arrays (N, dims) int64: indices of the surface voxels, none for a label that does not occur.
    """
    from scipy.ndimage import binary_erosion, find_objects

    surfaces = []
    for label, box in enumerate(find_objects(labels, max_label=count), start=1):
        if box is None:
            surfaces.append(np.empty((0, labels.ndim), dtype=np.int64))
            continue
        region = labels[box] == label
        # erosion takes background for granted outside of the box, as it is outside of the volume
        surface = np.argwhere(region & ~binary_erosion(region))
        surfaces.append(surface + [side.start for side in box])
    return surfaces


def nearest_distances(points: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """From each of `points` the distance to the nearest of `others`.

    Args:
        points, others: voxel indices (N, dims) and (M, dims), neither empty.
        spacing: mm per voxel along each axis.

    Returns:
        (N,) float64, in mm.
    """
    scale = np.asarray(spacing, dtype=np.float64)
    start = np.minimum(points.min(0), others.min(0))
    shape = np.maximum(points.max(0), others.max(0)) + 1 - start
    if len(points) * DENSE < np.prod(shape):
        from scipy.spatial import KDTree

        return KDTree(others * scale, leafsize=32).query(points * scale)[0]
    from scipy.ndimage import distance_transform_edt

    free = np.ones(shape, dtype=bool)
    free[tuple((others - start).T)] = False
    # the distances of all voxels would take three volumes of float64 more than the indices of their nearest ones
    nearest = distance_transform_edt(free, sampling=scale, return_distances=False, return_indices=True)
    steps = nearest[(slice(None), *(points - start).T)].T + start - points  # (N, dims)
    return np.sqrt(np.square(steps * scale).sum(1))


def surface_distances(
    first: np.ndarray, second: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances between two surfaces, in both directions.

    Args:
        first, second: voxel indices (N, dims) and (M, dims), see `surface_voxels`.
        spacing: mm per voxel along each axis.

    Returns:
        (N,) and (M,) float64 in mm: of each voxel of `first` to `second`, and of each of `second` to `first`.

    Raises:
        ValueError: one of them is empty, so that there is no distance.
    """
    if not len(first) or not len(second):
        raise ValueError(f"there is no distance between surfaces of {len(first)} and {len(second)} voxels")
    return nearest_distances(first, second, spacing), nearest_distances(second, first, spacing)

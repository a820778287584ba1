"""Top-down pose estimation: what keypoints there are, the region of a person, and heat maps of its keypoints.

The region around a box is warped to the input of a network, and each keypoint becomes a heat map, a Gaussian around its
place (Tompson et al., arXiv:1406.2984; Xiao et al., arXiv:1804.06208; Sun et al., arXiv:1902.09212). Points are (x, y)
in pixels, boxes (x, y, width, height); the centre of the first pixel is (0, 0).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.transforms import Size, _probability, _size, _span, _statistics
from vision_ssm.registry import check_keywords

_NORMAL = NormalDist()


@dataclass(frozen=True)
class KeypointSet:
    """The K keypoints of a kind of object; places are numbers from 0.

    Attributes:
        names: of the keypoints.
        sigmas: of COCO's object keypoint similarity, relative to the root of the object's area.
        flip_pairs: keypoints that change places when the image is mirrored.
        skeleton: pairs to be joined by lines in pictures.
        upper: keypoints of the upper body; empty: no half bodies in training.
    """

    names: tuple[str, ...]
    sigmas: tuple[float, ...]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    upper: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        if count == 0 or len(self.sigmas) != count or min(self.sigmas) <= 0:
            raise ValueError(f"a keypoint needs a name and a positive sigma: {count} names, sigmas {self.sigmas}")
        numbers = [number for pair in (*self.flip_pairs, *self.skeleton) for number in pair] + list(self.upper)
        outside = [number for number in numbers if not 0 <= number < count]
        if outside:
            raise ValueError(f"keypoint {outside[0]} of flip_pairs, skeleton or upper is not one of 0 .. {count - 1}")
        paired = [number for pair in self.flip_pairs for number in pair]
        if len(set(paired)) != len(paired):
            raise ValueError(f"a keypoint may occur in one flip pair only, got {self.flip_pairs}")

    @classmethod
    def build(cls, definition: "KeypointSet | Mapping[str, Any] | None") -> "KeypointSet":
        """From a dict with the attributes as keys; None: COCO's seventeen of a person.

        Raises:
            TypeError: unknown key. ValueError: numbers out of range.
        """
        if definition is None:
            return COCO_PERSON
        if isinstance(definition, KeypointSet):
            return definition
        check_keywords(cls, definition, "keypoints")
        values: dict[str, Any] = {key: tuple(definition.get(key, ())) for key in ("names", "sigmas", "upper")}
        values |= {key: tuple(map(tuple, definition.get(key, ()))) for key in ("flip_pairs", "skeleton")}
        return cls(**values)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def mirrored(self) -> list[int]:
        """For every keypoint the number of the one that takes its place in a mirrored image."""
        order = list(range(len(self)))
        for first, second in self.flip_pairs:
            order[first], order[second] = second, first
        return order

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `build` takes them."""
        return asdict(self)


COCO_PERSON = KeypointSet(
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
        0.089,
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    skeleton=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    upper=tuple(range(11)),
)  # fmt: skip
"""COCO's person. The sigmas are those of the evaluation code of COCO (https://cocodataset.org/#keypoints-eval)."""


# Geometry


def box_region(box: Sequence[float], padding: float = 1.25) -> tuple[np.ndarray, np.ndarray]:
    """Centre (x, y) of a box, and its size (width, height) times `padding`."""
    x, y, width, height = (float(value) for value in box)
    return np.array([x + width / 2, y + height / 2]), np.array([width, height]) * padding


def fit_aspect(size: np.ndarray, aspect: float) -> np.ndarray:
    """The smallest (width, height) of ratio `aspect` that holds `size`."""
    width, height = size
    return np.array([max(width, height * aspect), max(height, width / aspect)])


def warp_matrix(center: np.ndarray, size: np.ndarray, rotation: float, output: tuple[int, int]) -> np.ndarray:
    """Matrix (2, 3) that takes points of the image to points of the network's input.

    The region of `size` (width, height) around `center`, turned by `rotation` degrees (clockwise as images are seen),
    fills the output from left to right.

    Args:
        output: (height, width) of the input in pixels.
    """
    angle = np.deg2rad(rotation)
    scale = output[1] / size[0]
    linear = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shift = np.array([output[1] / 2, output[0] / 2]) - linear @ center
    return np.column_stack([linear, shift])


def mirror_matrix(width: int) -> np.ndarray:
    """Matrix (2, 3) of the mirror image of a picture that is `width` pixels wide."""
    return np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]])


def apply_matrix(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) moved by an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def heat_maps(
    points: np.ndarray, visible: np.ndarray, size: tuple[int, int], sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of a heat-map network: a Gaussian of height 1 around the pixel nearest to each keypoint, cut off at three
    sigmas in either direction.

    Args:
        points: (K, 2), in pixels of the map.
        visible: (K,) bool, keypoints that are labelled.
        size: (height, width) of the map.
        sigma: in pixels of the map.

    Returns:
        Maps (K, height, width) and weights (K,), both float32. A keypoint that is not labelled, or whose Gaussian lies
        outside the map, has weight 0 and an empty map.
    """
    height, width = size
    nearest = np.floor(np.where(visible[:, None], points, 0) + 0.5)  # (K, 2)
    across = np.arange(width) - nearest[:, :1]  # (K, width)
    down = np.arange(height) - nearest[:, 1:]  # (K, height)
    curves = [np.exp(-(d**2) / (2 * sigma**2)) * (np.abs(d) <= 3 * sigma) for d in (across, down)]
    inside = visible & curves[0].any(1) & curves[1].any(1)
    maps = curves[1][:, :, None] * curves[0][:, None, :] * inside[:, None, None]  # (K, height, width)
    return maps.astype(np.float32), inside.astype(np.float32)


def _truncated_normal() -> float:
    """Standard normal number between -1 and 1, from NumPy's global generator."""
    low, high = _NORMAL.cdf(-1), _NORMAL.cdf(1)
    return _NORMAL.inv_cdf(np.random.uniform(low, high))


class TopDownTransform:
    """Warps the region around a person to the network's input and, for training, makes the heat maps.

    Training mirrors, takes the upper or the lower body alone, shifts, scales and turns; the numbers come from NumPy's
    global generator, which the dataset seeds per sample.

    Args:
        train: training (random, with heat maps) or evaluation.
        input_size: (height, width) of the input, or one side.
        stride: input pixels per pixel of the heat maps.
        sigma: of the heat maps, in their pixels; 2 for 64 x 48, 3 for 96 x 72.
        padding: the region is this much larger than the box.
        mean, std: of RGB values in [0, 1]; ImageNet's by default.
        keypoints: see `KeypointSet.build`.
        flip: probability of mirroring.
        half_body: probability of taking half a body, where at least `half_body_least` keypoints are labelled.
        half_body_least: see `half_body`.
        shift: largest shift in widths and heights of the region. `shift_prob`: probability of shifting.
        scale: smallest and largest factor of the region's size.
        rotation: largest angle in degrees. `rotation_prob`: probability of turning.

    Raises:
        ValueError: an option out of range. TypeError: an unknown one.
    """

    @strict_keywords
    def __init__(
        self,
        train: bool,
        input_size: Size = (256, 192),
        *,
        stride: int = 4,
        sigma: float = 2.0,
        padding: float = 1.25,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        keypoints: KeypointSet | Mapping[str, Any] | None = None,
        flip: float = 0.5,
        half_body: float = 0.3,
        half_body_least: int = 9,
        shift: float = 0.16,
        shift_prob: float = 0.3,
        scale: Sequence[float] = (0.5, 1.5),
        rotation: float = 80.0,
        rotation_prob: float = 0.6,
    ) -> None:
        self.train = train
        self.input_size = _size(input_size)
        if stride < 1 or any(side % stride for side in self.input_size):
            raise ValueError(f"the stride {stride} of the heat maps must divide the sides of input_size {input_size}")
        if min(sigma, padding) <= 0 or min(shift, rotation) < 0:
            raise ValueError(
                "sigma and padding must be positive, shift and rotation at least 0, got "
                f"{sigma}, {padding}, {shift} and {rotation}"
            )
        self.map_size = (self.input_size[0] // stride, self.input_size[1] // stride)
        self.stride = stride
        self.sigma = sigma
        self.padding = padding
        self.mean, self.std = (np.float32(values) for values in _statistics(mean, std, 3))
        self.keypoints = KeypointSet.build(keypoints)
        self.flip = _probability("flip", flip)
        self.half_body = _probability("half_body", half_body)
        self.half_body_least = half_body_least
        self.shift = shift
        self.shift_prob = _probability("shift_prob", shift_prob)
        span = _span("scale", scale)
        assert span is not None
        self.scale = span
        self.rotation = rotation
        self.rotation_prob = _probability("rotation_prob", rotation_prob)

    @property
    def aspect(self) -> float:
        """Width over height of the input."""
        return self.input_size[1] / self.input_size[0]

    def warp(self, image: np.ndarray, matrix: np.ndarray) -> torch.Tensor:
        """Input of the network, float32 (3, height, width), from a picture (H, W, 3) of 8-bit RGB; black outside."""
        height, width = self.input_size
        pixels = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR).astype(np.float32)
        return torch.from_numpy(((pixels / 255 - self.mean) / self.std).transpose(2, 0, 1).copy())

    def evaluation_sample(self, image: np.ndarray, box: Sequence[float]) -> dict[str, Any]:
        """What a model needs to find a person's keypoints.

        Returns:
            dict with ``image`` (3, height, width), ``inverse`` (2, 3) float64, the matrix from the input back to the
            picture, and ``area``, the pixels of the region.
        """
        center, size = box_region(box, self.padding)
        size = fit_aspect(size, self.aspect)
        matrix = warp_matrix(center, size, 0.0, self.input_size)
        inverse = torch.from_numpy(cv2.invertAffineTransform(matrix))
        return dict(image=self.warp(image, matrix), inverse=inverse, area=float(size.prod()))

    def training_sample(self, image: np.ndarray, box: Sequence[float], keypoints: np.ndarray) -> dict[str, Any]:
        """A person with its heat maps.

        Args:
            image: (H, W, 3) 8-bit RGB.
            box: x, y, width, height.
            keypoints: (K, 3) x, y and visibility (0: not labelled).

        Returns:
            dict with ``image`` (3, height, width), ``target`` (K, height / stride, width / stride) and ``weight`` (K,).
        """
        points, visible = keypoints[:, :2].astype(np.float64), keypoints[:, 2] > 0
        center, size = box_region(box, self.padding)
        mirror = None
        if np.random.random() < self.flip:
            mirror = mirror_matrix(image.shape[1])
            center, points = apply_matrix(mirror, center), apply_matrix(mirror, points)
            points, visible = points[self.keypoints.mirrored], visible[self.keypoints.mirrored]
        if visible.sum() >= self.half_body_least and np.random.random() < self.half_body:
            half = self._half_body(points, visible)
            center, size = (center, size) if half is None else half
        shift = [_truncated_normal() for _ in range(2)]
        if np.random.random() < self.shift_prob:
            center = center + self.shift * np.array(shift) * size
        low, high = self.scale
        size = fit_aspect(size, self.aspect) * ((low + high) / 2 + (high - low) / 2 * _truncated_normal())
        turn = self.rotation * _truncated_normal()
        matrix = warp_matrix(center, size, turn if np.random.random() < self.rotation_prob else 0.0, self.input_size)
        target, weight = heat_maps(apply_matrix(matrix, points) / self.stride, visible, self.map_size, self.sigma)
        if mirror is not None:  # mirroring and warping in one pass over the pixels
            matrix = np.column_stack([matrix[:, :2] @ mirror[:, :2], apply_matrix(matrix, mirror[:, 2])])
        return dict(image=self.warp(image, matrix), target=torch.from_numpy(target), weight=torch.from_numpy(weight))

    def _half_body(self, points: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Centre and size of the labelled keypoints of the upper or the lower body, the upper one preferred; None if
        neither has enough of them (two above, three below)."""
        above = np.isin(np.arange(len(points)), self.keypoints.upper)
        upper, lower = points[visible & above], points[visible & ~above]
        if not self.keypoints.upper or (len(upper) < 2 and len(lower) < 3):
            return None
        if len(lower) < 3:
            chosen = upper
        elif len(upper) < 2:
            chosen = lower
        else:
            chosen = upper if np.random.random() < 0.7 else lower
        least, most = chosen.min(0), chosen.max(0)
        if not (most > least).any():
            return None  # all in one point: no region
        return (least + most) / 2, (most - least) * 1.5

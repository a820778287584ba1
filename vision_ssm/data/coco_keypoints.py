"""Persons with keypoints on disk in COCO's layout, prepared for top-down pose estimation.

Every sample is one person: the region around a box is warped to the input of a network, and each keypoint becomes a
heat map, a Gaussian around its place (Tompson et al., arXiv:1406.2984; Xiao et al., arXiv:1804.06208; Sun et al.,
arXiv:1902.09212). Points are (x, y) in pixels, boxes (x, y, width, height); the centre of the first pixel is (0, 0).
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, default_collate

from vision_ssm.data.decode import load_image
from vision_ssm.data.image_folder import _existing_folder, _listed, _PathTable
from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.randomness import seeded
from vision_ssm.data.transforms import Size, _probability, _size, _span, _statistics
from vision_ssm.registry import DATASETS, FUNCTIONS, check_keywords, suggest

SPLITS = ("train", "val")
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


# Files


def _read_json(file: Path, what: str) -> Any:
    try:
        with file.open(encoding="utf-8") as stream:
            return json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{what} {str(file)!r} is no complete JSON file ({error}): compare its size with the original"
        ) from None


def _existing_file(root: Path, name: str | os.PathLike, what: str) -> Path:
    """`name` below `root`, or as it stands; `FileNotFoundError` with similar names if neither exists."""
    for file in (root / Path(name).expanduser(), Path(name).expanduser()):
        if file.is_file():
            return file
    folder = (root / name).parent
    near = [file.name for file in folder.glob("*.json")] if folder.is_dir() else []
    where = f" {str(folder)!r} holds no .json file." if folder.is_dir() and not near else ""
    where = where or ("" if folder.is_dir() else f" There is no folder {str(folder)!r}.")
    raise FileNotFoundError(
        f"{what} {str(name)!r} exists neither in {str(root)!r} nor here.{where}{suggest(Path(name).name, near)}"
    )


def _check_images(folder: Path, names: Sequence[str], source: Path) -> None:
    """Every image must exist; one listing per folder is quicker than one question per file."""
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in present:
            inner = folder / parent
            present[parent] = set(os.listdir(inner)) if inner.is_dir() else set()
        if base not in present[parent]:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images that {str(source)!r} names are not in {str(folder)!r}: "
            f"{_listed(missing)}"
        )


@DATASETS.register_module()
class CocoKeypoints(Dataset):
    """Persons of a COCO keypoint file, one sample each.

    Layout: ``root/annotations/person_keypoints_{train,val}2017.json`` and ``root/{train,val}2017/*.jpg``. Persons
    without a labelled keypoint, crowds and empty boxes are left out; boxes of the annotations are cut off at the border
    of the image.

    Args:
        root: data folder; ``~`` is expanded.
        split: ``train`` or ``val``: which of the files below, where they are not named.
        transform: a `TopDownTransform` or its keywords; by default that of the split with its default options.
        ann_file: annotation file, looked for in `root`, then in the current folder.
        image_folder: folder of the images, relative to `root`.
        detections: for evaluation: json file of boxes that a detector found, a list of dict(image_id, category_id,
            bbox, score) such as COCO_val2017_detections_AP_H_56_person.json, in place of those of the annotations.
        min_score: leave detections with a lower score out.
        keypoints: see `KeypointSet.build`; COCO's person by default.

    Attributes:
        boxes: (N, 4) x, y, width, height of each person. `box_scores`: (N,), 1 for boxes of the annotations.
        labels: (N, K, 3) x, y and visibility, or None with `detections`.
        metainfo: the `KeypointSet` as a dict, ``ann_file`` and ``category_id``, for the metric.

    Raises:
        FileNotFoundError: no such file or folder, or images that the file names are missing.
        ValueError: a file does not hold what it should; the message names the place.
        TypeError: unknown keyword.
    """

    @strict_keywords
    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "train",
        transform: TopDownTransform | Mapping[str, Any] | None = None,
        *,
        ann_file: str | os.PathLike | None = None,
        image_folder: str | None = None,
        detections: str | os.PathLike | None = None,
        min_score: float = 0.0,
        keypoints: KeypointSet | Mapping[str, Any] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}.{suggest(split, SPLITS)}")
        self.root = Path(root).expanduser()
        self.keypoints = KeypointSet.build(keypoints)
        self.transform = self._built(transform, split)
        if detections is not None and self.transform.train:
            raise ValueError("detections have no keypoints to learn from: they are for transform=dict(train=False)")
        if not self.root.is_dir():
            _existing_folder(self.root.parent, self.root.name)
        name = ann_file if ann_file is not None else f"annotations/person_keypoints_{split}2017.json"
        self.ann_file = _existing_file(self.root, name, "annotation file")
        self.folder = _existing_folder(self.root, f"{split}2017" if image_folder is None else image_folder)
        content = _read_json(self.ann_file, "annotation file")
        images = self._images(content)
        self.category_id = category = self._category(content)
        if detections is None:
            rows, labels = self._annotated(content["annotations"], images, category)
            self.labels: np.ndarray | None = np.stack(labels).astype(np.float32)
        else:
            file = _existing_file(self.root, detections, "detection file")
            rows = self._detected(_read_json(file, "detection file"), images, category, min_score, file)
            self.labels = None
        self.boxes = np.array([row[1] for row in rows], dtype=np.float32)
        self.box_scores = np.array([row[2] for row in rows], dtype=np.float32)
        used = sorted({row[0] for row in rows})
        number = {image_id: place for place, image_id in enumerate(used)}
        self._image_ids = np.array(used, dtype=np.int64)
        self._image_of = np.array([number[row[0]] for row in rows], dtype=np.int64)  # (N,)
        self._sizes = np.array([images[image_id][1:] for image_id in used], dtype=np.int64)  # width, height
        names = [images[image_id][0] for image_id in used]
        _check_images(self.folder, names, self.ann_file)
        self._names = _PathTable(names)

    def _built(self, transform: TopDownTransform | Mapping[str, Any] | None, split: str) -> TopDownTransform:
        if not isinstance(transform, TopDownTransform):
            options = dict(transform) if transform is not None else dict(train=split == "train")
            transform = TopDownTransform(**{"keypoints": self.keypoints, **options})
        if transform.keypoints != self.keypoints:
            raise ValueError(
                f"the transform is for keypoints {_listed(transform.keypoints.names)}, the dataset has "
                f"{_listed(self.keypoints.names)}: write keypoints=dict(...) in the dataset alone"
            )
        return transform

    def _images(self, content: Any) -> dict[int, tuple[str, int, int]]:
        """File name, width and height of each image by its id."""
        parts = ("images", "annotations", "categories")
        missing = [part for part in parts if not isinstance(content, dict) or not isinstance(content.get(part), list)]
        if missing:
            raise ValueError(
                f"{str(self.ann_file)!r} is no COCO annotation file: it has no list {_listed(missing)} (expected an "
                f"object with {', '.join(parts)})"
            )
        try:
            return {
                int(image["id"]): (image["file_name"], int(image["width"]), int(image["height"]))
                for image in content["images"]
            }
        except KeyError as error:
            raise ValueError(
                f"{str(self.ann_file)!r}: an image has no {error}; each needs id, file_name, width and height"
            ) from None

    def _category(self, content: dict[str, Any]) -> int:
        """Id of the category that has our keypoints."""
        names = list(self.keypoints.names)
        for category in content["categories"]:
            if list(category.get("keypoints", ())) == names:
                return int(category["id"])
        found = {category.get("name", "?"): len(category.get("keypoints", ())) for category in content["categories"]}
        raise ValueError(
            f"{str(self.ann_file)!r} has no category with the {len(names)} keypoints {names[0]} .. {names[-1]}; it has "
            f"{', '.join(f'{name} with {count}' for name, count in found.items()) or 'none'}. Is it a person_keypoints "
            "file? For other keypoints give keypoints=dict(names=..., sigmas=..., flip_pairs=...)."
        )

    def _annotated(
        self, annotations: list[dict[str, Any]], images: dict[int, tuple[str, int, int]], category: int
    ) -> tuple[list[tuple[int, list[float], float]], list[np.ndarray]]:
        """(image id, box, 1.0) and keypoints (K, 3) of the annotated persons."""
        count = len(self.keypoints)
        rows, labels = [], []
        for annotation in annotations:
            if annotation.get("category_id") != category:
                continue
            where = f"{str(self.ann_file)!r}, annotation {annotation.get('id')}"
            missing = [key for key in ("image_id", "bbox", "keypoints", "area") if key not in annotation]
            if missing:
                raise ValueError(f"{where} has no {_listed(missing)}")
            if annotation["image_id"] not in images:
                raise ValueError(f"{where} belongs to image {annotation['image_id']}, which the file does not list")
            values = annotation["keypoints"]
            name, width, height = images[annotation["image_id"]]
            if len(values) != 3 * count:
                raise ValueError(
                    f"{where} (image {name!r}) has {len(values)} numbers for keypoints, expected {3 * count}: x, y and "
                    f"visibility of {count}"
                )
            if len(annotation["bbox"]) != 4:
                raise ValueError(f"{where} (image {name!r}): bbox is x, y, width, height, got {annotation['bbox']}")
            keypoints = np.array(values, dtype=np.float64).reshape(count, 3)  # (K, 3)
            if not np.isfinite(keypoints).all():
                raise ValueError(f"{where} (image {name!r}) has a keypoint that is no finite number")
            left, top, wide, high = annotation["bbox"]
            right, bottom = min(left + wide, width - 1), min(top + high, height - 1)
            left, top = max(left, 0), max(top, 0)
            if annotation.get("iscrowd") or not (keypoints[:, 2] > 0).any() or right <= left or bottom <= top:
                continue
            rows.append((annotation["image_id"], [left, top, right - left, bottom - top], 1.0))
            labels.append(keypoints)
        if not rows:
            raise ValueError(f"{str(self.ann_file)!r} has no person with a labelled keypoint and a box")
        return rows, labels

    def _detected(
        self, found: Any, images: dict[int, tuple[str, int, int]], category: int, min_score: float, file: Path
    ) -> list[tuple[int, list[float], float]]:
        """(image id, box, score) of the detected persons; empty boxes are left out."""
        if not isinstance(found, list):
            raise ValueError(
                f"{str(file)!r} is no detection file: expected a list of dict(image_id, category_id, bbox, score)"
            )
        rows = []
        for number, detection in enumerate(found):
            where = f"{str(file)!r}, detection {number}"
            missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in detection]
            if missing or len(detection["bbox"]) != 4:
                raise ValueError(f"{where} has no {_listed(missing) if missing else 'bbox of four numbers'}")
            if detection["category_id"] != category or detection["score"] < min_score:
                continue
            if detection["image_id"] not in images:
                raise ValueError(
                    f"{where} is in image {detection['image_id']}, which {str(self.ann_file)!r} does not list: the two "
                    "files are of different splits"
                )
            if min(detection["bbox"][2:]) > 0:
                rows.append((detection["image_id"], detection["bbox"], float(detection["score"])))
        if not rows:
            raise ValueError(
                f"{str(file)!r} has no detection of category {category} with a score of {min_score} or more"
            )
        return rows

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(**self.keypoints.as_dict(), ann_file=str(self.ann_file), category_id=self.category_id)

    def path(self, index: int) -> str:
        """File of the image of person `index`."""
        return os.path.join(self.folder, self._names[int(self._image_of[index])])

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return f"CocoKeypoints({str(self.ann_file)!r}, {len(self)} persons in {len(self._names)} images)"

    def image(self, index: int) -> np.ndarray:
        """The whole image of person `index`, (H, W, 3) 8-bit RGB.

        Raises:
            UnreadableImageError: it cannot be decoded.
            ValueError: it is not of the size that the annotations are for.
        """
        pixels = np.asarray(load_image(self.path(index)))
        width, height = self._sizes[self._image_of[index]].tolist()
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"image {self.path(index)!r} is {pixels.shape[1]} x {pixels.shape[0]} pixels, {str(self.ann_file)!r} "
                f"says {width} x {height}: its boxes and keypoints are for another version of the image"
            )
        return pixels

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Person `index`.

        With a training transform: dict(image (3, height, width), target (K, height / stride, width / stride), weight
        (K,), path). Otherwise dict(image, path, instance), where ``instance`` holds ``inverse`` (2, 3), ``area``,
        ``box`` (4,), ``box_score``, ``image_id`` and ``index``: what leads a prediction back to the image. If `index`
        is a `Draw`, the transform is seeded from its coordinates and the global generators stay as they are.

        Raises:
            IndexError: out of range. UnreadableImageError, ValueError: see `image`.
        """
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range for {len(self)} persons")
        position %= len(self)
        image, box = self.image(position), self.boxes[position]
        if self.labels is not None and self.transform.train:
            coordinates = getattr(index, "coordinates", None)
            if coordinates is None:
                sample = self.transform.training_sample(image, box, self.labels[position])
            else:
                with seeded(*coordinates):
                    sample = self.transform.training_sample(image, box, self.labels[position])
            return dict(**sample, path=self.path(position))
        sample = self.transform.evaluation_sample(image, box)
        pixels = sample.pop("image")
        instance = dict(
            **sample,
            box=torch.from_numpy(box.copy()),
            box_score=float(self.box_scores[position]),
            image_id=int(self._image_ids[self._image_of[position]]),
            index=position,
        )
        return dict(image=pixels, instance=instance, path=self.path(position))


@FUNCTIONS.register_module()
def collate_poses(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of `CocoKeypoints`: tensors and numbers become tensors with a leading batch axis, paths a list."""
    return default_collate(list(samples))

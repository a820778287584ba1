"""Persons with keypoints on disk in COCO's layout, one sample each, prepared by `TopDownTransform`."""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from vision_ssm.data.decode import load_image
from vision_ssm.data.image_folder import _existing_folder, _listed, _PathTable
from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.randomness import seeded
from vision_ssm.data.top_down import KeypointSet, TopDownTransform
from vision_ssm.registry import DATASETS, FUNCTIONS, suggest

SPLITS = ("train", "val")


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

"""Skeletons drawn on pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vision_ssm.data import COCO_PERSON, KeypointSet, load_image

from .figures import draw_pictures

LEFT = (31, 111, 180)
RIGHT = (217, 113, 15)
MIDDLE = (47, 133, 90)
LEAST_SIDE = 320
SUBPIXEL_BITS = 4


def _side(name: str) -> tuple[int, int, int]:
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    definition: KeypointSet = COCO_PERSON,
    threshold: float = 0.3,
) -> np.ndarray:
    """`image` with the skeletons of its persons: the person's left side blue, the right side orange, the rest green.

    Args:
        image: (H, W, 3) 8-bit RGB; not changed.
        keypoints: (N, K, 2), x and y in pixels.
        scores: (N, K); keypoints with a lower score than `threshold`, and the lines to them, are left out.
        definition: names and skeleton of the K keypoints.
        threshold: see `scores`.

    Raises:
        ValueError: shapes that do not fit each other or `definition`.
    """
    keypoints, scores = np.asarray(keypoints, dtype=np.float64), np.asarray(scores)
    count = len(definition)
    if keypoints.shape != (len(keypoints), count, 2) or scores.shape != keypoints.shape[:2]:
        raise ValueError(
            f"expected keypoints (N, {count}, 2) and scores (N, {count}), got {keypoints.shape} and {scores.shape}"
        )
    canvas = np.ascontiguousarray(image).copy()
    width = max(1, round(max(image.shape[:2]) / 240))
    places = np.rint(np.clip(keypoints, -4096, 4096 * 4) * 2**SUBPIXEL_BITS).astype(int)
    for points, heights in zip(places, scores, strict=True):
        seen = heights >= threshold
        for first, second in definition.skeleton:
            if seen[first] and seen[second]:
                sides = {_side(definition.names[first]), _side(definition.names[second])}
                color = sides.pop() if len(sides) == 1 else MIDDLE
                ends = (points[first].tolist(), points[second].tolist())
                cv2.line(canvas, *ends, color, 2 * width, cv2.LINE_AA, SUBPIXEL_BITS)
        for place, name in zip(points[seen].tolist(), np.array(definition.names)[seen], strict=True):
            for radius, color in ((2 * width + 1, (255, 255, 255)), (2 * width, _side(name))):
                cv2.circle(canvas, place, radius << SUBPIXEL_BITS, color, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas


def draw_pose_grid(
    pictures: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    path: str | Path,
    title: str,
    definition: KeypointSet = COCO_PERSON,
    threshold: float = 0.3,
) -> None:
    """Grid of images with the skeletons of their persons.

    Args:
        pictures: file of each image and its persons, mappings with ``keypoints`` (K, 2) and ``scores`` (K,).
        path: picture to write.
        title: line above.
        definition, threshold: see `draw_poses`.
    """
    drawn = []
    for file, persons in pictures:
        image = np.asarray(load_image(file))
        factor = max(1, math.ceil(LEAST_SIDE / max(image.shape[:2])))  # so that lines are fine on small images
        image = image.repeat(factor, 0).repeat(factor, 1)
        if persons:
            keypoints = (np.stack([person["keypoints"] for person in persons]) + 0.5) * factor - 0.5
            scores = np.stack([person["scores"] for person in persons])
            image = draw_poses(image, keypoints, scores, definition, threshold)
        drawn.append((Path(file).name, image))
    draw_pictures(drawn, path, title)

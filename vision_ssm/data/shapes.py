"""The small drawn data sets for dense prediction, each in the layout on disk of the real set it stands for."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_ssm.data.figures import KEYPOINTS, PERSON, SKELETON, draw_figures
from vision_ssm.data.masks import mask_box, mask_polygons, mask_runs
from vision_ssm.data.progress import progress_bar
from vision_ssm.data.scenes import SHAPES, UNLABELLED, Scene, draw_shapes
from vision_ssm.data.writing import PrepareError, replacing
from vision_ssm.registry import suggest

CLASSES = ("ground", *SHAPES)
"""Names of the semantic classes in the order of their labels."""
PALETTE = ((128, 128, 128), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0))
"""Colour of each of `CLASSES` (Okabe and Ito's, told apart by the colour-blind)."""
SHAPES_TRAIN, SHAPES_VAL = 300, 60
SHAPES_SIZE = {"ade20k": 128, "cityscapes": 128, "coco": 128, "coco-keypoints": 160}
"""Layouts, and the long side of their pictures in pixels (Cityscapes: the short side)."""
SMALLEST_SIZE = 64
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19)
"""Cityscapes' own ids of its training labels 0 to 6."""
CATEGORY_IDS = {"cross": 5, "disc": 34, "square": 38, "triangle": 59, "ring": 60, "star": 64}
COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
"""Ids and names of COCO's 80 categories."""

_ASPECTS = ((1, 1), (3, 4), (4, 3))  # height : width
_CITIES = {"train": ("stripeburg", "dotstadt", "checkerdorf"), "val": ("chevronhausen", "blotchheim")}
_SPLITS = {"train": 0, "val": 1}
_README = """\
Shapes: a small drawn data set in the layout of {name}

{content}

Classes:  {classes}
Layout:   {layout}
Pictures: {train} training and {val} validation, {sizes}.
Licence:  drawn by a program; no rights are claimed in the pictures (CC0 1.0).
Made by:  {command}
          The same command writes the same bytes with the same versions of NumPy and Pillow.
"""
_SHAPES_CONTENT = """\
Textured shapes on textured ground. They cover each other and are cut off by the border. A class has an outline and a
family of texture of its own (cross: white stripes, disc: black dots, square: checker of two shades, triangle: chevrons
of two colours, ring: one colour fading into another, star: pale blotches); colours, size, rotation and place are
random. Thin wires belong to no class. Some pictures hold nothing, some a group of many small shapes of one class."""
_FIGURES_CONTENT = """\
Jointed figures with the 17 keypoints of COCO's people, before, behind and among shapes that belong to no class. Seen
from the front a figure has a face; seen from behind it has hair. The stripes of left and right limbs wind by opposite
hands. Visibility: 2 visible, 1 hidden by something else or by the figure itself, 0 outside of the picture. Far figures
and groups have no keypoints."""


class _Writer:
    """Draws the pictures of one data set into a folder; one sub-class per layout."""

    name: str
    content = _SHAPES_CONTENT
    classes: str
    layout: str
    draw: Callable[..., Scene] = staticmethod(draw_shapes)

    def __init__(self, folder: Path, size: int, coco_names: bool) -> None:
        self.folder, self.size, self.coco_names = folder, size, coco_names

    def shape(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`: landscape, portrait and square take turns."""
        height, width = _ASPECTS[index % len(_ASPECTS)]
        return self.size * height // max(height, width), self.size * width // max(height, width)

    def sizes(self) -> str:
        """The sizes of the pictures, for the README."""
        pairs = dict.fromkeys(self.shape(index) for index in range(len(_ASPECTS)))
        return " and ".join(f"{height} x {width}" for height, width in pairs) + " pixels (height x width)"

    def add(self, split: str, index: int, scene: Scene) -> None:
        """Write one picture and what belongs to it."""
        raise NotImplementedError

    def finish(self, split: str) -> None:
        """Write what belongs to a split as a whole."""

    def save(self, array: np.ndarray, *path: str) -> None:
        file = self.folder.joinpath(*path)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Half the colour resolution, JPEG's default, would wash out the textures of small pictures.
        Image.fromarray(array).save(file, **({"quality": 95, "subsampling": 0} if file.suffix == ".jpg" else {}))


def semantic_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8: the label of each pixel's class in `CLASSES`; 255 where there is no class."""
    labels = np.array([0, *(CLASSES.index(name) for name in scene.classes), 255], dtype=np.uint8)
    return labels[np.where(scene.owner == UNLABELLED, len(labels) - 1, scene.owner)]


class _Ade20k(_Writer):
    name = "ADE20K (SceneParsing)"
    classes = "map value 0: no class, ignored; " + ", ".join(f"{i}: {n}" for i, n in enumerate(CLASSES, start=1))
    layout = "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png"

    def add(self, split: str, index: int, scene: Scene) -> None:
        part, prefix = {"train": ("training", "ADE_train"), "val": ("validation", "ADE_val")}[split]
        stem = f"{prefix}_{index + 1:08d}"
        self.save(scene.image, "images", part, f"{stem}.jpg")
        self.save(semantic_map(scene) + np.uint8(1), "annotations", part, f"{stem}.png")  # 255 wraps to 0


class _Cityscapes(_Writer):
    name = "Cityscapes"
    classes = "label (own id) 255 (0): no class, ignored; " + ", ".join(
        f"{label} ({CITYSCAPES_IDS[label]}): {name}" for label, name in enumerate(CLASSES)
    )
    layout = (
        "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png and\n"
        "          *_gtFine_labelIds.png; SPLIT is train or val"
    )

    def shape(self, index: int) -> tuple[int, int]:
        return self.size, 2 * self.size

    def add(self, split: str, index: int, scene: Scene) -> None:
        city = _CITIES[split][index % len(_CITIES[split])]
        stem = f"{city}_{index // len(_CITIES[split]):06d}_000019"
        labels = semantic_map(scene)
        own_ids = np.zeros(256, dtype=np.uint8)
        own_ids[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
        self.save(scene.image, "leftImg8bit", split, city, f"{stem}_leftImg8bit.png")
        self.save(labels, "gtFine", split, city, f"{stem}_gtFine_labelTrainIds.png")
        self.save(own_ids[labels], "gtFine", split, city, f"{stem}_gtFine_labelIds.png")


class _Coco(_Writer):
    name = "COCO (instances)"
    classes = ", ".join(f"{number}: {name}" for name, number in CATEGORY_IDS.items()) + " (category ids)"
    layout = "{train2017,val2017}/*.jpg, annotations/instances_{train,val}2017.json"
    kind = "instances"

    def __init__(self, folder: Path, size: int, coco_names: bool) -> None:
        super().__init__(folder, size, coco_names)
        if coco_names and self.kind == "instances":
            named = ", ".join(f"{number}: {COCO_NAMES[number]} ({name})" for name, number in CATEGORY_IDS.items())
            self.classes = f"{named} (category ids); all 80 categories are listed"
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def categories(self) -> list[dict[str, Any]]:
        if self.coco_names:
            return [dict(supercategory="shape", id=number, name=name) for number, name in COCO_NAMES.items()]
        return [dict(supercategory="shape", id=number, name=name) for name, number in CATEGORY_IDS.items()]

    def category_id(self, name: str) -> int:
        return CATEGORY_IDS[name]

    def add(self, split: str, index: int, scene: Scene) -> None:
        # As in COCO, no id occurs in both splits.
        image_id = 2 * index + 1 + _SPLITS[split]
        file = f"{image_id:012d}.jpg"
        self.save(scene.image, f"{split}2017", file)
        height, width = scene.owner.shape
        self.images.append(dict(id=image_id, file_name=file, height=height, width=width, license=1))
        for number, (name, crowd) in enumerate(zip(scene.classes, scene.crowd, strict=True), start=1):
            mask = scene.owner == number
            annotation = dict(
                id=2 * len(self.annotations) + 1 + _SPLITS[split],
                image_id=image_id,
                category_id=self.category_id(name),
                iscrowd=int(crowd),
                area=int(mask.sum()),
                bbox=mask_box(mask),
                segmentation=mask_runs(mask) if crowd else mask_polygons(mask),
            )
            if scene.keypoints:
                points = scene.keypoints[number - 1]
                annotation.update(num_keypoints=int((points[:, 2] > 0).sum()), keypoints=points.reshape(-1).tolist())
            self.annotations.append(annotation)

    def finish(self, split: str) -> None:
        content = dict(
            info=dict(description=f"Drawn shapes in the layout of {self.name}", version="1.0"),
            licenses=[dict(id=1, name="CC0 1.0", url="https://creativecommons.org/publicdomain/zero/1.0/")],
            categories=self.categories(),
            images=self.images,
            annotations=self.annotations,
        )
        file = self.folder / "annotations" / f"{self.kind}_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        self.images, self.annotations = [], []


class _CocoKeypoints(_Coco):
    name = "COCO (person keypoints)"
    content = _FIGURES_CONTENT
    classes = f"1: {PERSON} (category id)"
    layout = "{train2017,val2017}/*.jpg, annotations/person_keypoints_{train,val}2017.json"
    kind = "person_keypoints"
    draw = staticmethod(draw_figures)

    def categories(self) -> list[dict[str, Any]]:
        bones = [list(bone) for bone in SKELETON]
        return [dict(supercategory=PERSON, id=1, name=PERSON, keypoints=list(KEYPOINTS), skeleton=bones)]

    def category_id(self, name: str) -> int:
        return 1


_WRITERS: dict[str, type[_Writer]] = {
    "ade20k": _Ade20k, "cityscapes": _Cityscapes, "coco": _Coco, "coco-keypoints": _CocoKeypoints,
}  # fmt: skip
LAYOUTS = tuple(_WRITERS)


def write_shapes(
    out: str | os.PathLike,
    layout: str,
    *,
    train: int = SHAPES_TRAIN,
    val: int = SHAPES_VAL,
    size: int | None = None,
    seed: int = 0,
    coco_names: bool = False,
) -> bool:
    """Draw a small data set for semantic segmentation, detection or pose estimation.

    The whole folder appears at once, when everything has been written, with a README.txt that says what it holds.

    Args:
        out: Folder to create.
        layout: One of `LAYOUTS`.
        train: Number of training pictures.
        val: Number of validation pictures.
        size: Long side of the pictures in pixels (``cityscapes``: short side); default: `SHAPES_SIZE`.
        seed: 0 to 2**32 - 1; equal seeds give equal bytes.
        coco_names: Layout ``coco``: name the categories as COCO does and list all 80, so that a config for COCO runs
            on the folder as it is.

    Returns:
        True if the data was written, False if `out` holds the data of the same command already.

    Raises:
        PrepareError: A value out of range, or `out` is not empty, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    if layout not in _WRITERS:
        raise PrepareError(f"unknown layout {layout!r}.{suggest(layout, LAYOUTS) or ' Known: ' + ', '.join(LAYOUTS)}")
    size = SHAPES_SIZE[layout] if size is None else size
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, SMALLEST_SIZE)):
        if value < least:
            raise PrepareError(f"--{name} must be at least {least}, got {value}")
    if not 0 <= seed < 2**32:
        raise PrepareError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    if coco_names and layout != "coco":
        raise PrepareError(f"--coco-names belongs to --layout coco, got --layout {layout}")
    readme = _readme(_WRITERS[layout](out, size, coco_names), layout, train, val, seed)
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{str(out)!r} is a file; the shapes need a folder of their own")
    if out.is_dir() and any(out.iterdir()):
        if (out / "README.txt").is_file() and (out / "README.txt").read_bytes() == readme.encode():
            return False
        raise PrepareError(
            f"{str(out)!r} is not empty and holds something other than these shapes. Choose another folder, or remove"
            " this one; it is left as it is."
        )
    with replacing(out) as folder, progress_bar() as progress:
        writer = _WRITERS[layout](folder, size, coco_names)
        for split, count in (("train", train), ("val", val)):
            for index in progress.track(range(count), description=f"drawing {split}"):
                writer.add(split, index, writer.draw(seed, _SPLITS[split], index, writer.shape(index), size))
            writer.finish(split)
        (folder / "README.txt").write_bytes(readme.encode())
    return True


def _readme(writer: _Writer, layout: str, train: int, val: int, seed: int) -> str:
    flags = f"--layout {layout} --train {train} --val {val} --size {writer.size} --seed {seed}"
    if writer.coco_names:
        flags += " --coco-names"
    return _README.format(
        name=writer.name, content=writer.content, classes=writer.classes, layout=writer.layout, train=train, val=val,
        sizes=writer.sizes(), command=f"python tools/prepare_data.py shapes OUT {flags}",
    )  # fmt: skip

"""Arrow pointing: does the arrow point at the disc? A drawn task that asks for direction over a long range.

From "pLSTM: parallelizable Linear Source Transition Mark networks" (arXiv 2506.11997); geometry and random numbers are
those of https://github.com/ml-jku/arrow_pointing_dataset. Arrow and disc keep their size in pixels whatever the size of
the picture, so a model that has learned the direction at 192 x 192 can be asked about longer distances at 384 x 384.
"""

import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from vision_ssm.data.decode import load_image
from vision_ssm.data.randomness import seeded
from vision_ssm.data.transforms import Transform, build_transform
from vision_ssm.data.writing import replacing_file
from vision_ssm.registry import DATASETS, suggest

CLASSES = ("misses", "points")
"""Names of the labels 0 and 1."""
BORDER = 30
"""Pixels at every side that hold no centre."""
RADII = (15.0, 30.0)
LENGTHS, WIDTHS = (15, 30), (2, 4)
"""Ranges of the disc's radius, and of the arrow's length and line width, in pixels; the upper ends are excluded."""
INTERSECTION = 1.2
"""An arrow that points at the disc passes its centre within radius / 1.2; one that does not, beyond radius * 1.2."""
SMALLEST_SIZE = 2 * BORDER + 4 * int(RADII[1])


class Split(NamedTuple):
    """Number of pictures, their side in pixels, and the seed they are drawn from."""

    pictures: int
    size: int
    seed: int


SPLITS = {
    "train": Split(100_000, 192, 42),
    "val": Split(5_120, 192, 100_042),
    "val_384": Split(5_120, 384, 100_043),
    "test": Split(10_240, 192, 200_042),
    "test_384": Split(10_240, 384, 200_043),
}
"""The parts of the published task."""


@dataclass(frozen=True)
class ArrowScene:
    """What is in one picture; lengths in pixels, angles in radians, x to the right and y downwards.

    Attributes:
        label: 1 if the arrow points at the disc.
        arrow: centre (x, y) of the arrow.
        angle: direction of the arrow from the x axis towards the y axis.
        length, width: of the arrow and of its lines.
        disc: centre (x, y) of the disc.
        radius: of the disc.
    """

    label: int
    arrow: tuple[float, float]
    angle: float
    length: int
    width: int
    disc: tuple[float, float]
    radius: float


def arrow_scene(generator: np.random.Generator, size: int) -> ArrowScene:
    """Draw one scene from `generator` for a square picture of `size` pixels; the labels are equally probable."""
    label = int(generator.uniform(0, 1) < 0.5)
    length, width = int(generator.uniform(*LENGTHS)), int(generator.uniform(*WIDTHS))
    room = size - 2 * BORDER
    arrow_x, arrow_y = room * generator.random(), room * generator.random()
    radius = RADII[0] + (RADII[1] - RADII[0]) * generator.random()

    def away(start: float) -> float:
        """At least the disc's diameter from `start`, on a line whose ends are joined."""
        place = start + 2 * radius + (room - 4 * radius) * generator.random()
        return place - room if place > room else place

    disc_x, disc_y = away(arrow_x), away(arrow_y)
    dx, dy = disc_x - arrow_x, disc_y - arrow_y
    squared = dx**2 + dy**2
    bound = radius / INTERSECTION if label else radius * INTERSECTION
    half = math.acos(math.sqrt(abs((squared - bound**2) / squared)))  # half the angle that the bound is seen under
    span, start = (2 * half, -half) if label else (2 * math.pi - 2 * half, half)
    angle = math.atan2(dy, dx) + generator.random() * span + start
    return ArrowScene(
        label=label, arrow=(arrow_x + BORDER, arrow_y + BORDER), angle=angle, length=length, width=width,
        disc=(disc_x + BORDER, disc_y + BORDER), radius=radius,
    )  # fmt: skip


def draw_arrow(scene: ArrowScene, size: int) -> Image.Image:
    """The scene in black on white: an 8-bit grey picture of `size` x `size` pixels, without half-tones."""
    picture = Image.new("L", (size, size), 255)
    draw = ImageDraw.Draw(picture)
    (x, y), half = scene.arrow, scene.length // 2
    along = math.cos(scene.angle), math.sin(scene.angle)
    tip = x + half * along[0], y + half * along[1]
    strokes = [(x - half * along[0], y - half * along[1])]
    for turn in (-0.5, 0.5):
        side = scene.length // 2.5
        strokes.append((tip[0] - side * math.cos(scene.angle + turn), tip[1] - side * math.sin(scene.angle + turn)))
    for start in strokes:
        draw.line([start, tip], fill=0, width=scene.width)
    (x, y), radius = scene.disc, scene.radius
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=0)
    return picture


@DATASETS.register_module()
class ArrowPointing(Dataset):
    """Pictures of an arrow and a disc, drawn when they are asked for.

    Picture i follows from the seed and i alone, so neither the order of access nor the number of workers matters.
    Samples are those of `ImageFolder`: dict(image=float tensor (3, H, W), label=int, path=str). Without `root` the path
    is a name that no file has; `picture_of` draws the picture of such a name.

    Args:
        split: One of `SPLITS`, which gives the defaults of `count`, `size` and `seed`. The published runs draw their
            training pictures from the seed of the run.
        transform: Callable from an RGB image to a float tensor, or keywords of `build_transform` (``input_size`` is
            that of the pictures, which are never resized). None: pixels in [0, 1].
        root: Folder that keeps every picture once drawn, as ``root/SPLIT/CLASS/NUMBER.png``, and where pictures are
            looked for before they are drawn. ``tools/prepare_data.py arrows`` fills one.
        count: Number of pictures.
        size: Side of a picture in pixels, at least `SMALLEST_SIZE`.
        seed: Non-negative.

    Attributes:
        metainfo: dict(classes=...), for mmengine.

    Raises:
        ValueError: Unknown split, or a value out of range. NotADirectoryError: `root` is a file.
    """

    channels = 3
    keeps_size = True
    """Whether another size of a picture would change what it shows."""

    def __init__(
        self,
        split: str = "train",
        transform: Transform | Mapping[str, Any] | None = None,
        root: str | os.PathLike | None = None,
        *,
        count: int | None = None,
        size: int | None = None,
        seed: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of the arrow-pointing task.{suggest(str(split), SPLITS)}")
        given = dict(pictures=count, size=size, seed=seed)
        for name, value in (("count", count), ("size", size), ("seed", seed)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        own = SPLITS[split]._replace(**{name: value for name, value in given.items() if value is not None})
        limits = ("count", own.pictures, 1), ("size", own.size, SMALLEST_SIZE), ("seed", own.seed, 0)
        for name, number, least in limits:
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        self.split, self.size, self.seed = split, own.size, own.seed
        self._count = own.pictures
        self.transform = self._built(transform)
        published = own[1:] == SPLITS[split][1:]
        self.name = split if published else f"{split}_size{own.size}_seed{own.seed}"
        self.root = None if root is None else Path(root).expanduser()
        if self.root is not None and self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"root {str(self.root)!r} is a file; the pictures need a folder")
        self._base = int(np.random.default_rng(own.seed).integers(1 << 62))

    def _built(self, transform: Transform | Mapping[str, Any] | None) -> Transform:
        if transform is None:
            return to_tensor
        if not isinstance(transform, Mapping):
            return transform
        options = dict(transform)
        if options.setdefault("input_size", self.size) != self.size:
            raise ValueError(
                f"the transform resizes to input_size={options['input_size']}, the pictures are {self.size} pixels"
                " wide and are not to be resized: write size=... in the dataset, and leave input_size out"
            )
        if options.setdefault("channels", self.channels) != self.channels:
            raise ValueError(f"the pictures are RGB (3 channels), the transform is for {options['channels']}")
        return build_transform(**options)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""
        return CLASSES

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(classes=CLASSES)

    def check_num_classes(self, num_classes: int) -> None:
        """Check that every label fits a model with `num_classes` outputs; `ValueError` if not."""
        if num_classes < len(CLASSES):
            raise ValueError(
                f"the arrow-pointing task has the classes {', '.join(CLASSES)}, the model has num_classes="
                f"{num_classes}. Set num_classes={len(CLASSES)}."
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"ArrowPointing({self.name!r}, {len(self)} pictures of {self.size} x {self.size})"

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range for {len(self)} pictures")
        return position % len(self)

    def scene(self, index: int) -> ArrowScene:
        """What is in picture `index`."""
        return arrow_scene(np.random.default_rng(self._base + self._position(index)), self.size)

    def path(self, index: int) -> str:
        """Name of picture `index`, ``SPLIT/CLASS/NUMBER.png``, below `root` where there is one."""
        return self._path(self._position(index), self.scene(index))

    def _path(self, position: int, scene: ArrowScene) -> str:
        return os.path.join(self.root or "", self.name, CLASSES[scene.label], f"{position:06d}.png")

    def picture(self, index: int) -> Image.Image:
        """Picture `index` in RGB, from `root` or drawn (and then kept in `root`).

        Raises:
            UnreadableImageError: The file in `root` is damaged. ValueError: It is of another size.
            PrepareError: `root` cannot be written.
        """
        return self._picture(self._position(index), self.scene(index))

    def _picture(self, position: int, scene: ArrowScene) -> Image.Image:
        if self.root is None:
            return draw_arrow(scene, self.size).convert("RGB")
        path = self._kept(position, scene)
        picture = load_image(path)
        if picture.size != (self.size, self.size):
            raise ValueError(
                f"{str(path)!r} is {picture.height} x {picture.width} pixels instead of {self.size} x {self.size}:"
                " it was not drawn for this task; remove it or choose another root"
            )
        return picture

    def _kept(self, position: int, scene: ArrowScene) -> Path:
        path = Path(self._path(position, scene))
        if not path.is_file():
            with replacing_file(path) as temporary:
                draw_arrow(scene, self.size).save(temporary)
        return path

    def keep(self, index: int) -> Path:
        """The file of picture `index` in `root`, drawn if it is not there.

        Raises:
            ValueError: There is no `root`. PrepareError: It cannot be written.
        """
        if self.root is None:
            raise ValueError("without a root no picture is kept: ArrowPointing(..., root=FOLDER)")
        return self._kept(self._position(index), self.scene(index))

    def picture_of(self, path: str | os.PathLike) -> Image.Image:
        """The picture whose sample has this `path`."""
        return self.picture(int(Path(path).stem))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`: dict(image=float tensor (3, H, W), label=int, path=str).

        If `index` is a `Draw`, the transform is seeded from its coordinates.

        Raises:
            IndexError: Out of range. Otherwise as `picture`.
        """
        position = self._position(index)
        scene = self.scene(position)
        picture = self._picture(position, scene)
        coordinates = getattr(index, "coordinates", None)
        if coordinates is None:
            image = self.transform(picture)
        else:
            with seeded(*coordinates):
                image = self.transform(picture)
        return dict(image=image, label=scene.label, path=self._path(position, scene))

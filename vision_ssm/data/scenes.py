"""Small drawn pictures for trying dense prediction: textured shapes, or articulated figures, on textured ground.

Everything is drawn from signed distances with painter's order, so each picture comes with the exact visible mask of
every instance. A class has its own outline and its own family of texture; colours, size, rotation, place, light and
noise are free. Some thin wires belong to no class. All random numbers come from `numpy.random.RandomState`, whose
stream never changes between numpy versions: seed, split and index fix a picture to the byte.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

SHAPES = ("cross", "disc", "square", "triangle", "ring", "star")
GROUND = 0
UNLABELLED = -1
CROWD_EVERY, CROWD_AT = 16, 5
EMPTY_EVERY, EMPTY_AT = 25, 9
_LEAST_VISIBLE = 0.45  # of an instance, whatever is drawn over it later
_TRIES = 12


@dataclass
class Part:
    """A piece to be painted: a window of the picture and, over it, distance to the outline and colour.

    Attributes:
        window: Slices of rows and columns.
        distance: (h, w) pixels, negative inside.
        colour: (h, w, 3) or (3,), 0 to 1.
    """

    window: tuple[slice, slice]
    distance: np.ndarray
    colour: np.ndarray


@dataclass
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (H, W, 3) uint8.
        owner: (H, W) int16: `GROUND`, `UNLABELLED`, or k + 1 where instance k is visible.
        classes: Name of each instance's class.
        crowd: Whether the instance is a group whose members are not told apart.
        keypoints: (17, 3) int64 of x, y (pixel centres at whole numbers) and COCO's visibility, one per instance;
            empty for shapes.
    """

    image: np.ndarray
    owner: np.ndarray
    classes: list[str] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    keypoints: list[np.ndarray] = field(default_factory=list)


def smooth_noise(random: np.random.RandomState, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Value noise, (H, W) float in about 0 to 1, with features of `cell` pixels."""
    coarse = random.rand(*(int(np.ceil(side / cell)) + 2 for side in shape)).astype(np.float32)
    fine = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(fine, dtype=np.float64)


def vivid(random: np.random.RandomState) -> np.ndarray:
    """A saturated colour, (3,) from 0 to 1."""
    return np.array(colorsys.hsv_to_rgb(random.rand(), random.uniform(0.55, 1.0), random.uniform(0.55, 1.0)))


def contrasting(random: np.random.RandomState, *others: np.ndarray, least: float = 0.4) -> np.ndarray:
    """A saturated colour at least `least` away (Euclidean) from each of `others`, or the farthest of many tried."""
    best, gap = vivid(random), -1.0
    for _ in range(40):
        colour = vivid(random)
        distance = min(float(np.linalg.norm(colour - other)) for other in others)
        if distance > gap:
            best, gap = colour, distance
        if gap >= least:
            break
    return best


def _wave(phase: np.ndarray) -> np.ndarray:
    """A square wave of period 1 with soft edges, 0 to 1."""
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * phase), 0, 1)


def _regular(u: np.ndarray, v: np.ndarray, corners: int, inner: float) -> np.ndarray:
    """Distance to a star with tips at radius 1 and notches at `inner`; `inner` = cos(pi / corners) makes a polygon."""
    half = np.pi / corners
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    edge = np.array([inner * np.cos(half) - 1, inner * np.sin(half)])
    return ((x - 1) * edge[1] - y * edge[0]) / np.hypot(*edge)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


# Distance to the outline of each shape, in units of its radius, u to the right and v down.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.36), _box(u, v, 0.36, 1.0)),
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: 1.12 * _regular(u / 1.12, v / 1.12, 3, 0.5),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.74) - 0.26,
    "star": lambda u, v: _regular(u, v, 5, 0.45),
}


def _second_colour(kind: str, random: np.random.RandomState, first: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """The other colour of a shape's texture; what it is to the first belongs to the class, so that little is enough."""
    if kind == "cross":
        return np.full(3, 0.97)
    if kind == "disc":
        return np.full(3, 0.05)
    if kind == "square":
        return 0.45 * first
    if kind == "star":
        return 0.4 * first + 0.6
    return contrasting(random, first, ground)


def _pattern(kind: str, random: np.random.RandomState, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """How much of the second colour each pixel has, (h, w) from 0 to 1; `u`, `v` in pixels along the shape's axes."""
    u, v = u / period + random.rand(), v / period + random.rand()
    if kind == "cross":  # stripes
        return _wave(u)
    if kind == "disc":  # dots
        return np.clip(2.5 - 6 * np.hypot(u % 1 - 0.5, v % 1 - 0.5), 0, 1)
    if kind == "square":  # checker
        return np.abs(_wave(u) - _wave(v))
    if kind == "triangle":  # chevrons
        return _wave(v + np.abs(u % 2 - 1))
    if kind == "ring":  # one colour that fades into the other across the shape
        return np.clip(0.5 + 0.18 * (v - v.mean()), 0, 1)
    return np.clip(3 * smooth_noise(random, u.shape, 0.45 * period) - 1, 0, 1)  # star: blotches


class Canvas:
    """A picture in the making.

    Args:
        random: Source of random numbers.
        shape: (height, width) in pixels.
        unit: Side in pixels that all sizes of things refer to.
    """

    def __init__(self, random: np.random.RandomState, shape: tuple[int, int], unit: int) -> None:
        self.random, self.shape, self.unit = random, shape, unit
        hue, value = random.rand(), random.uniform(0.35, 0.75)
        self.ground = np.array(colorsys.hsv_to_rgb(hue, random.uniform(0.05, 0.35), value))
        relief = 0.6 * smooth_noise(random, shape, unit / 6) + 0.4 * smooth_noise(random, shape, unit / 40)
        self.image = self.ground * (0.7 + 0.6 * relief[..., None])  # (H, W, 3)
        self.owner = np.full(shape, GROUND, dtype=np.int16)
        angle = random.uniform(0, 2 * np.pi)
        self._light = np.array([np.cos(angle), np.sin(angle)])
        self._areas: dict[int, int] = {}

    def window(self, centre: np.ndarray, reach: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """The part of the picture within `reach` pixels of a point (x, y), with each pixel's offset from it."""
        x, y = centre.tolist()
        height, width = self.shape
        top, bottom = (int(np.clip(np.floor(y + sign * reach + (sign > 0)), 0, height)) for sign in (-1, 1))
        left, right = (int(np.clip(np.floor(x + sign * reach + (sign > 0)), 0, width)) for sign in (-1, 1))
        rows, columns = np.mgrid[top:bottom, left:right]
        return (slice(top, bottom), slice(left, right)), columns - x, rows - y

    def mask(self, parts: list[Part]) -> np.ndarray:
        """(H, W) bool: what the parts cover."""
        covered = np.zeros(self.shape, dtype=bool)
        for part in parts:
            covered[part.window] |= part.distance < 0
        return covered

    def fits(self, mask: np.ndarray, least: float = _LEAST_VISIBLE) -> bool:
        """Whether of every instance painted so far at least the part `least` stays visible under `mask`."""
        if not mask.any():
            return False
        visible = np.bincount(np.maximum(self.owner[~mask], 0), minlength=max(self._areas, default=0) + 1)
        return all(visible[owner] > least * area for owner, area in self._areas.items())

    def paint(self, parts: list[Part], owner: int, shadow: bool = True) -> None:
        """Draw the parts over what is there, the last one on top, with a soft shadow on what lies below."""
        mask = self.mask(parts)
        if shadow:
            self._shade(mask)
        for part in parts:
            cover = np.clip(0.5 - part.distance, 0, 1)[..., None]
            self.image[part.window] = (1 - cover) * self.image[part.window] + cover * part.colour
        self.owner[mask] = owner
        if owner > 0:
            self._areas[owner] = int((self.owner == owner).sum())

    def _shade(self, mask: np.ndarray) -> None:
        blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(self.unit / 50))
        offset = np.rint(self._light * self.unit / 45).astype(int)
        moved = Image.new("L", blurred.size)
        moved.paste(blurred, tuple(offset.tolist()))
        self.image *= 1 - 0.45 * np.asarray(moved, dtype=np.float64)[..., None] / 255

    def finish(self) -> np.ndarray:
        """The picture under a slanting light with a camera's noise, (H, W, 3) uint8."""
        height, width = self.shape
        rows, columns = np.mgrid[:height, :width]
        along = (columns / width - 0.5) * self._light[0] + (rows / height - 0.5) * self._light[1]
        lit = self.image * (1 - 0.35 * along)[..., None] + self.random.normal(0, 0.02, (*self.shape, 3))
        return np.rint(255 * np.clip(lit, 0, 1)).astype(np.uint8)


def shape_part(canvas: Canvas, kind: str, centre: np.ndarray, radius: float) -> Part:
    """One shape of class `kind` with random colours, rotation and texture; `centre` (x, y) and `radius` in pixels."""
    random = canvas.random
    turn = random.uniform(0, 2 * np.pi)
    first = contrasting(random, canvas.ground)
    second = _second_colour(kind, random, first, canvas.ground)
    window, dx, dy = canvas.window(centre, 1.15 * radius + 1)
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    distance = radius * OUTLINES[kind](u / radius, v / radius)
    period = max(random.uniform(0.35, 0.5) * radius, 4.5)
    weight = _pattern(kind, random, u, v, period)[..., None]
    colour = (1 - weight) * first + weight * second
    rim = 1 - 0.3 * np.exp(np.minimum(distance, 0) / (0.08 * radius))  # darker towards the edge, as if rounded
    return Part(window, distance, colour * rim[..., None])


def wire_part(canvas: Canvas) -> Part:
    """A thin straight thing of no class, across a good part of the picture."""
    random = canvas.random
    height, width = canvas.shape
    start, end = random.uniform(0, 1, (2, 2)) * (width - 1, height - 1)
    window, x, y = canvas.window(np.zeros(2), max(height, width))
    distance, _, _ = capsule(np.stack([x, y], -1), start, end, random.uniform(0.008, 0.014) * canvas.unit)
    return Part(window, distance, np.full(3, random.choice([0.08, 0.92])))


def capsule(
    point: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to a rounded bar, and coordinates along it (from `start`) and across it, all (h, w) in pixels."""
    axis = end - start
    length = max(float(np.hypot(*axis)), 1e-6)
    axis = axis / length
    along = (point - start) @ axis
    across = (point - start) @ np.array([-axis[1], axis[0]])
    return np.hypot(along - np.clip(along, 0, length), across) - half_width, along, across


def _place_shape(canvas: Canvas, kind: str, owner: int) -> bool:
    """Paint one shape where it leaves the others visible; False if no such place was found."""
    height, width = canvas.shape
    for _ in range(_TRIES):
        radius = canvas.random.uniform(0.15, 0.27) * canvas.unit
        centre = canvas.random.uniform(0.4 * radius, np.array([width, height]) - 0.4 * radius)
        parts = [shape_part(canvas, kind, centre, radius)]
        if canvas.fits(canvas.mask(parts)):
            canvas.paint(parts, owner)
            return True
    return False


def _place_crowd(canvas: Canvas, kind: str, owner: int) -> None:
    """Many small shapes of one class close together."""
    height, width = canvas.shape
    centre = canvas.random.uniform(0.3, 0.7, 2) * (width, height)
    for _ in range(12):
        place = centre + canvas.random.normal(0, 0.11 * canvas.unit, 2)
        part = shape_part(canvas, kind, place, canvas.random.uniform(0.05, 0.075) * canvas.unit)
        canvas.paint([part], owner)


def blank(seed: int, split: int, index: int, shape: tuple[int, int], unit: int) -> Canvas:
    """An empty picture whose random numbers depend on the three numbers alone."""
    return Canvas(np.random.RandomState([seed, split, index]), shape, unit)


def is_empty(index: int) -> bool:
    """Whether a picture shows nothing that belongs to a class."""
    return index % EMPTY_EVERY == EMPTY_AT


def has_crowd(index: int) -> bool:
    """Whether a picture holds a crowd."""
    return index % CROWD_EVERY == CROWD_AT and not is_empty(index)


def draw_shapes(seed: int, split: int, index: int, shape: tuple[int, int], unit: int) -> Scene:
    """A picture of several shapes.

    Args:
        seed: Of the data set, 0 to 2**32 - 1.
        split: Number of the split.
        index: Number of the picture in its split; see `is_empty` and `has_crowd`.
        shape: (height, width) in pixels.
        unit: Side in pixels that sizes refer to: shapes have radii of 0.15 to 0.27 of it.
    """
    canvas = blank(seed, split, index, shape, unit)
    random = canvas.random
    kinds: list[str] = []
    crowd: list[bool] = []
    count = 0 if is_empty(index) else round(random.uniform(2.5, 6.0) * shape[0] * shape[1] / unit**2)
    # A shuffled pack: no class is rarer than another.
    pack = [str(kind) for _ in range(count // len(SHAPES) + 2) for kind in random.permutation(SHAPES)]
    if has_crowd(index):
        _place_crowd(canvas, pack[-1], 1)
        kinds, crowd = [pack[-1]], [True]
    wires = random.randint(1, 3) if random.rand() < 0.3 else 0
    for number in range(max(count, 1)):
        if number < count and _place_shape(canvas, pack[number], len(kinds) + 1):
            kinds.append(pack[number])
            crowd.append(False)
        if wires and (random.rand() < 0.4 or number >= count - 1):
            wires -= 1
            wire = [wire_part(canvas)]
            if canvas.fits(canvas.mask(wire)):
                canvas.paint(wire, UNLABELLED)
    return Scene(canvas.finish(), canvas.owner, kinds, crowd)

"""Drawn abdomens: CT-like volumes with touching organs and exact label maps, for trying medical segmentation.

A body of fat, muscle and spine holds five organs of different size, shape and intensity that touch each other, and
things of similar intensity that are no organ (bowel, vena cava, vertebrae). Soft boundaries come from the point-spread
function of a scanner and from thick slices; a smooth field and noise are added; the slices at both ends hold no organ.
All random numbers come from `numpy.random.RandomState`, seeded by (seed, case): a case is the same whoever draws it.
"""

from dataclasses import dataclass

import numpy as np

from vision_ssm.data.medical_base import ORGANS_CLASSES
from vision_ssm.data.medical_volume import optional

_LABELS = {name: label for label, name in enumerate(ORGANS_CLASSES)}
_AIR, _FAT, _MUSCLE, _BONE = -1000.0, -100.0, 50.0, 350.0
_LUNG = -800.0
_THIN = 3  # slices drawn for each stored one: their mean is its image, the middle one its labels
_END = 0.1  # of the slices at either end are without organs, at least 2
SMALLEST_DEPTH, SMALLEST_SIZE = 8, 32


@dataclass
class DrawnVolume:
    """A drawn case.

    Attributes:
        image: (D, H, W) int16, Hounsfield units; D runs from inferior to superior, H to posterior, W to left.
        labels: (D, H, W) uint8, indices into `ORGANS_CLASSES`.
        spacing: Millimetres along D, H, W.
    """

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


class _Drawing:
    """Painter's order in body coordinates: x to the left and y to posterior, both from -1 to 1, z up from 0 to 1."""

    def __init__(self, random: np.random.RandomState, depth: int, size: int, end: float) -> None:
        self.random = random
        self.shape = (depth, size, size)
        z, y, x = np.meshgrid(
            (np.arange(depth, dtype=np.float32) + 0.5) / depth, *[(np.arange(size) * 2 + 1) / size - 1] * 2,
            indexing="ij", sparse=True,
        )  # fmt: skip
        angle, scale = np.radians(random.uniform(-7, 7)), random.uniform(0.9, 1.08)
        y, x = y - random.uniform(-0.06, 0.06), x - random.uniform(-0.05, 0.05)
        self.x = ((x * np.cos(angle) + y * np.sin(angle)) / scale).astype(np.float32)  # (1, H, W)
        self.y = ((y * np.cos(angle) - x * np.sin(angle)) / scale).astype(np.float32)
        self.z = z.astype(np.float32)  # (D, 1, 1)
        self.image = np.full(self.shape, _AIR, dtype=np.float32)
        self.labels = np.zeros(self.shape, dtype=np.uint8)
        self.inside = (self.z > end) & (self.z < 1 - end)

    def noise(self, cells: tuple[float, float, float]) -> np.ndarray:
        """Smooth noise (D, H, W) float32 of zero mean, deviation about 1, with `cells` features along each axis."""
        coarse = self.random.standard_normal([int(np.ceil(count)) + 3 for count in cells]).astype(np.float32)
        axes = [np.linspace(0.5, count + 0.5, side) for count, side in zip(cells, self.shape)]
        for axis, places in enumerate(axes):  # one axis after the other: interpolation separates
            low = np.minimum(places.astype(int), coarse.shape[axis] - 2)
            part = (places - low).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
            part = part * part * (3 - 2 * part)
            coarse = np.take(coarse, low, axis) * (1 - part) + np.take(coarse, low + 1, axis) * part
        return coarse * np.float32(1.8)  # interpolation averages neighbours

    def ellipsoid(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], tilt: float = 0.0,
        bumps: float = 0.12, wander: float = 0.03,
    ) -> np.ndarray:
        """(D, H, W): below 0 inside a deformed ellipsoid at `centre` (x, y, z), turned by `tilt` radians about z."""
        cx, cy, cz = (value + self.random.uniform(-wander, wander) for value in centre)
        rx, ry, rz = (value * self.random.uniform(0.88, 1.12) for value in radii)
        cos, sin = np.cos(tilt), np.sin(tilt)
        dx, dy = self.x - np.float32(cx), self.y - np.float32(cy)
        across, along = (dx * cos + dy * sin) / rx, (dy * cos - dx * sin) / ry
        field = np.sqrt(across**2 + along**2 + ((self.z - np.float32(cz)) / rz) ** 2) - 1
        return field + np.float32(bumps) * self.noise((4, 7, 7)) if bumps else field

    def paint(self, where: np.ndarray, value: float | np.ndarray, label: int = 0) -> None:
        """Cover the voxels `where` (D, H, W) bool."""
        self.image = np.where(where, np.float32(value) if np.isscalar(value) else value, self.image)
        self.labels[where] = label

    def organ(self, where: np.ndarray, name: str, value: float, texture: float) -> None:
        """An organ of mean `value` HU, as far as it lies in the cavity and away from the ends of the volume."""
        where = where & self.inside
        self.paint(where, value + texture * self.noise((6, 14, 14)), _LABELS[name])


def draw_organs(seed: int, case: int, depth: int = 24, size: int = 96) -> DrawnVolume:
    """Draw one case.

    Args:
        seed: 0 to 2**32 - 1.
        case: Number of the case; equal (seed, case) give equal voxels.
        depth: Slices.
        size: Rows and columns.

    Raises:
        ValueError: Fewer than 8 slices, or fewer than 32 rows and columns.
    """
    if depth < SMALLEST_DEPTH or size < SMALLEST_SIZE:
        raise ValueError(
            f"a volume has at least {SMALLEST_DEPTH} slices of {SMALLEST_SIZE} rows, got {depth} of {size}"
        )
    random = np.random.RandomState([seed, case])
    ends = max(2, round(_END * depth))
    drawing = _Drawing(random, depth * _THIN, size, ends / depth)
    _draw_body(drawing, (ends - 1) / depth)
    _draw_organs(drawing)
    gaussian = optional("scipy.ndimage").gaussian_filter
    sharp = size / 96
    image = gaussian(drawing.image, (0.8, 0.75 * sharp, 0.75 * sharp))
    image = image.reshape(depth, _THIN, size, size).mean(1)  # (3 D, H, W) -> (D, H, W)
    drawing.shape = (depth, size, size)
    image += 14 * drawing.noise((1, 2, 2)) * (image > -500)
    grain = random.standard_normal(image.shape).astype(np.float32)
    grain = gaussian(grain, (0, 0.6 * sharp, 0.6 * sharp))
    image += random.uniform(14, 26) / grain.std() * grain
    labels = drawing.labels[_THIN // 2:: _THIN]
    pixel = random.uniform(330, 400) / size
    spacing = (float(random.choice([3.0, 4.0, 5.0])) * 24 / depth, pixel, pixel)
    return DrawnVolume(
        np.clip(np.rint(image), -1024, 3071).astype(np.int16), np.ascontiguousarray(labels), spacing
    )


def _draw_body(drawing: _Drawing, end: float) -> None:
    random = drawing.random
    width, height = random.uniform(0.82, 0.92), random.uniform(0.6, 0.72)
    fat = random.uniform(0.86, 0.95)
    outline = np.abs(drawing.x / width) ** 2.3 + np.abs(drawing.y / height) ** 2.3
    outline = outline + np.float32(0.05) * drawing.noise((2, 3, 3))
    drawing.paint(outline < 1, _FAT)
    drawing.paint(outline < fat**2.3, _MUSCLE)
    drawing.paint(outline < (fat - 0.07) ** 2.3, _FAT + 20)
    # bowel: blobs of soft tissue, some of them with gas, all through the abdomen
    loops = drawing.noise((7, 11, 11))
    hollow = outline < (fat - 0.1) ** 2.3
    drawing.inside = drawing.inside & (outline < (fat - 0.05) ** 2.3)
    drawing.paint((loops > 0.35) & hollow, 25 + 18 * drawing.noise((7, 16, 16)))
    drawing.paint((loops > 1.9) & hollow & (drawing.y < 0), -700)
    table = (drawing.y > 0.8) & (drawing.y < 0.83)
    drawing.paint(np.broadcast_to(table, drawing.shape), -300)
    # lungs above, muscle of the pelvis below
    drawing.paint((drawing.z > 1 - end) & hollow & (np.abs(drawing.x) > 0.18), _LUNG)
    drawing.paint((drawing.z < end) & hollow & (np.abs(drawing.x) > 0.3), _MUSCLE + 15)
    spine = drawing.ellipsoid((0, 0.42, 0.5), (0.14, 0.13, 9), bumps=0.08, wander=0.01)
    drawing.paint(spine < 0, _BONE - 180)
    drawing.paint((spine < 0) & (spine > -0.25), _BONE)
    canal = drawing.ellipsoid((0, 0.52, 0.5), (0.05, 0.04, 9), bumps=0, wander=0.005)
    drawing.paint(canal < 0, 20)


def _draw_organs(drawing: _Drawing) -> None:
    random = drawing.random
    contrast = random.uniform(-15, 20)  # how much contrast medium there is
    liver = drawing.ellipsoid((-0.4, -0.06, 0.6), (0.36, 0.38, 0.33), tilt=-0.35, bumps=0.13)
    lobe = drawing.ellipsoid((-0.02, -0.28, 0.66), (0.28, 0.15, 0.18), tilt=0.2)
    drawing.organ(np.minimum(liver, lobe) < 0, "liver", 105 + contrast + random.uniform(-8, 8), 7)
    for _ in range(random.randint(0, 3)):  # cysts stay part of the liver
        place = (random.uniform(-0.55, -0.2), random.uniform(-0.2, 0.15), random.uniform(0.5, 0.7))
        side = random.uniform(0.04, 0.08)
        cyst = (drawing.ellipsoid(place, (side, side, side)) < 0) & (drawing.labels == _LABELS["liver"])
        drawing.paint(cyst, 25, _LABELS["liver"])
    if random.rand() < 0.7:  # a gall bladder, which is no class
        drawing.paint((drawing.ellipsoid((-0.22, -0.2, 0.45), (0.08, 0.11, 0.1)) < 0) & drawing.inside, 8)
    spleen = drawing.ellipsoid((0.55, 0.14, 0.66), (0.15, 0.26, 0.22), tilt=0.3)
    drawing.organ(spleen < 0, "spleen", 122 + contrast + random.uniform(-8, 8), 6)
    stomach = drawing.ellipsoid((0.3, -0.24, 0.66), (0.28, 0.2, 0.22), tilt=0.5, bumps=0.2, wander=0.05)
    drawing.organ(stomach < 0, "stomach", random.uniform(15, 65), 12)
    wall = (stomach < 0) & (stomach > -0.16) & drawing.inside
    drawing.paint(wall, 70 + contrast / 2, _LABELS["stomach"])
    level = random.uniform(-0.45, -0.25)  # gas lies in front of what lies in the stomach
    drawing.paint((stomach < -0.16) & drawing.inside & (drawing.y < level), -850, _LABELS["stomach"])
    for side in (-1, 1):
        kidney = drawing.ellipsoid((side * 0.4, 0.3, 0.4), (0.13, 0.17, 0.24), tilt=side * 0.5, bumps=0.1)
        drawing.organ(kidney < 0, "kidney", 165 + 1.5 * contrast, 8)
        drawing.paint((kidney < -0.5) & drawing.inside, 120 + contrast, _LABELS["kidney"])
        pelvis = drawing.ellipsoid((side * 0.3, 0.26, 0.4), (0.07, 0.06, 0.09), bumps=0.1)
        drawing.paint((pelvis < 0) & drawing.inside, -70)
    bend = np.float32(0.04) * np.sin(2 * np.pi * (drawing.z * random.uniform(0.5, 1) + random.rand()))
    for name, centre, width, value in (("", -0.09, 0.06, 130.0), ("aorta", 0.08, 0.065, 190.0)):
        distance = np.hypot(drawing.x - centre - bend.astype(np.float32), drawing.y - 0.23)
        tube = (distance < width * random.uniform(0.9, 1.2)) & drawing.inside
        value = value + contrast * 2
        if name:
            drawing.organ(tube, name, value, 5)
        else:  # the vena cava is no class
            drawing.paint(tube, value)

"""Drawn dermoscopy: skin lesions with exact masks, in the layout of ISIC 2017 and 2018 as VM-UNet uses it.

Skin of many tones with creases, hairs, gel bubbles and vignetting; lesions of varied colour, with an irregular and more
or less soft border and a pigment network, dots or pale areas inside. Every sixth is hardly darker than its skin. All
random numbers come from `numpy.random.RandomState`, seeded by (seed, split, index).
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from vision_ssm.data.organ_layouts import already_there
from vision_ssm.data.progress import tracked_map
from vision_ssm.data.scenes import smooth_noise
from vision_ssm.data.writing import PrepareError, replacing

LESIONS_TRAIN, LESIONS_VAL, LESIONS_SIZE = 140, 60, 128
SMALLEST_SIZE = 32
FAINT_EVERY, FAINT_AT = 6, 3
_SPLITS = {"train": 0, "val": 1}
_OVERVIEW = 8
_SKIN = ((0.91, 0.73, 0.65), (0.85, 0.66, 0.55), (0.72, 0.53, 0.42), (0.52, 0.36, 0.27))
_LESIONS = ((0.42, 0.26, 0.17), (0.24, 0.15, 0.12), (0.62, 0.30, 0.26), (0.33, 0.30, 0.34), (0.50, 0.36, 0.22))
_README = """\
Lesions: drawn dermoscopy in the layout of ISIC 2017 and 2018 (VM-UNet's form)

One lesion in each picture, on skin with hairs, creases, bubbles and vignetting. Every sixth is hardly darker than its
skin. They show whether a method works, not how well it works on patients.

Classes:  mask value 0: background, 255: lesion
Layout:   {{train,val}}/images/*.png, {{train,val}}/masks/*.png
Pictures: {train} training and {val} validation, {size} x {size} pixels.
Picture:  overview.png, some pictures above their masks.
Licence:  drawn by a program; no rights are claimed in the pictures (CC0 1.0).
Made by:  python tools/prepare_data.py lesions OUT --train {train} --val {val} --size {size} --seed {seed}
          The same command writes the same pixels with the same versions of NumPy and Pillow.
"""


def draw_lesion(seed: int, split: int, index: int, size: int = LESIONS_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture.

    Args:
        seed: 0 to 2**32 - 1.
        split: 0 for training, 1 for validation.
        index: Number of the picture; equal (seed, split, index) give equal pixels.
        size: Rows and columns.

    Returns:
        (H, W, 3) uint8 image, and (H, W) bool mask.
    """
    random = np.random.RandomState([seed, split, index])
    y, x = np.meshgrid(*[(np.arange(size) * 2 + 1) / size - 1] * 2, indexing="ij")
    skin = _mixed(random, _SKIN)
    image = skin * (1 + 0.09 * (_noise(random, size, 3) + 0.5 * _noise(random, size, 24)))[..., None]
    creases = np.abs(_noise(random, size, 9))  # thin lines where smooth noise passes zero
    image *= (1 - 0.12 * np.clip(1 - creases / 0.15, 0, 1))[..., None]
    image += 0.05 * np.clip(_noise(random, size, 3), 0, None)[..., None] * np.array([1.0, -0.2, -0.2])  # redness
    distance = _outline(random, x, y)
    faint = index % FAINT_EVERY == FAINT_AT
    colour = skin * random.uniform(0.78, 0.86) if faint else _mixed(random, _LESIONS)
    # skin tone shines through, so a lesion is darker on dark skin than on fair skin
    if not faint:
        colour = colour * min(1.0, float(skin.mean() / colour.mean()) * random.uniform(0.6, 0.75))
    image = _pigmented(random, image, distance, colour, faint)
    for _ in range(random.choice([0, 0, 4, 10, 25])):
        _hair(random, image, x, y)
    for _ in range(random.randint(0, 5)):
        centre, radius = random.uniform(-0.9, 0.9, 2), random.uniform(0.02, 0.07)
        ring = np.abs(np.hypot(x - centre[0], y - centre[1]) - radius)
        image += 0.35 * np.exp(-((ring / 0.012) ** 2))[..., None]
    edge = np.hypot(x, y)
    image *= (1 - random.uniform(0.05, 0.35) * np.clip(edge - 0.5, 0, None) ** 1.5)[..., None]
    if random.rand() < 0.25:  # the black rim of the lens
        image *= np.clip((random.uniform(1.12, 1.3) - edge) / 0.03, 0, 1)[..., None]
    image *= random.uniform(0.85, 1.1) * random.uniform(0.96, 1.04, 3)
    image += random.normal(0, 0.012, image.shape)
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8), distance < 0


def _noise(random: np.random.RandomState, size: int, cells: int) -> np.ndarray:
    """(H, W) smooth noise, about -1 to 1, with `cells` features along a side."""
    return 2 * smooth_noise(random, (size, size), size / min(cells, size)) - 1


def _mixed(random: np.random.RandomState, colours: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """A colour (3,) between two neighbours of a list, varied a little."""
    place = random.uniform(0, len(colours) - 1)
    low = int(place)
    part = place - low
    colour = (1 - part) * np.array(colours[low]) + part * np.array(colours[min(low + 1, len(colours) - 1)])
    return colour * random.uniform(0.93, 1.07, 3)


def _outline(random: np.random.RandomState, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(H, W): below 0 inside an irregular blob; 1 is half the side of the picture."""
    cx, cy = random.uniform(-0.3, 0.3, 2)
    radius = random.uniform(0.2, 0.62) * (1 - 0.5 * max(abs(cx), abs(cy)))
    stretch, turn = random.uniform(0.7, 1.0), random.uniform(0, np.pi)
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = ((y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)) / stretch
    angle = np.arctan2(v, u)
    border = np.ones_like(x)
    for frequency in range(2, 10):
        border += random.normal(0, 0.16 / frequency) * np.cos(frequency * angle + random.uniform(0, 2 * np.pi))
    return np.hypot(u, v) - radius * border + 0.03 * _noise(random, len(x), 12)


def _pigmented(
    random: np.random.RandomState, image: np.ndarray, distance: np.ndarray, colour: np.ndarray, faint: bool,
) -> np.ndarray:
    """The skin (H, W, 3) with a lesion where `distance` (H, W) is below 0."""
    size = len(image)
    second = colour * random.uniform(0.6, 1.3) * random.uniform(0.92, 1.08, 3)
    patches = np.clip(0.5 + _noise(random, size, 5), 0, 1)[..., None]
    inside = colour * (1 - patches) + second * patches if not faint else np.broadcast_to(colour, image.shape)
    strength = 0.05 if faint else random.uniform(0.1, 0.3)
    inside = inside * (1 - strength * np.abs(_noise(random, size, 20)))[..., None]  # pigment network
    if not faint and random.rand() < 0.6:
        dots = np.clip((_noise(random, size, 28) - 0.45) * 6, 0, 1)[..., None]
        inside = inside * (1 - 0.5 * dots)
    if not faint and random.rand() < 0.35:  # regression: a paler area
        pale = np.clip((_noise(random, size, 4) - 0.15) * 3, 0, 0.6)[..., None]
        inside = inside * (1 - pale) + image * 0.85 * pale
    softness = random.uniform(0.015, 0.06)
    share = np.clip(0.5 - distance / (2 * softness), 0, 1)[..., None]  # half-way at the border of the mask
    return image * (1 - share) + inside * share


def _hair(random: np.random.RandomState, image: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Draw a bent dark hair into an image (H, W, 3)."""
    turn, offset, bend = random.uniform(0, np.pi), random.uniform(-1, 1), random.uniform(-0.4, 0.4)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.abs(across - offset - bend * along**2)
    width = max(random.uniform(0.008, 0.02), 0.8 / len(image))
    start, length = random.uniform(-1.3, 0.6), random.uniform(0.6, 1.8)
    share = np.clip(1.3 - distance / width, 0, 1) * ((along > start) & (along < start + length))
    image *= (1 - random.uniform(0.6, 0.9) * share)[..., None]


def write_lesions(
    out: str | os.PathLike, *, train: int = LESIONS_TRAIN, val: int = LESIONS_VAL, size: int = LESIONS_SIZE,
    seed: int = 0, workers: int = 2,
) -> bool:
    """Draw a small data set in ISIC's layout; the whole folder appears at once, with README.txt and overview.png.

    Args:
        out: Folder to create.
        train: Number of training pictures.
        val: Number of validation pictures.
        size: Rows and columns of the pictures.
        seed: 0 to 2**32 - 1; equal seeds give equal pixels.
        workers: Threads; they do not change the result.

    Returns:
        True if the data was written, False if `out` holds the data of the same command already.

    Raises:
        PrepareError: A value out of range, or `out` is not empty, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, SMALLEST_SIZE)):
        if value < least:
            raise PrepareError(f"--{name} must be at least {least}, got {value}")
    if not 0 <= seed < 2**32:
        raise PrepareError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    readme = _README.format(train=train, val=val, size=size, seed=seed)
    if already_there(out, readme):
        return False
    with replacing(out) as folder:
        for split, count in (("train", train), ("val", val)):
            for kind in ("images", "masks"):
                (folder / split / kind).mkdir(parents=True)

            def draw(index: int, split: str = split) -> np.ndarray | None:
                image, mask = draw_lesion(seed, _SPLITS[split], index, size)
                Image.fromarray(image).save(folder / split / "images" / f"lesion_{index + 1:05d}.png")
                Image.fromarray(mask.astype(np.uint8) * 255).save(
                    folder / split / "masks" / f"lesion_{index + 1:05d}.png"
                )
                shown = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
                return np.concatenate([image, shown]) if split == "train" and index < _OVERVIEW else None

            drawn = list(tracked_map(draw, range(count), workers, f"drawing {split}"))
            pictures = [part for part in drawn if part is not None]
            if pictures:
                Image.fromarray(np.concatenate(pictures, axis=1)).save(folder / "overview.png")
        (folder / "README.txt").write_bytes(readme.encode())
    return True

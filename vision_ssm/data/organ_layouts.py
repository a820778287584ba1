"""The drawn abdomens of `organs` as data sets, each in the layout on disk of the real set it stands for."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vision_ssm.data.medical_base import ORGANS_CLASSES, class_palette
from vision_ssm.data.medical_files import write_nifti
from vision_ssm.data.medical_intensity import ABDOMEN_WINDOW
from vision_ssm.data.medical_volume import Grid, Volume, optional
from vision_ssm.data.organs import SMALLEST_DEPTH, SMALLEST_SIZE, DrawnVolume, draw_organs
from vision_ssm.data.progress import tracked_map
from vision_ssm.data.writing import PrepareError, replacing
from vision_ssm.registry import suggest

ORGANS_CASES, ORGANS_SIZE, ORGANS_DEPTH = 20, 96, 24
LEAST_CASES = 4
_OVERVIEW_CASES, _OVERVIEW_SLICES = 4, 6
_README = """\
Organs: drawn CT-like abdomens in the layout of {name}

Bodies of fat, muscle and spine with five organs that touch each other, bowel and vessels that are no class, noise, a
smooth field, soft boundaries, thick slices, and slices without organs at both ends. They show whether a method works,
not how well it works on patients.

Classes:  {classes}
Layout:   {layout}
Cases:    {counts}, {depth} slices of {size} x {size} pixels.
Units:    {units}
Picture:  overview.png, slices of some cases above the same with their labels.
Licence:  drawn by a program; no rights are claimed in the volumes (CC0 1.0).
Made by:  python tools/prepare_data.py organs OUT --layout {layout_name} --cases {cases} --size {size} --depth {depth}\
 --seed {seed}
          The same command draws the same voxels with the same versions of NumPy and SciPy.
"""
_WINDOWED = "image values in [0, 1]: Hounsfield units clipped to [-125, 275] and scaled, float32"


class _Writer:
    """Writes cases into a folder; one sub-class per layout.

    Attributes:
        parts: Names of the parts and their fractions of the cases.
    """

    name: str
    layout: str
    units = _WINDOWED
    parts: tuple[tuple[str, float], ...] = (("train", 0.75), ("test", 0.25))

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, part: str, number: int, volume: DrawnVolume) -> list[str]:
        """Write one case; returns the lines that it adds to the list of the part."""
        raise NotImplementedError

    def finish(self, lists: dict[str, list[str]], cases: dict[str, int]) -> None:
        """Write what belongs to the set as a whole; `lists` holds the lines of every part in order."""
        raise NotImplementedError

    def write_list(self, path: str, lines: list[str]) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _windowed(image: np.ndarray) -> np.ndarray:
    low, high = ABDOMEN_WINDOW
    return ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)


class SynapseWriter(_Writer):
    """TransUNet's form of Synapse."""

    name = "Synapse (TransUNet's form)"
    layout = (
        "train_npz/caseNNNN_sliceNNN.npz (image, label), test_vol_h5/caseNNNN.npy.h5 (image, label; attribute\n"
        "          spacing), lists/lists_Synapse/{train,test_vol}.txt"
    )

    def write(self, part: str, number: int, volume: DrawnVolume) -> list[str]:
        return self.write_case(part, f"case{number:04d}", _windowed(volume.image), volume.labels, volume.spacing)

    def write_case(
        self, part: str, case: str, image: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float],
    ) -> list[str]:
        """One case, image (D, H, W) float32 in [0, 1]: slices to train on, or a volume to test on."""
        if part == "train":
            folder = self.folder / "train_npz"
            folder.mkdir(parents=True, exist_ok=True)
            stems = [f"{case}_slice{index:03d}" for index in range(len(image))]
            for stem, picture, mask in zip(stems, image, labels):
                np.savez_compressed(folder / f"{stem}.npz", image=picture, label=mask)
            return stems
        folder = self.folder / "test_vol_h5"
        folder.mkdir(parents=True, exist_ok=True)
        with optional("h5py").File(folder / f"{case}.npy.h5", "w", track_order=True) as file:
            for key, values in (("image", image), ("label", labels)):
                file.create_dataset(key, data=values, compression="gzip", track_times=False)
            file.attrs["spacing"] = spacing
        return [case]

    def finish(self, lists: dict[str, list[str]], cases: dict[str, int]) -> None:
        folder = "lists/lists_Synapse"
        self.write_list(f"{folder}/train.txt", lists["train"])
        self.write_list(f"{folder}/test_vol.txt", lists["test"])
        self.write_list(f"{folder}/all.lst", [f"{stem}.npz" for stem in lists["train"]])


class _Acdc(_Writer):
    name = "ACDC (MT-UNet's form)"
    layout = (
        "{train,valid}/case_NNN_sliceNNN.npz and test/case_NNN.npz (img, label; spacing),\n"
        "          lists_ACDC/{train,valid,test}.txt (file names)"
    )
    parts = (("train", 0.7), ("valid", 0.1), ("test", 0.2))

    def write(self, part: str, number: int, volume: DrawnVolume) -> list[str]:
        folder = self.folder / part
        folder.mkdir(parents=True, exist_ok=True)
        image, case, spacing = _windowed(volume.image), f"case_{number:03d}", np.array(volume.spacing)
        if part == "test":
            np.savez_compressed(folder / f"{case}.npz", img=image, label=volume.labels, spacing=spacing)
            return [f"{case}.npz"]
        names = [f"{case}_slice{index:03d}.npz" for index in range(len(image))]
        for name, picture, mask in zip(names, image, volume.labels):
            np.savez_compressed(folder / name, img=picture, label=mask, spacing=spacing)
        return names

    def finish(self, lists: dict[str, list[str]], cases: dict[str, int]) -> None:
        for part, lines in lists.items():
            self.write_list(f"lists_ACDC/{part}.txt", lines)


class _Nifti(_Writer):
    name = "nnU-Net (NIfTI)"
    layout = (
        "imagesTr/organs_NNN_0000.nii.gz, labelsTr/organs_NNN.nii.gz, imagesTs, labelsTs, dataset.json.\n"
        "          Cases are stored in different orientations, every third with rotated axes"
    )
    units = "Hounsfield units, int16"

    def write(self, part: str, number: int, volume: DrawnVolume) -> list[str]:
        case, suffix = f"organs_{number:03d}", "Tr" if part == "train" else "Ts"
        affine, grid = stored_place(volume, number)
        placed = Volume(volume.image[:, None], None, volume.spacing, affine, case, grid)
        write_nifti(self.folder / f"images{suffix}" / f"{case}_0000.nii.gz", volume.image, placed)
        write_nifti(self.folder / f"labels{suffix}" / f"{case}.nii.gz", volume.labels, placed)
        return [case]

    def finish(self, lists: dict[str, list[str]], cases: dict[str, int]) -> None:
        content = dict(
            name="organs", channel_names={"0": "CT"}, numTraining=cases["train"], file_ending=".nii.gz",
            labels={name: label for label, name in enumerate(ORGANS_CLASSES)}, licence="CC0 1.0",
        )
        (self.folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stored_place(volume: DrawnVolume, number: int) -> tuple[np.ndarray, Grid]:
    """Where a drawn case lies, and how its file orders the voxels: LPS, RAS, and a rotated LAS in turn.

    Returns:
        The affine (4, 4) of indices (w, h, d), and the file's grid.
    """
    depth, height, width = volume.image.shape
    d, h, w = volume.spacing
    affine = np.diag([-w, -h, d, 1.0])
    affine[:3, 3] = w * width / 2, h * height / 2, -d * depth / 2
    if number % 3 == 2:
        turn = np.eye(4)
        for (first, second), degrees in zip(((0, 1), (1, 2), (0, 2)), (12.0, -9.0, 6.0)):
            step = np.eye(4)
            step[[first, second], [first, second]] = np.cos(np.radians(degrees))
            step[first, second], step[second, first] = -np.sin(np.radians(degrees)), np.sin(np.radians(degrees))
            turn = turn @ step
        affine = turn @ affine
    grid, _ = Grid((width, height, depth), affine).turned(("LPS", "RAS", "LAS")[number % 3])
    return affine, grid


_WRITERS: dict[str, type[_Writer]] = {"synapse": SynapseWriter, "acdc": _Acdc, "nifti": _Nifti}
ORGAN_LAYOUTS = tuple(_WRITERS)


def write_organs(
    out: str | os.PathLike, layout: str, *, cases: int = ORGANS_CASES, size: int = ORGANS_SIZE,
    depth: int = ORGANS_DEPTH, seed: int = 0, workers: int = 2,
) -> bool:
    """Draw a small data set of CT-like volumes.

    The whole folder appears at once, when everything has been written, with README.txt and overview.png.

    Args:
        out: Folder to create.
        layout: One of `ORGAN_LAYOUTS`.
        cases: Number of volumes, to train and to test.
        size: Rows and columns of a slice.
        depth: Slices of a volume.
        seed: 0 to 2**32 - 1; equal seeds give equal voxels.
        workers: Threads; they do not change the result.

    Returns:
        True if the data was written, False if `out` holds the data of the same command already.

    Raises:
        PrepareError: A value out of range, or `out` is not empty, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    if layout not in _WRITERS:
        raise PrepareError(f"unknown layout {layout!r}.{suggest(layout, ORGAN_LAYOUTS)}")
    limits = (("cases", cases, LEAST_CASES), ("size", size, SMALLEST_SIZE), ("depth", depth, SMALLEST_DEPTH))
    for name, value, least in limits:
        if value < least:
            raise PrepareError(f"--{name} must be at least {least}, got {value}")
    if not 0 <= seed < 2**32:
        raise PrepareError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    counts = _counts(_WRITERS[layout].parts, cases)
    readme = _README.format(
        name=_WRITERS[layout].name, layout=_WRITERS[layout].layout, units=_WRITERS[layout].units, layout_name=layout,
        classes=", ".join(f"{label}: {name}" for label, name in enumerate(ORGANS_CLASSES)),
        counts=", ".join(f"{count} {part}" for part, count in counts.items()), cases=cases, size=size, depth=depth,
        seed=seed,
    )  # fmt: skip
    if already_there(out, readme):
        return False
    owners = [part for part, count in counts.items() for _ in range(count)]
    with replacing(out) as folder:
        writer = _WRITERS[layout](folder)

        def draw(number: int) -> tuple[list[str], np.ndarray | None]:
            volume = draw_organs(seed, number, depth, size)
            picture = _picture(volume) if number < _OVERVIEW_CASES else None
            return writer.write(owners[number], number + 1, volume), picture

        lists: dict[str, list[str]] = {part: [] for part in counts}
        pictures = []
        for part, (lines, picture) in zip(owners, tracked_map(draw, range(cases), workers, "drawing")):
            lists[part] += lines
            pictures += [] if picture is None else [picture]
        writer.finish(lists, counts)
        Image.fromarray(np.concatenate(pictures)).save(folder / "overview.png")
        (folder / "README.txt").write_bytes(readme.encode())
    return True


def _counts(parts: tuple[tuple[str, float], ...], cases: int) -> dict[str, int]:
    """Cases of every part: the fractions rounded, at least one, the first part takes what is left."""
    counts = {part: max(1, round(fraction * cases)) for part, fraction in parts[1:]}
    return {parts[0][0]: cases - sum(counts.values()), **counts}


def already_there(out: Path, readme: str) -> bool:
    """Whether `out` holds the data set of this README; an empty or absent folder is free.

    Raises:
        PrepareError: `out` holds something else.
    """
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{str(out)!r} is a file; the data need a folder of their own")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if (out / "README.txt").is_file() and (out / "README.txt").read_bytes() == readme.encode():
        return True
    raise PrepareError(
        f"{str(out)!r} is not empty and holds something else. Choose another folder, or remove this one; it is left as"
        " it is."
    )


def _picture(volume: DrawnVolume) -> np.ndarray:
    """(2 H, 6 W, 3) uint8: slices of a volume, and below them the same with their labels."""
    depth = len(volume.image)
    chosen = [round((index + 0.5) * depth / _OVERVIEW_SLICES - 0.5) for index in range(_OVERVIEW_SLICES)]
    grey = np.repeat((255 * _windowed(volume.image[chosen])).astype(np.uint8)[..., None], 3, axis=3)
    labels = volume.labels[chosen]
    colours = np.array(class_palette(len(ORGANS_CLASSES)), dtype=np.uint8)[labels]
    mixed = np.where(labels[..., None] > 0, grey // 2 + colours // 2, grey)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (grey, mixed)])

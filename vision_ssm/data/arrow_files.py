"""The arrow-pointing task on disk: contact sheets, and its pictures as an image folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vision_ssm.data.arrows import BORDER, CLASSES, INTERSECTION, LENGTHS, RADII, SPLITS, WIDTHS, ArrowPointing
from vision_ssm.data.organ_layouts import already_there
from vision_ssm.data.progress import tracked_map
from vision_ssm.data.writing import PrepareError, replacing
from vision_ssm.registry import suggest

SHEETS = {"val": (8, 3), "val_384": (4, 2)}
"""Split and (columns, rows) of each contact sheet."""
_GAP, _CAPTION = 16, 24
_COLOURS = ((213, 94, 0), (0, 114, 178))
_GROUND, _INK = (228, 231, 235), (31, 41, 51)
_README = """\
Arrow pointing: does the arrow point at the disc?

A black arrow and a black disc on white. The disc's radius is {radii} pixels, the arrow is {lengths} long, its lines
{widths} wide; the centres of both are at least {border} pixels from every side. None of this grows with the picture. An
arrow that points at the disc passes its centre within radius / {factor}, one that does not beyond radius * {factor}.
The classes are equally probable.

Paper:    pLSTM: parallelizable Linear Source Transition Mark networks, https://arxiv.org/abs/2506.11997
Source:   the geometry and the random numbers are those of https://github.com/ml-jku/arrow_pointing_dataset
Classes:  {classes} (labels 0 and 1)
Splits:   {splits}
Layout:   {layout}
Pictures: {sheets} show the first ones.
Licence:  drawn by a program; no rights are claimed in the pictures (CC0 1.0).
Made by:  python tools/prepare_data.py arrows OUT{flags}
          The same command draws the same scenes always, and the same pixels with the same version of Pillow.
"""


def contact_sheet(dataset: ArrowPointing, columns: int, rows: int) -> Image.Image:
    """The first pictures of `dataset`, unscaled, in RGB, under their numbers and classes."""
    step = dataset.size + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, rows * (step + _CAPTION) + _GAP), _GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for index in range(min(columns * rows, len(dataset))):
        x, y = _GAP + index % columns * step, _GAP + index // columns * (step + _CAPTION)
        label = dataset.scene(index).label
        draw.text((x, y), f"{index}", fill=_INK, font=font)
        draw.text((x + dataset.size, y), CLASSES[label], fill=_COLOURS[label], font=font, anchor="ra")
        sheet.paste(dataset.picture(index), (x, y + _CAPTION))
    return sheet


def write_arrows(
    out: str | os.PathLike, images: Sequence[str] = (), count: int | None = None, workers: int = 4
) -> dict[str, int] | None:
    """Write contact sheets of the arrow-pointing task and, if asked, pictures in the layout of `ImageFolder`.

    The folder appears at once, when everything has been written, with README.txt. The pictures are those that
    `ArrowPointing` looks for when `out` is its root; it adds what is not there.

    Args:
        out: Folder to create.
        images: Splits whose pictures are written, of `SPLITS`.
        count: Pictures of each of them; default: all.
        workers: Threads; they do not change the result.

    Returns:
        Pictures written by split, without the contact sheets; None if `out` holds the data of the same command already.

    Raises:
        PrepareError: Unknown split, `count` out of range; `out` is not empty, cannot be written, or the disk is full.
    """
    out = Path(out).expanduser().resolve()
    for name in images:
        if name not in SPLITS:
            raise PrepareError(f"unknown split {name!r} of the arrow-pointing task.{suggest(name, SPLITS)}")
        if count is not None and not 1 <= count <= SPLITS[name].pictures:
            raise PrepareError(f"split {name!r} has 1 to {SPLITS[name].pictures} pictures, got a count of {count}")
    if count is not None and not images:
        raise PrepareError("a count is that of the pictures: say which splits are to be written")
    datasets = [ArrowPointing(name, root=None, count=count) for name in dict.fromkeys(images)]
    readme = _readme(datasets, count)
    if already_there(out, readme):
        return None
    with replacing(out) as folder:
        for name, (columns, rows) in SHEETS.items():
            contact_sheet(ArrowPointing(name), columns, rows).save(folder / _sheet_name(name))
        for dataset in datasets:
            written = ArrowPointing(dataset.split, root=folder, count=count)
            for _ in tracked_map(written.keep, range(len(written)), workers, f"drawing {dataset.split}"):
                pass
        (folder / "README.txt").write_text(readme, encoding="utf-8")
    return {dataset.split: len(dataset) for dataset in datasets}


def _sheet_name(split: str) -> str:
    return f"contact_sheet_{SPLITS[split].size}.png"


def _readme(datasets: Sequence[ArrowPointing], count: int | None) -> str:
    splits = [f"{name}: {own.pictures:,} of {own.size} x {own.size}, seed {own.seed}" for name, own in SPLITS.items()]
    written = ", ".join(f"{dataset.split} ({len(dataset):,})" for dataset in datasets)
    names = " ".join(dataset.split for dataset in datasets)
    flags = (f" --images {names}" if names else "") + (f" --count {count}" if count is not None else "")
    return _README.format(
        radii="{:g} to {:g}".format(*RADII), lengths=f"{LENGTHS[0]} to {LENGTHS[1] - 1}",
        widths=f"{WIDTHS[0]} to {WIDTHS[1] - 1}", border=BORDER, factor=INTERSECTION, classes=", ".join(CLASSES),
        splits="\n          ".join(splits), sheets=" and ".join(map(_sheet_name, SHEETS)), flags=flags,
        layout=f"SPLIT/CLASS/NUMBER.png; written: {written}" if datasets else "contact sheets only",
    )  # fmt: skip

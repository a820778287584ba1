"""Checks of images with label maps, as mmseg's datasets read them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vision_ssm.data.decode import UnreadableImageError, load_label_map, read_header
from vision_ssm.data.dense_report import (
    DenseReport,
    endings,
    files_below,
    image_size,
    is_image_name,
    listed,
    missing,
    spread,
)
from vision_ssm.data.progress import tracked_map

QUICK_HEADERS = 10_000
"""Pairs whose sizes a quick check compares."""
QUICK_MAPS = 64
"""Maps that a quick check decodes."""
_VALUES = 65536
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


def check_segmentation(
    image_dir: str | os.PathLike,
    map_dir: str | os.PathLike,
    *,
    image_suffix: str = ".jpg",
    map_suffix: str = ".png",
    num_classes: int | None = None,
    reduce_zero_label: bool = False,
    ignore_index: int = 255,
    classes: Sequence[str] | None = None,
    names_file: str | os.PathLike | None = None,
    label: str = "data",
    full: bool = False,
    workers: int = 4,
) -> DenseReport:
    """Check a folder of images and a folder of label maps.

    A quick check compares names and sizes (of up to `QUICK_HEADERS` pairs) and decodes `QUICK_MAPS` maps spread over
    the folder. A full check decodes every file and shows a progress bar.

    Found: folders and files that are missing, images without map and maps without image, files that are empty or cannot
    be read, maps of another size than their image (as turned by EXIF), maps in colour, labels of no class, and only
    ignored labels in all maps; and, as warnings, only ignored labels in some, and classes in no map (full check).

    Args:
        image_dir: Folder of images, at any depth.
        map_dir: Folder of maps; a map lies where its image lies, with the other suffix.
        image_suffix: What the names of images end in.
        map_suffix: What the names of maps end in.
        num_classes: Labels from 0 to `num_classes` - 1 are classes; where a dataset maps labels to others (mmseg's
            ``label_map``), those of the files. Default: as many as `classes`, and any label where that is not given.
        reduce_zero_label: Value 0 of a map is ignored and value k is class k - 1.
        ignore_index: Label that is ignored (after `reduce_zero_label`, under which 255 is ignored as well).
        classes: Their names, for messages.
        names_file: Text file with one image a line, relative to `image_dir` and without suffix; None: all images.
        label: Begins every message.
        full: Decode everything.
        workers: Threads.
    """
    report = DenseReport(label)
    image_dir, map_dir = Path(image_dir).expanduser(), Path(map_dir).expanduser()
    folders = [(image_dir, "image folder"), (map_dir, "map folder")]
    for folder, kind in folders:
        if not folder.is_dir():
            report.problem(missing(folder, kind))
    if report.problems:
        return report
    stems = _pairs(report, image_dir, map_dir, image_suffix, map_suffix, names_file)
    if num_classes is None and classes is not None:
        num_classes = len(classes)

    def compare(stem: str) -> tuple[tuple[int, int] | None, list[str]]:
        return _compare(image_dir / (stem + image_suffix), map_dir / (stem + map_suffix), full)

    chosen = stems if full else spread(stems, QUICK_HEADERS)
    sizes = []
    good: list[str] = []
    compared = tracked_map(compare, chosen, workers, f"{label}: images" if full else None)
    for (size, messages), stem in zip(compared, chosen):
        for message in messages:
            report.problem(message)
        if size is not None:
            sizes.append(size)
        if not messages:
            good.append(stem)
    report.note_sizes(sizes)
    maps = [map_dir / (stem + map_suffix) for stem in (good if full else spread(good, QUICK_MAPS))]
    labels = _Labels(report, num_classes, reduce_zero_label, ignore_index, classes)
    for values, path in zip(tracked_map(_count, maps, workers, f"{label}: maps" if full else None), maps):
        labels.add(path, values)
    labels.finish(full)
    return report


def _pairs(
    report: DenseReport, image_dir: Path, map_dir: Path, image_suffix: str, map_suffix: str,
    names_file: str | os.PathLike | None,
) -> list[str]:
    """Names, without suffix, of the images that have a map; everything without its partner is noted."""
    image_files, map_files = files_below(image_dir), files_below(map_dir)
    images = [name.removesuffix(image_suffix) for name in image_files if name.endswith(image_suffix)]
    maps = {name.removesuffix(map_suffix) for name in map_files if name.endswith(map_suffix)}
    for kind, folder, names, suffix, chosen in (
        ("images", image_dir, image_files, image_suffix, images), ("maps", map_dir, map_files, map_suffix, maps),
    ):
        if not chosen:
            held = f"it holds {endings(names)}, such as {names[0]!r}" if names else "it is empty"
            report.problem(f"no {kind} ending in {suffix!r} in {str(folder)!r}: {held}")
    others = [name for name in image_files if is_image_name(name) and not name.endswith(image_suffix)]
    if others and images and image_dir != map_dir:
        report.warn(
            f"{len(others)} images in {str(image_dir)!r} are left out, as they do not end in {image_suffix!r}:"
            f" {listed(others)}"
        )
    report.facts["maps"] = str(len(maps))
    if names_file is not None:
        images = _named(report, Path(names_file).expanduser(), images)
    report.images = len(images)
    if not images or not maps:
        return []
    for name in images:
        if name not in maps:
            report.problem(f"image {str(image_dir / (name + image_suffix))!r} has no map {name + map_suffix!r}")
    if names_file is None:
        for name in sorted(maps - set(images)):
            report.problem(f"map {str(map_dir / (name + map_suffix))!r} has no image {name + image_suffix!r}")
    return [name for name in images if name in maps]


def _named(report: DenseReport, names_file: Path, images: list[str]) -> list[str]:
    """The images that a list names; those that do not exist are noted."""
    if not names_file.is_file():
        report.problem(missing(names_file, "list of images, a file"))
        return []
    names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    present = set(images)
    for name in names:
        if name not in present:
            report.problem(f"{str(names_file)!r} names {name!r}, which is not among the images")
    return [name for name in names if name in present]


def _compare(image: Path, map_: Path, decode: bool) -> tuple[tuple[int, int] | None, list[str]]:
    """(height, width) of an image if it can be read, and what is wrong with it or its map; `decode`: its pixels too."""
    size, map_size = image_size(image, decode), _map_size(map_)
    messages = [text for text in (size, map_size) if isinstance(text, str)]
    if not messages and size != map_size:
        shapes = [" x ".join(map(str, shape)) for shape in (map_size, size)]
        messages = [f"map {str(map_)!r} is {shapes[0]}, its image {shapes[1]} (height x width)"]
    return (None if isinstance(size, str) else size), messages


def _map_size(map_: Path) -> tuple[int, int] | str:
    """(height, width) of a map, or in words what is wrong with its header."""
    try:
        if os.path.getsize(map_) == 0:
            return f"map {str(map_)!r} is an empty file"
        size, mode, _ = read_header(map_)
    except (OSError, UnreadableImageError) as error:
        return str(error)
    if mode in _INDEX_MODES:
        return size
    return (
        f"map {str(map_)!r} is in colour (mode {mode}), not one label a pixel: convert its colours to labels and save"
        " it as 8-bit grey or palette"
    )


def _count(map_: Path) -> np.ndarray | str:
    """(65536,) pixels of each value of a map, or in words why it cannot be read."""
    try:
        values = load_label_map(map_)
    except UnreadableImageError as error:
        return str(error)
    if values.min() < 0 or values.max() >= _VALUES:
        return f"map {str(map_)!r} holds values from {values.min()} to {values.max()}, which are no labels"
    return np.bincount(values.reshape(-1), minlength=_VALUES)  # (H, W) -> (H * W,)


class _Labels:
    """The labels of some maps against what a model expects; see `check_segmentation` for the arguments."""

    def __init__(
        self, report: DenseReport, num_classes: int | None, reduce_zero_label: bool, ignore_index: int,
        classes: Sequence[str] | None,
    ) -> None:
        self.report, self.num_classes, self.reduced = report, num_classes, reduce_zero_label
        self.ignore_index, self.classes = ignore_index, classes
        self.total = np.zeros(_VALUES, dtype=np.int64)
        self.read = 0
        self.blank: list[str] = []

    def add(self, map_: Path, values: np.ndarray | str) -> None:
        """Take in the counts of a map, (65536,) pixels of each value, or why it could not be read."""
        if isinstance(values, str):
            self.report.problem(values)
            return
        counts = _shifted(values) if self.reduced else values
        self.read += 1
        self.total += counts
        present = np.flatnonzero(counts).tolist()
        count = _VALUES if self.num_classes is None else self.num_classes
        wrong = [label for label in present if label >= count and label != self.ignore_index]
        if wrong:
            stored = [0 if label == 255 else label + 1 for label in wrong] if self.reduced else wrong
            allowed = f"1 to {count}" if self.reduced else f"0 to {count - 1}"
            hint = f". {self._zero_hint()}" if wrong == [count] and not self.reduced and counts[0] else ""
            self.report.problem(
                f"map {str(map_)!r} holds the values {listed([str(value) for value in stored])}, but {count} classes"
                f" have the values {allowed}{hint}"
            )
        elif present == [self.ignore_index]:
            self.blank.append(repr(str(map_)))

    def finish(self, full: bool) -> None:
        """Note what concerns all maps; `full`: they were all of the data."""
        if not self.read:
            return
        ignored = f"nothing but the ignored label {self.ignore_index}: {listed(self.blank)}"
        if len(self.blank) == self.read:
            self.report.problem(f"all {self.read} maps that were read hold {ignored}. {self._zero_hint()}")
        elif self.blank:
            self.report.warn(f"{len(self.blank)} maps hold {ignored}")
        labels = [label for label in np.flatnonzero(self.total).tolist() if label != self.ignore_index]
        for label in labels if self.num_classes is None else range(self.num_classes):
            name = str(label) if self.classes is None else self.classes[label]
            self.report.counts[name] = int(self.total[label])
        self.report.facts["ignored pixels"] = f"{100 * self.total[self.ignore_index] / self.total.sum():.1f} %"
        absent = [name for name, pixels in self.report.counts.items() if not pixels]
        if full and absent and self.num_classes is not None:
            self.report.warn(f"{len(absent)} of {self.num_classes} classes occur in no map: {listed(absent)}")

    def _zero_hint(self) -> str:
        if self.reduced:
            return "reduce_zero_label=True ignores value 0, and classes begin with 1; if 0 is a class, set it to False."
        return "Classes begin with 0; if 0 means 'no class' and classes begin with 1, set reduce_zero_label=True."


def _shifted(values: np.ndarray) -> np.ndarray:
    """Counts by label from counts by value when value 0 is ignored; mmseg does the same to the maps."""
    counts = np.zeros_like(values)
    counts[:-1] = values[1:]
    counts[254] = 0
    counts[255] += values[0] + values[255]
    return counts

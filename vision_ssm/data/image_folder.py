"""Classification data sets on disk."""

import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from vision_ssm.data.decode import EXTENSIONS, UnreadableImageError, load_image, read_header
from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.randomness import seeded
from vision_ssm.data.transforms import Transform, build_transform
from vision_ssm.registry import DATASETS, suggest

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
_GIVE_UP_AFTER = 64  # neighbouring files, all unreadable: something else is wrong


class _PathTable(Sequence[str]):
    """Many paths in one buffer: a list of strings would be copied into every worker by reference counting."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start:self._ends[index]].tobytes())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _sub_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    """Image files below `folder` at any depth, sorted, relative to it; links are followed, loops are not."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(parent, folder)
        found += [name if relative == "." else os.path.join(relative, name) for name in files if _is_image(name)]
    return sorted(found)


def _existing_folder(root: Path, split: str) -> Path:
    """root/split, or an error that names the first part that does not exist and what is there instead."""
    folder = root / split
    if folder.is_dir():
        return folder
    missing = folder
    while not missing.parent.exists():
        missing = missing.parent
    if missing.exists() or not missing.parent.is_dir():
        file = missing if missing.exists() else missing.parent
        raise NotADirectoryError(f"data folder {str(folder)!r}: {str(file)!r} is a file, not a folder")
    siblings = _sub_folders(missing.parent)
    hint = suggest(missing.name, siblings) or (f" {missing.parent} holds no folder at all." if not siblings else "")
    raise FileNotFoundError(
        f"data folder {str(folder)!r} does not exist: there is no {missing.name!r} in {str(missing.parent)!r}.{hint}"
    )


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Images in ImageNet layout: ``root/split/CLASS/any/depth/name.jpg``, one folder per class.

    Files ending in one of `decode.EXTENSIONS` (in any case) are images; the rest is ignored, as are names that begin
    with a dot. Labels follow the sorted folder names, or the order of `classes`. Images are read by `load_image`, which
    states its conversions.

    A file that cannot be read is replaced by the next readable one in the dataset, with that one's label and path, so
    every run replaces alike. The first such file is warned about, all are counted in `skipped`, across workers.

    Args:
        root: Data folder; ``~`` is expanded.
        split: Sub-folder of `root`, such as ``train``; empty if the class folders are directly in `root`.
        transform: Callable from a PIL image to a float tensor (C, H, W), or keywords of `build_transform`. None: pixels
            in [0, 1] at the stored size.
        strict: Raise `UnreadableImageError` instead of replacing a file that cannot be read.
        classes: Names of the classes in the order of their labels; other folders are left out. Default: all, sorted.
        channels: 3 for RGB, 1 for grey.
        ann_file: Instead of class folders: a text file of lines ``relative/path label``, paths relative to root/split.
            It is looked for in `root`, then in the current folder. A label is a number from 0, or a name if `classes`
            is given. Without `classes` the classes are named by their numbers.
        allow_empty_classes: Accept classes without an image.
        min_size: Smallest allowed side in pixels. A sample of the files is checked at once, each file when it is read.

    Attributes:
        classes: tuple of names. `class_to_index`: name to label. `metainfo`: dict(classes=...), for mmengine.
        labels: int64 array, one label per image.

    Raises:
        FileNotFoundError, NotADirectoryError: No such folder or file; similar names are suggested.
        ValueError: A folder or file that does not hold what it should; the message says what was found.
        TypeError: Unknown keyword.
    """

    @strict_keywords
    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "",
        transform: Transform | Mapping[str, Any] | None = None,
        strict: bool = False,
        classes: Sequence[str] | None = None,
        *,
        channels: int = 3,
        ann_file: str | os.PathLike | None = None,
        allow_empty_classes: bool = False,
        min_size: int | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
        self.root = Path(root).expanduser()
        self.split = split
        self.strict = strict
        self.channels = channels
        self.min_size = min_size
        self.folder = _existing_folder(self.root, split)
        self.transform = self._built(transform)
        if classes is not None:
            if isinstance(classes, str):
                raise TypeError(f"classes must be a list of names, got the string {classes!r}")
            classes = tuple(classes)
            if len(set(classes)) < len(classes):
                twice = sorted({name for name in classes if classes.count(name) > 1})
                raise ValueError(f"classes holds {_listed(twice)} more than once")
        if ann_file is None:
            paths, labels, self.classes = self._from_folders(classes, allow_empty_classes)
        else:
            paths, labels, self.classes = self._from_list(Path(ann_file).expanduser(), classes, allow_empty_classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self._paths = _PathTable(paths)
        # One byte per image, shared with the workers: set for unreadable files. The last one: a warning was given.
        self._flags = torch.zeros(len(self._paths) + 1, dtype=torch.uint8).share_memory_()
        if min_size is not None:
            self.check_image_sizes(min_size, limit=1000)

    def _built(self, transform: Transform | Mapping[str, Any] | None) -> Transform:
        if transform is None:
            return to_tensor
        if not isinstance(transform, Mapping):
            return transform
        options = dict(transform)
        if options.setdefault("channels", self.channels) != self.channels:
            raise ValueError(
                f"the transform is for {options['channels']} channels, the dataset reads {self.channels}:"
                f" write channels={options['channels']} in the dataset, and leave it out of the transform"
            )
        return build_transform(**options)

    def _from_folders(
        self, classes: tuple[str, ...] | None, allow_empty: bool,
    ) -> tuple[list[str], list[int], tuple[str, ...]]:
        present = _sub_folders(self.folder)
        expected = f"expected one folder per class, such as {str(self.folder / 'cat' / '0001.jpg')!r}"
        if not present:
            with os.scandir(self.folder) as entries:
                images = sum(entry.is_file() and _is_image(entry.name) for entry in entries)
            if images:
                raise ValueError(
                    f"{str(self.folder)!r} holds {images} images but no class folders: {expected}. For a flat folder"
                    " give an ann_file with lines 'relative/path label'."
                )
            raise ValueError(f"{str(self.folder)!r} is empty: {expected}")
        if classes is None and set(present) <= set(SPLIT_NAMES):
            raise ValueError(
                f"{str(self.folder)!r} holds the splits {_listed(present)}, not classes: choose one,"
                f" split={present[0]!r}"
            )
        missing = [] if classes is None else [name for name in classes if name not in present]
        if missing and not allow_empty:
            raise ValueError(
                f"{str(self.folder)!r} has no folder for class {_listed(missing)}.{suggest(missing[0], present)}"
                " Pass allow_empty_classes=True if that is intended."
            )
        classes = tuple(present) if classes is None else classes
        paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        for label, name in enumerate(classes):
            files = [] if name in missing else _image_files(self.folder / name)
            if not files and name not in missing:
                empty.append(name)
            paths += [os.path.join(name, file) for file in files]
            labels += [label] * len(files)
        endings = ", ".join(EXTENSIONS)
        if not paths:
            raise ValueError(
                f"no image in the {len(classes)} class folders of {str(self.folder)!r} (looked for {endings})"
            )
        if empty and not allow_empty:
            raise ValueError(
                f"class folder without an image in {str(self.folder)!r}: {_listed(empty)} (looked for {endings})."
                " Remove it, or pass allow_empty_classes=True to keep its label without samples."
            )
        return paths, labels, classes

    def _from_list(
        self, file: Path, classes: tuple[str, ...] | None, allow_empty: bool,
    ) -> tuple[list[str], list[int], tuple[str, ...]]:
        if (self.root / file).is_file():
            file = self.root / file
        elif not file.is_file():
            raise FileNotFoundError(f"annotation file {str(file)!r} exists neither in {str(self.root)!r} nor here")
        lines: dict[str, tuple[int, int]] = {}
        for number, path, label_text in self._read_lines(file):
            where = f"{file}, line {number}"
            label = self._label(label_text, classes, where)
            if path in lines and lines[path][0] != label:
                first = f"label {lines[path][0]} in line {lines[path][1]}"
                raise ValueError(f"{where}: {path!r} has label {label}, but {first}")
            lines[path] = (label, number)
        if not lines:
            raise ValueError(f"annotation file {str(file)!r} is empty: expected lines 'relative/path label'")
        self._check_files(file, lines)
        labels = [label for label, _ in lines.values()]
        classes = tuple(str(label) for label in range(max(labels) + 1)) if classes is None else classes
        used = set(labels)
        empty = [name for label, name in enumerate(classes) if label not in used]
        if empty and not allow_empty:
            raise ValueError(
                f"annotation file {str(file)!r} has no image of class {_listed(empty)}. Pass allow_empty_classes=True"
                " if that is intended."
            )
        return list(lines), labels, classes

    @staticmethod
    def _read_lines(file: Path) -> Iterator[tuple[int, str, str]]:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"annotation file {str(file)!r} is not UTF-8 text ({error.reason})") from error
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            parts = line.strip().rsplit(maxsplit=1)
            if len(parts) < 2:
                raise ValueError(f"{file}, line {number}: expected 'relative/path label', got {line.strip()!r}")
            if os.path.isabs(parts[0]):
                raise ValueError(f"{file}, line {number}: {parts[0]!r} is absolute; paths are relative to root/split")
            yield number, os.path.normpath(parts[0]), parts[1]

    @staticmethod
    def _label(text: str, classes: tuple[str, ...] | None, where: str) -> int:
        if classes is not None and text in classes:
            return classes.index(text)
        if not (text.isascii() and text.isdigit()):
            known = "" if classes is None else f" or one of the {len(classes)} classes.{suggest(text, classes)}"
            raise ValueError(f"{where}: label {text!r} is not a number from 0{known}")
        if classes is not None and int(text) >= len(classes):
            raise ValueError(
                f"{where}: label {text} is out of range for {len(classes)} classes (0 to {len(classes) - 1})"
            )
        return int(text)

    def _check_files(self, file: Path, lines: Mapping[str, tuple[int, int]]) -> None:
        folders: dict[str, set[str]] = {}
        for path, (_, number) in lines.items():
            parent, name = os.path.split(path)
            if parent not in folders:
                folder = self.folder / parent
                folders[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
            if name not in folders[parent]:
                raise FileNotFoundError(
                    f"{file}, line {number}: {path!r} does not exist in {str(self.folder)!r}."
                    f"{suggest(name, folders[parent])}"
                )

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(classes=self.classes)

    @property
    def class_to_index(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def skipped(self) -> int:
        """Number of different files found unreadable so far, by this process and its workers."""
        return int(self._flags[:-1].sum(dtype=torch.int64))

    def skipped_paths(self) -> list[str]:
        """Paths of the unreadable files found so far, in the order of the dataset."""
        return [self.path(index) for index in self._flags[:-1].nonzero().flatten().tolist()]

    def skip_report(self) -> str:
        """One line on the unreadable files found so far, for a log; empty if there are none."""
        paths = self.skipped_paths()
        if not paths:
            return ""
        return (
            f"{len(paths)} of {len(self)} files of {str(self.folder)!r} could not be read and were replaced by their"
            f" neighbours: {_listed(paths)}"
        )

    def path(self, index: int) -> str:
        """Path of image `index`."""
        return os.path.join(self.folder, self._paths[index])

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.folder)!r}, {len(self)} images, {len(self.classes)} classes)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`: dict(image=float tensor (C, H, W), label=int, path=str).

        If `index` is a `Draw`, the transform is seeded from its coordinates and the global generators stay as they are.

        Raises:
            IndexError: Out of range.
            UnreadableImageError: Under `strict`, or if many files in a row cannot be read.
            ValueError: The image is smaller than `min_size`.
        """
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} is out of range for {len(self)} images")
        image, found = self._readable(position % len(self))
        coordinates = getattr(index, "coordinates", None)
        if coordinates is None:
            tensor = self.transform(image)
        else:
            with seeded(*coordinates):
                tensor = self.transform(image)
        return dict(image=tensor, label=int(self.labels[found]), path=self.path(found))

    def _readable(self, index: int) -> tuple[Any, int]:
        for found in range(index, index + min(len(self), _GIVE_UP_AFTER)):
            found %= len(self)
            try:
                image = load_image(self.path(found), self.channels)
            except UnreadableImageError as error:
                if self.strict:
                    raise
                self._note_unreadable(found, error)
                continue
            if self.min_size is not None and min(image.size) < self.min_size:
                raise ValueError(self._too_small(found, image.size[::-1], self.min_size))
            return image, found
        raise UnreadableImageError(
            f"{min(len(self), _GIVE_UP_AFTER)} files in a row cannot be read, from {self.path(index)!r} on. Check the"
            f" data: python tools/prepare_data.py check {self.root}"
        )

    def _note_unreadable(self, index: int, error: UnreadableImageError) -> None:
        self._flags[index] = 1
        if not self._flags[-1]:
            self._flags[-1] = 1
            warnings.warn(
                f"{error}. The next readable image takes its place; further files of {str(self.folder)!r} like this are"
                " counted without a warning (strict=True makes them errors).",
                stacklevel=2,
            )

    def _too_small(self, index: int, size: tuple[int, int], minimum: int) -> str:
        return (
            f"image {self.path(index)!r} is {size[0]} x {size[1]} pixels (height x width), smaller than the minimum of"
            f" {minimum}: remove or enlarge it, or lower min_size"
        )

    def check_image_sizes(self, minimum: int, limit: int | None = None) -> None:
        """Read the headers of all images, or of `limit` images spread over the dataset, and check their sides.

        Raises:
            ValueError: An image has a side below `minimum` pixels; it is named. Unreadable files are passed over.
        """
        count = len(self) if limit is None else min(limit, len(self))
        for index in np.linspace(0, len(self) - 1, count).astype(np.int64).tolist():
            try:
                size, _, _ = read_header(self.path(index))
            except UnreadableImageError:
                continue
            if min(size) < minimum:
                raise ValueError(self._too_small(index, size, minimum))

    def check_num_classes(self, num_classes: int) -> None:
        """Check that every label fits a model with `num_classes` outputs.

        Raises:
            ValueError: Some label does not; the message says which classes there are.
        """
        highest = int(self.labels.max())
        if highest >= num_classes:
            raise ValueError(
                f"labels out of range: {str(self.folder)!r} has {len(self.classes)} classes with labels up to {highest}"
                f" ({self.classes[highest]!r}), the model has num_classes={num_classes} (labels 0 to"
                f" {num_classes - 1}). Set num_classes={len(self.classes)}."
            )


def check_same_classes(first: ImageFolder, second: ImageFolder) -> None:
    """Check that two datasets, such as the training and validation splits, give the same labels to the same classes.

    Raises:
        ValueError: The lists of classes differ; the message names what only one of them has.
    """
    if first.classes == second.classes:
        return
    differences = []
    for one, other in ((first, second), (second, first)):
        known = set(other.classes)
        alone = [name for name in one.classes if name not in known]
        if alone:
            differences.append(f"only in {str(one.folder)!r}: {_listed(alone)}")
    if not differences:
        differences = ["the names are the same, in another order"]
    raise ValueError(
        f"{str(first.folder)!r} and {str(second.folder)!r} do not have the same classes ({len(first.classes)} and"
        f" {len(second.classes)}), so their labels would not agree; {'; '.join(differences)}. Give both the same list:"
        " classes=[...] (with allow_empty_classes=True where one of them lacks images)."
    )

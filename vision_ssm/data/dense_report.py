"""What a check of a data set for dense prediction found, and the words for it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vision_ssm.data.decode import EXTENSIONS, UnreadableImageError, load_image, read_header
from vision_ssm.registry import suggest

NAMED = 5
"""How many problems or names a message gives before it counts the rest."""


class DenseDataError(ValueError):
    """Data that cannot be trained or tested on; the message names the first problems and their number."""


@dataclass
class DenseReport:
    """Result of one check.

    Attributes:
        label: What was checked, such as ``train data``; begins every message.
        problems: What must be mended, one sentence each; empty if the data is fine.
        warnings: What may be intended.
        facts: Further rows for a table, such as the smallest picture.
        counts: Pixels (segmentation, as far as maps were decoded) or instances (detection) by class.
        images: Number of pictures.
    """

    label: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0

    def problem(self, text: str) -> None:
        """Note something that must be mended."""
        self.problems.append(f"{self.label}: {text}")

    def warn(self, text: str) -> None:
        """Note something that may be intended."""
        self.warnings.append(f"{self.label}: {text}")

    def note_few(self, what: str, names: Sequence[str], total: int) -> None:
        """Note a defect that large data sets have in a few places and that the loaders drop or clip.

        Up to one in a thousand of `total` it is one warning, above that a problem for each of `names`.
        """
        if not names:
            return
        if len(names) <= total / 1000:
            self.warn(f"{len(names)} of {total} annotations have {what}: {listed(names)}")
        else:
            for name in names:
                self.problem(f"{name} has {what}")

    def note_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Add the smallest and the largest of some (height, width) to the facts."""
        if sizes:
            extremes = min(sizes, key=math.prod), max(sizes, key=math.prod)
            for name, (height, width) in zip(("smallest (height x width)", "largest"), extremes):
                self.facts[name] = f"{height} x {width}"


def raise_for_problems(*reports: DenseReport) -> None:
    """Raise one `DenseDataError` for all problems of the reports; nothing if there are none."""
    problems = [problem for report in reports for problem in report.problems]
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:NAMED])
    rest = f"\n  and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    plural = "s" * (len(problems) > 1)
    raise DenseDataError(
        f"{len(problems)} problem{plural} with the data:\n{shown}{rest}\n"
        "Every file is checked, and every problem listed, by python tools/prepare_data.py check ROOT --layout LAYOUT."
    )


def listed(names: Sequence[str], limit: int = NAMED) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def missing(path: Path, kind: str) -> str:
    """A sentence on a folder or file (`kind` says which) that does not exist: what is there instead, what was meant.

    The path is looked for one level below and up to two levels above the place where it breaks off, for those who
    pointed one level too high or too deep.
    """
    present = path
    while not present.exists() and present != present.parent:
        present = present.parent
    if present == path:
        return f"{kind} {str(path)!r} is a {'folder' if path.is_dir() else 'file'}, not a {kind.rsplit(' ', 1)[-1]}"
    if not present.is_dir():
        return f"{kind} {str(path)!r} does not exist: {str(present)!r} is a file"
    tail = path.relative_to(present)
    names = sorted(entry.name for entry in os.scandir(present) if not entry.name.startswith("."))
    text = f"{kind} {str(path)!r} does not exist: there is no {tail.parts[0]!r} in {str(present)!r}"
    for folder in [*(present / name for name in names), present.parent, present.parent.parent]:
        if folder.is_dir() and (folder / tail).exists():
            return f"{text}, but there is {str(folder / tail)!r}: point the data root at {str(folder)!r}."
    if not names:
        return f"{text}, which is empty."
    return f"{text}.{suggest(tail.parts[0], names) or f' It holds {listed(names)}.'}"


def files_below(folder: Path) -> list[str]:
    """Files below `folder` at any depth, sorted, relative to it, with ``/``; names with a leading dot are left out."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + name for name in files if not name.startswith(".")]
    return sorted(found)


def endings(names: Sequence[str]) -> str:
    """What file names end in, most frequent first, for a message: ``12 .png, 3 .txt``."""
    counts: dict[str, int] = {}
    for name in names:
        ending = os.path.splitext(name)[1]
        counts[ending] = counts.get(ending, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:NAMED]
    return ", ".join(f"{count} {ending or 'without ending'}" for ending, count in ordered)


def is_image_name(name: str) -> bool:
    """Whether a file name ends like one of an image."""
    return name.lower().endswith(EXTENSIONS)


def spread(items: Sequence, count: int | None) -> list:
    """At most `count` of `items`, evenly spread from the first to the last; all for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index * (len(items) - 1) // max(count - 1, 1)] for index in range(count)]


def image_size(path: Path, decode: bool) -> tuple[int, int] | str:
    """(height, width) of an upright image, or in words why it cannot be read; `decode`: read its pixels too."""
    try:
        if os.path.getsize(path) == 0:
            return f"image {str(path)!r} is an empty file"
        size, _, _ = read_header(path, upright=True)
        if decode:
            load_image(path)
    except OSError as error:
        return f"cannot read image {str(path)!r}: {error.strerror}"
    except UnreadableImageError as error:
        return str(error)
    return size

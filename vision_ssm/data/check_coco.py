"""Checks of annotation files in COCO's format, as mmdet's dataset and pycocotools read them."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from vision_ssm.data.dense_report import (
    NAMED,
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
from vision_ssm.registry import suggest

QUICK_IMAGES = 2_000
"""Pictures whose sizes a quick check compares with the annotation file."""
_PARTS = ("images", "annotations", "categories")
_FAR_OUTSIDE = 0.05  # of the picture's side: beyond it, the annotation belongs to a picture of another size


def check_coco(
    ann_file: str | os.PathLike,
    image_dir: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    keypoints: int = 0,
    masks: bool = True,
    label: str = "data",
    full: bool = False,
    workers: int = 4,
) -> DenseReport:
    """Check an annotation file in COCO's format and its folder of images.

    A quick check looks at every annotation, at the names of all images and at the sizes of `QUICK_IMAGES`. A full check
    decodes every image and shows a progress bar.

    Found: files and folders that are missing; JSON that cannot be parsed, with the line; parts or keys that are
    missing; ids that occur twice or belong to nothing; images that are named but absent, empty, damaged or of another
    size; boxes and masks outside of the image or without extent; polygons of fewer than three points; keypoints that
    are not x, y, visibility each; classes of the config that the file does not know, or no annotation of any.
    As warnings: images without annotation, classes without annotation, classes in another order than the file's.
    Boxes without extent, short polygons and small overhangs are warnings as long as they are at most one in a thousand:
    COCO itself has a few, and loaders drop them.

    Args:
        ann_file: ``instances_*.json``, ``person_keypoints_*.json`` or alike.
        image_dir: Folder that the file names are relative to.
        classes: Names of the categories to be learnt; default: all of the file.
        keypoints: Number of keypoints of each annotation; 0: none are needed.
        masks: Whether annotations need a segmentation.
        label: Begins every message.
        full: Decode every image.
        workers: Threads.
    """
    report = DenseReport(label)
    ann_file, image_dir = Path(ann_file).expanduser(), Path(image_dir).expanduser()
    if not ann_file.is_file():
        report.problem(missing(ann_file, "annotation file"))
    if not image_dir.is_dir():
        report.problem(missing(image_dir, "image folder"))
    content = _read(report, ann_file) if ann_file.is_file() else None
    if content is None:
        return report
    images = _by_id(report, content, "images", ("id", "file_name", "height", "width"))
    categories = _by_id(report, content, "categories", ("id", "name"))
    report.images = len(images)
    if not images:
        report.problem(f"{ann_file.name} lists no image")
    wanted = _categories(report, ann_file, categories, classes)
    _Annotations(report, images, categories, keypoints, masks).check(content["annotations"], wanted)
    if image_dir.is_dir():
        _check_images(report, image_dir, list(images.values()), full, workers)
    return report


def _read(report: DenseReport, ann_file: Path) -> Mapping[str, Any] | None:
    """The parsed file if it has all parts; else None, and the reason in the report."""
    name = f"annotation file {str(ann_file)!r}"
    try:
        content = json.loads(ann_file.read_bytes())
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            report.problem(f"{name} is empty")
        else:
            near = error.doc[max(error.pos - 20, 0):error.pos + 20]
            report.problem(
                f"{name} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}, near {near!r}. It"
                f" has {len(error.doc)} characters; was it copied or downloaded completely?"
            )
        return None
    except UnicodeDecodeError as error:
        report.problem(f"{name} is not JSON text in UTF-8 ({error.reason} at byte {error.start})")
        return None
    except OSError as error:
        report.problem(f"{name} cannot be read: {error.strerror}")
        return None
    if not isinstance(content, dict):
        report.problem(f"{name} holds a {type(content).__name__}, expected an object with {', '.join(_PARTS)}")
        return None
    absent = [part for part in _PARTS if not isinstance(content.get(part), list)]
    if absent:
        report.problem(
            f"{name} has no list {listed([repr(part) for part in absent])}; it holds"
            f" {listed([repr(key) for key in content]) or 'nothing'}. Expected the format of COCO's instances_*.json."
        )
        return None
    return content


def _by_id(
    report: DenseReport, content: Mapping[str, Any], part: str, keys: Sequence[str],
) -> dict[Any, Mapping[str, Any]]:
    """Entries of a part that have all keys, by their id; others are noted."""
    found: dict[Any, Mapping[str, Any]] = {}
    for number, entry in enumerate(content[part]):
        absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if absent:
            report.problem(f"entry {number} of {part!r} has no {listed([repr(key) for key in absent])}")
        elif entry["id"] in found:
            report.problem(f"{part!r} has the id {entry['id']} more than once")
        else:
            found[entry["id"]] = entry
    return found


def _categories(
    report: DenseReport, ann_file: Path, categories: Mapping[Any, Mapping[str, Any]], classes: Sequence[str] | None,
) -> list[Any]:
    """Ids of the categories to be learnt."""
    names = [category["name"] for category in categories.values()]
    twice = [repr(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        report.problem(f"{ann_file.name} has more than one category named {listed(twice)}")
    if classes is None:
        return list(categories)
    unknown = [name for name in classes if name not in names]
    if unknown:
        hint = suggest(unknown[0], names) or f" The file has {listed([repr(name) for name in names])}."
        report.problem(
            f"{len(unknown)} of the config's {len(classes)} classes are no category of {ann_file.name}:"
            f" {listed([repr(name) for name in unknown])}.{hint} Give the dataset metainfo=dict(classes=...)."
        )
    left_out = [repr(name) for name in names if name not in classes]
    if left_out:
        report.warn(f"{len(left_out)} categories of {ann_file.name} are not among the classes: {listed(left_out)}")
    in_order = [name for name in names if name in classes]
    if not unknown and in_order != list(classes):
        report.warn(
            f"the classes are in another order than the categories of {ann_file.name}; labels follow the file:"
            f" {listed([repr(name) for name in in_order])}. Results would carry wrong names: use the file's order."
        )
    return [number for number, category in categories.items() if category["name"] in classes]


class _Annotations:
    """The annotations of a file against its images and categories; see `check_coco` for the arguments."""

    def __init__(
        self, report: DenseReport, images: Mapping[Any, Mapping[str, Any]], categories: Mapping[Any, Mapping[str, Any]],
        keypoints: int, masks: bool,
    ) -> None:
        self.report, self.images, self.categories = report, images, categories
        self.keypoints, self.masks = keypoints, masks
        self.few: dict[str, list[str]] = defaultdict(list)  # tolerated defects: in words, and where

    def check(self, annotations: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Check all annotations and count those of the categories `wanted`."""
        seen: set[Any] = set()
        counts: Counter[Any] = Counter()
        with_annotation: set[Any] = set()
        with_keypoints = crowds = 0
        keys = ("id", "image_id", "category_id", "bbox", "area", *(("segmentation",) if self.masks else ()))
        for number, entry in enumerate(annotations):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                self.report.problem(
                    f"entry {number} of 'annotations' has no {listed([repr(key) for key in absent])}"
                )
                continue
            name = f"annotation {entry['id']} (image {entry['image_id']})"
            if entry["id"] in seen:
                self.report.problem(f"'annotations' has the id {entry['id']} more than once")
            seen.add(entry["id"])
            if entry["category_id"] not in self.categories:
                self.report.problem(
                    f"{name} has the category_id {entry['category_id']}, which is no category of the file"
                )
            if entry["image_id"] not in self.images:
                self.report.problem(f"annotation {entry['id']} is of image {entry['image_id']}, which is not listed")
                continue
            image = self.images[entry["image_id"]]
            self._check_box(name, entry["bbox"], image)
            if self.masks:
                self._check_mask(name, entry["segmentation"], image)
            if self.keypoints and self._check_keypoints(name, entry, image):
                with_keypoints += 1
            counts[entry["category_id"]] += 1
            crowds += bool(entry.get("iscrowd", 0))
            with_annotation.add(entry["image_id"])
        for what, names in self.few.items():
            self.report.note_few(what, names, len(annotations))
        self._count(wanted, counts)
        self.report.facts["annotations"] = str(len(annotations))
        self.report.facts["crowds"] = str(crowds)
        bare = [str(image["file_name"]) for number, image in self.images.items() if number not in with_annotation]
        self.report.facts["images without annotation"] = str(len(bare))
        if bare and len(bare) < len(self.images):
            self.report.warn(f"{len(bare)} of {len(self.images)} images have no annotation: {listed(bare)}")
        if self.keypoints:
            self.report.facts["annotations with keypoints"] = str(with_keypoints)
            if annotations and not with_keypoints:
                self.report.problem("no annotation has a labelled keypoint (num_keypoints is 0 everywhere)")

    def _count(self, wanted: Sequence[Any], counts: Mapping[Any, int]) -> None:
        self.report.counts = {str(self.categories[number]["name"]): counts.get(number, 0) for number in wanted}
        absent = [repr(name) for name, count in self.report.counts.items() if not count]
        if absent and len(absent) == len(wanted):
            self.report.problem(f"no annotation of any of the classes {listed(absent)}")
        elif absent:
            self.report.warn(f"{len(absent)} of {len(wanted)} classes have no annotation: {listed(absent)}")

    def _check_box(self, name: str, box: Any, image: Mapping[str, Any]) -> None:
        if not _numbers(box) or len(box) != 4:
            self.report.problem(f"{name} has the bbox {box!r}, expected x, y, width, height")
            return
        x, y, width, height = box
        if width <= 0 or height <= 0:
            self.few["a bbox without extent"].append(name)
        else:
            self._check_place(name, "bbox", (x, x + width), (y, y + height), image)

    def _check_place(
        self, name: str, what: str, xs: tuple[float, float], ys: tuple[float, float], image: Mapping[str, Any],
    ) -> None:
        """Note what lies outside of its image; `xs`, `ys`: smallest and largest coordinate, pixels."""
        beyond = [max(-low, high - side) for (low, high), side in ((xs, image["width"]), (ys, image["height"]))]
        if max(beyond) <= 1:
            return
        outside = any(
            low >= side or high <= 0 for (low, high), side in ((xs, image["width"]), (ys, image["height"]))
        )
        far = beyond[0] > _FAR_OUTSIDE * image["width"] or beyond[1] > _FAR_OUTSIDE * image["height"]
        if outside or far:
            self.report.problem(
                f"{name}: its {what}, x {xs[0]:g} to {xs[1]:g} and y {ys[0]:g} to {ys[1]:g}, "
                f"{'lies' if outside else 'reaches far'} outside of {image['file_name']}, which is"
                f" {image['width']} wide and {image['height']} high"
            )
        else:
            self.few[f"a {what} that reaches out of the image"].append(name)

    def _check_mask(self, name: str, mask: Any, image: Mapping[str, Any]) -> None:
        if isinstance(mask, dict):
            size = mask.get("size")
            counts = mask.get("counts")
            if size != [image["height"], image["width"]]:
                self.report.problem(
                    f"{name} has run lengths of size {size!r}, its image is {[image['height'], image['width']]}"
                )
            elif isinstance(counts, list) and sum(counts) != image["height"] * image["width"]:
                self.report.problem(
                    f"{name} has run lengths of {sum(counts)} pixels, its image has {image['height'] * image['width']}"
                )
            elif not isinstance(counts, (list, str)):
                self.report.problem(f"{name} has run lengths without 'counts'")
            return
        if not isinstance(mask, list) or not all(_numbers(polygon) for polygon in mask):
            self.report.problem(f"{name} has a segmentation that is neither a list of polygons nor run lengths")
            return
        if not mask:
            self.few["no polygon"].append(name)
        for polygon in mask:
            if len(polygon) % 2:
                self.report.problem(f"{name} has a polygon of {len(polygon)} numbers, expected x and y of each point")
            elif len(polygon) < 6:
                self.few["a polygon of fewer than 3 points"].append(name)
            else:
                xs, ys = polygon[::2], polygon[1::2]
                self._check_place(name, "polygon", (min(xs), max(xs)), (min(ys), max(ys)), image)

    def _check_keypoints(self, name: str, entry: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
        """Note what is wrong with an annotation's keypoints; whether any of them is labelled."""
        points = entry.get("keypoints")
        if not _numbers(points) or len(points) != 3 * self.keypoints:
            held = f"{len(points)} numbers" if isinstance(points, list) else repr(points)
            self.report.problem(
                f"{name} has the keypoints {held}, expected {3 * self.keypoints}: x, y, visibility of {self.keypoints}"
            )
            return False
        visibility = points[2::3]
        if not set(visibility) <= {0, 1, 2}:
            self.report.problem(f"{name} has keypoints of a visibility other than 0, 1 and 2")
            return False
        labelled = sum(value > 0 for value in visibility)
        if entry.get("num_keypoints", labelled) != labelled:
            self.report.problem(f"{name} has num_keypoints {entry['num_keypoints']}, but {labelled} are labelled")
        shown = [(x, y) for x, y, value in zip(points[::3], points[1::3], visibility) if value]
        if shown:
            xs, ys = zip(*shown)
            self._check_place(name, "keypoints", (min(xs), max(xs)), (min(ys), max(ys)), image)
        return labelled > 0


def _numbers(values: Any) -> TypeGuard[list[float]]:
    """Whether this is a list of finite numbers."""
    try:
        return isinstance(values, list) and math.isfinite(sum(values))  # a sum is as good as a look at each, and fast
    except (TypeError, OverflowError):
        return False


def _check_images(
    report: DenseReport, image_dir: Path, images: Sequence[Mapping[str, Any]], full: bool, workers: int,
) -> None:
    """Compare the listed images with the files."""
    present = set(files_below(image_dir))
    names = [PurePosixPath(str(image["file_name"])).as_posix() for image in images]
    # One listing instead of a question per file, except for names that lead out of the folder.
    absent = {name for name in names if name not in present and not (".." in name and (image_dir / name).is_file())}
    there = [image for image, name in zip(images, names) if name not in absent]
    if images and not there:
        report.problem(_all_absent(image_dir, names, present))
        return
    for name in sorted(absent):
        report.problem(f"the annotation file names {name!r}, which is not in {str(image_dir)!r}")
    others = [name for name in present - set(names) if is_image_name(name)]
    if others:
        report.facts["images not listed"] = str(len(others))

    def size(image: Mapping[str, Any]) -> tuple[int, int] | str:
        return image_size(image_dir / str(image["file_name"]), full)

    chosen = there if full else spread(there, QUICK_IMAGES)
    sizes = []
    found = tracked_map(size, chosen, workers, f"{report.label}: images" if full else None)
    for measured, image in zip(found, chosen):
        if isinstance(measured, str):
            report.problem(measured)
            continue
        sizes.append(measured)
        if measured != (image["height"], image["width"]):
            report.problem(
                f"image {image['file_name']!r} is {measured[0]} x {measured[1]}, the annotation file says"
                f" {image['height']} x {image['width']} (height x width)"
            )
    report.note_sizes(sizes)


def _all_absent(image_dir: Path, names: Sequence[str], present: set[str]) -> str:
    text = f"none of the {len(names)} images of the annotation file, such as {names[0]!r}, is in {str(image_dir)!r}"
    if not present:
        return f"{text}: the folder is empty"
    below = [name for name in sorted(present) if PurePosixPath(name).name == PurePosixPath(names[0]).name]
    if below:
        return f"{text}, but there is {below[0]!r}: change data_prefix so that folder and file name fit together"
    shown = listed(sorted(present), min(NAMED, 2))
    return f"{text}; it holds {endings(sorted(present))}: {shown}. Do the file and the folder belong to the same split?"

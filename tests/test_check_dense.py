"""Checks of data for dense prediction: every defect is named, good data passes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vision_ssm.data import check_coco as coco_module
from vision_ssm.data import check_segmentation as segmentation_module
from vision_ssm.data.check_dense import (
    LAYOUT_SPLITS,
    DenseDataError,
    DenseReport,
    check_coco,
    check_layout,
    check_segmentation,
    raise_for_problems,
)
from vision_ssm.data.decode import UnreadableImageError, load_label_map
from vision_ssm.data.prepare import main
from vision_ssm.data.shapes import LAYOUTS, write_shapes

CLASSES = ("cat", "dog")
HEIGHT, WIDTH = 20, 30


def pairs(root: Path) -> Path:
    """Four images and maps: 0 unlabelled, 1 and 2 the classes."""
    for number in range(4):
        for folder in ("img", "map"):
            (root / folder / "sub").mkdir(parents=True, exist_ok=True)
        values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        values[2:9] = 1
        values[12:, number:] = 2
        name = f"sub/{number}" if number == 3 else str(number)
        Image.new("RGB", (WIDTH, HEIGHT), (9 * number, 80, 200)).save(root / "img" / f"{name}.jpg")
        Image.fromarray(values).save(root / "map" / f"{name}.png")
    return root


def cut_off(path: Path) -> None:
    """A picture whose header is whole and whose end is missing."""
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])


def check_pairs(root: Path, **keywords) -> DenseReport:
    keywords = dict(num_classes=2, reduce_zero_label=True, classes=CLASSES, label="train", **keywords)
    return check_segmentation(root / "img", root / "map", **keywords)


def content() -> dict:
    """Four images, the last without annotation; a polygon, two polygons, run lengths, keypoints."""
    images = [dict(id=10 + n, file_name=f"{n}.jpg", height=HEIGHT, width=WIDTH) for n in range(4)]
    boxes = [dict(bbox=[2, 3, 10, 8], segmentation=[[2, 3, 12, 3, 12, 11]]),
             dict(bbox=[0, 0, 30, 20], segmentation=[[0, 0, 30, 0, 30, 20], [0, 10, 5, 15, 0, 15]]),
             dict(bbox=[0, 0, 1, 20], segmentation=dict(counts=[0, 20, 580], size=[20, 30]), iscrowd=1)]
    points = [1, 2, 2, 5, 5, 1, 0, 0, 0]
    annotations = [
        dict(id=n + 1, image_id=10 + n, category_id=3 + 4 * (n % 2), area=40.0, iscrowd=0, num_keypoints=2,
             keypoints=points) | box for n, box in enumerate(boxes)
    ]  # fmt: skip
    return dict(images=images, annotations=annotations, categories=[dict(id=3, name="cat"), dict(id=7, name="dog")])


def coco(root: Path, data: dict | str | bytes) -> Path:
    (root / "img").mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "img" / f"{number}.jpg")
    text = json.dumps(data, indent=1) if isinstance(data, dict) else data
    (root / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def check_annotations(root: Path, **keywords) -> DenseReport:
    return check_coco(root / "a.json", root / "img", **{"keypoints": 3, "classes": CLASSES, "label": "val", **keywords})


# Segmentation


@pytest.mark.parametrize("full", [False, True])
def test_good_pairs(tmp_path, full, capsys):
    report = check_pairs(pairs(tmp_path), full=full)
    assert report.problems == [] and report.warnings == [] and report.images == 4
    assert report.counts == {"cat": 4 * 7 * WIDTH, "dog": 8 * (4 * WIDTH - 6)}
    assert report.facts["maps"] == "4" and report.facts["smallest (height x width)"] == "20 x 30"
    raise_for_problems(report)
    assert ("train: maps" in capsys.readouterr().err) == full  # only the long check shows bars


def change_map(values):
    def change(root):
        Image.fromarray(np.asarray(values, dtype=np.uint8)).save(root / "map" / "1.png")
    return change


def whole(value):
    return np.full((HEIGHT, WIDTH), value)


PAIR_DEFECTS = {
    "map missing": (lambda root: (root / "map/sub/3.png").unlink(), "image '.*3.jpg' has no map 'sub/3.png'"),
    "image missing": (lambda root: (root / "img/2.jpg").unlink(), "map '.*2.png' has no image '2.jpg'"),
    "other size": (change_map(np.ones((HEIGHT, WIDTH + 1))), r"map '.*1.png' is 20 x 31, its image 20 x 30 \(height x width\)"),
    "label too high": (change_map(whole(3)), "map '.*1.png' holds the values 3, but 2 classes have the values 1 to 2"),
    "colour": (change_map(np.ones((HEIGHT, WIDTH, 3))), r"1.png' is in colour \(mode RGB\), not one label a pixel: convert"),
    "empty map": (lambda root: (root / "map/1.png").write_bytes(b""), "map '.*1.png' is an empty file"),
    "damaged map": (lambda root: (root / "map/1.png").write_bytes(b"\x89PNG\r\n"), "cannot read image '.*map/1.png'"),
    "empty image": (lambda root: (root / "img/0.jpg").write_bytes(b""), "image '.*0.jpg' is an empty file"),
    "no image": (lambda root: (root / "img/0.jpg").write_text("hello"), "cannot read image '.*img/0.jpg'"),
}  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
@pytest.mark.parametrize("defect", PAIR_DEFECTS)
def test_defects_of_pairs(tmp_path, defect, full):
    change, message = PAIR_DEFECTS[defect]
    change(pairs(tmp_path))
    report = check_pairs(tmp_path, full=full)
    assert len(report.problems) == 1 and report.problems[0].startswith("train: ")
    with pytest.raises(DenseDataError, match=f"1 problem with the data:\n  train: .*{message}"):
        raise_for_problems(report)


def test_only_ignored_labels(tmp_path):
    change_map(whole(255))(pairs(tmp_path))
    report = check_pairs(tmp_path)
    assert report.problems == []
    assert "1 maps hold nothing but the ignored label 255" in report.warnings[0] and "1.png" in report.warnings[0]
    for path in (tmp_path / "map").rglob("*.png"):
        Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(path)
    for reduced, hint in ((True, "if 0 is a class, set it to False"), (False, "set reduce_zero_label=True")):
        report = check_segmentation(tmp_path / "img", tmp_path / "map", num_classes=2, reduce_zero_label=reduced)
        assert len(report.problems) == 1
        assert "all 4 maps that were read hold nothing but the ignored label 255" in report.problems[0]
        assert hint in report.problems[0]


def test_forgotten_reduce_zero_label_is_suspected(tmp_path):
    report = check_segmentation(pairs(tmp_path) / "img", tmp_path / "map", num_classes=2)
    assert len(report.problems) == 4
    assert "holds the values 2, but 2 classes have the values 0 to 1" in report.problems[0]
    assert "if 0 means 'no class' and classes begin with 1, set reduce_zero_label=True" in report.problems[0]


def test_labels_as_mmseg_shifts_them(tmp_path):
    pytest.importorskip("mmseg.datasets")
    from mmseg.datasets.transforms import LoadAnnotations

    random = np.random.RandomState(0)
    Image.fromarray(random.choice([0, 1, 2, 3, 254, 255], (HEIGHT, WIDTH)).astype(np.uint8)).save(tmp_path / "m.png")
    sample = dict(seg_map_path=str(tmp_path / "m.png"), reduce_zero_label=True, seg_fields=[])
    shifted = LoadAnnotations()(sample)["gt_seg_map"]
    counts = segmentation_module._shifted(segmentation_module._count(tmp_path / "m.png"))
    assert np.array_equal(np.flatnonzero(counts), np.unique(shifted))
    assert all(counts[value] == (shifted == value).sum() for value in np.unique(shifted))


def test_cut_off_image_shows_in_a_full_check(tmp_path):
    cut_off(pairs(tmp_path) / "img" / "0.jpg")
    assert check_pairs(tmp_path).problems == []
    (problem,) = check_pairs(tmp_path, full=True).problems
    assert "cannot read image" in problem and "0.jpg" in problem


def test_turned_image_is_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(pairs(tmp_path) / "img" / "0.jpg", exif=exif)
    assert check_pairs(tmp_path).problems == []


def test_other_endings_are_named(tmp_path):
    pairs(tmp_path)
    (problem,) = check_pairs(tmp_path, image_suffix=".png").problems
    assert "no images ending in '.png' in" in problem and "it holds 4 .jpg, such as '0.jpg'" in problem
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "img" / "x.png")
    report = check_pairs(tmp_path)
    assert report.problems == [] and "1 images" in report.warnings[0] and "'.jpg': x.png" in report.warnings[0]
    (tmp_path / "none").mkdir()
    assert "it is empty" in check_segmentation(tmp_path / "img", tmp_path / "none").problems[0]


def test_list_of_names(tmp_path):
    (pairs(tmp_path) / "map" / "1.png").unlink()
    (tmp_path / "names.txt").write_text("0\nsub/3\n")
    report = check_pairs(tmp_path, names_file=tmp_path / "names.txt")
    assert report.problems == [] and report.images == 2  # what is not named does not matter
    (tmp_path / "names.txt").write_text("0\n3\n")
    (problem,) = check_pairs(tmp_path, names_file=tmp_path / "names.txt").problems
    assert "names '3', which is not among the images" in problem
    assert "Did you mean 'names.txt'" in check_pairs(tmp_path, names_file=tmp_path / "name.txt").problems[0]


def test_palette_and_sixteen_bit_maps(tmp_path):
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    palette = Image.fromarray((values % 3).astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png")
    assert np.array_equal(load_label_map(tmp_path / "p.png"), values % 3)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    assert np.array_equal(load_label_map(tmp_path / "deep.png"), values)
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImageError, match="mode RGB. is not one whole number a pixel"):
        load_label_map(tmp_path / "rgb.png")


def test_folders_one_level_off(tmp_path):
    pairs(tmp_path / "data" / "ade")
    root = tmp_path / "data"
    for wrong, right in ((root, root / "ade"), (root / "ade" / "img", root / "ade")):
        report = check_segmentation(wrong / "img", wrong / "map")
        assert len(report.problems) == 2 and "image folder" in report.problems[0] and "map folder" in report.problems[1]
        assert f"there is no 'map' in '{wrong}', but there is '{right / 'map'}': point the data root at '{right}'" in report.problems[1]
    text = check_segmentation(root / "ade" / "image", root / "ade" / "map").problems[0]
    assert "there is no 'image' in" in text and "Did you mean 'img' or 'map'?" in text
    text = check_segmentation(root / "ade" / "img" / "0.jpg", root / "ade" / "map").problems[0]
    assert "0.jpg' is a file, not a folder" in text
    (tmp_path / "empty").mkdir()
    assert "which is empty" in check_segmentation(tmp_path / "empty" / "img", root / "ade" / "map").problems[0]


def test_quick_check_reads_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation_module, "QUICK_HEADERS", 3)
    monkeypatch.setattr(segmentation_module, "QUICK_MAPS", 2)
    seen = []
    for name in ("_compare", "_count"):
        original = getattr(segmentation_module, name)
        monkeypatch.setattr(
            segmentation_module, name, lambda *a, o=original, n=name: (seen.append((n, a[0].stem)), o(*a))[1]
        )
    assert check_pairs(pairs(tmp_path)).problems == []
    assert sorted(seen) == [("_compare", "0"), ("_compare", "1"), ("_compare", "3"), ("_count", "0"), ("_count", "3")]
    seen.clear()
    check_pairs(tmp_path, full=True)
    assert len(seen) == 8


# COCO


@pytest.mark.parametrize("full", [False, True])
def test_good_annotations(tmp_path, full):
    report = check_annotations(coco(tmp_path, content()), full=full)
    assert report.problems == [] and report.images == 4 and report.counts == {"cat": 2, "dog": 1}
    assert report.warnings == ["val: 1 of 4 images have no annotation: 3.jpg"]
    assert report.facts["crowds"] == "1" and report.facts["annotations with keypoints"] == "3"


@pytest.mark.parametrize(("text", "message"), [
    ("", "annotation file '.*a.json' is empty"),
    ('{"images": [],\n "annotations": [}', r"is not valid JSON: .* in line 2, column 18, near .*annotations"),
    (json.dumps(content())[:-30], "is not valid JSON: .* in line 1, column .*copied or downloaded completely"),
    (b'{"images": "\xff"}', "is not JSON text in UTF-8"),
    ("[1, 2]", "holds a list, expected an object with images, annotations, categories"),
    ('{"shapes": [], "version": 1}', "has no list 'images', 'annotations', 'categories'; it holds 'shapes', 'version'"),
    ('{"images": [], "categories": []}', "has no list 'annotations'; it holds 'images', 'categories'"),
])
def test_files_that_are_not_annotations(tmp_path, text, message):
    (problem,) = check_annotations(coco(tmp_path, text)).problems
    with pytest.raises(DenseDataError, match=message):
        raise_for_problems(DenseReport("val", [problem]))


def entry(part, number, **changes):
    return lambda data: data[part][number].update(changes)


def without(part, number, key):
    return lambda data: data[part][number].pop(key)


COCO_DEFECTS = {
    "unknown image": (entry("annotations", 0, image_id=99), "annotation 1 is of image 99, which is not listed"),
    "unknown category": (entry("annotations", 0, category_id=4), r"annotation 1 \(image 10\) has the category_id 4, which is no"),
    "class unknown to the file": (entry("categories", 1, name="hog"), "1 of the config's 2 classes are no category of a.json: 'dog'. Did you mean 'hog'.*metainfo"),
    "key missing": (without("annotations", 1, "area"), "entry 1 of 'annotations' has no 'area'"),
    "image key missing": (without("images", 3, "height"), "entry 3 of 'images' has no 'height'"),
    "image twice": (entry("images", 3, id=10), "'images' has the id 10 more than once"),
    "annotation twice": (entry("annotations", 1, id=1), "'annotations' has the id 1 more than once"),
    "file missing": (entry("images", 3, file_name="4.jpg"), "the annotation file names '4.jpg', which is not in"),
    "image of other size": (entry("images", 3, height=30, width=20), r"image '3.jpg' is 20 x 30, the annotation file says 30 x 20"),
    "polygon outside": (entry("annotations", 0, segmentation=[[40, 3, 50, 3, 50, 11]]), "annotation 1 .*its polygon, x 40 to 50 and y 3 to 11, lies outside of 0.jpg, which is 30 wide and 20 high"),
    "polygon far over the edge": (entry("annotations", 0, segmentation=[[2, 3, 12, 3, 12, 25]]), "its polygon, .*reaches far outside of 0.jpg"),
    "two points": (entry("annotations", 0, segmentation=[[2, 3, 12, 3]]), r"annotation 1 \(image 10\) has a polygon of fewer than 3 points"),
    "odd polygon": (entry("annotations", 0, segmentation=[[2, 3, 12, 3, 5, 6, 7]]), "has a polygon of 7 numbers, expected x and y"),
    "no polygon": (entry("annotations", 0, segmentation=[]), "annotation 1 .* has no polygon"),
    "polygon of words": (entry("annotations", 0, segmentation=[["a", "b"]]), "neither a list of polygons nor run lengths"),
    "runs of other size": (entry("annotations", 2, segmentation=dict(counts=[0, 600], size=[30, 20])), r"run lengths of size \[30, 20\], its image is \[20, 30\]"),
    "runs too short": (entry("annotations", 2, segmentation=dict(counts=[0, 500], size=[20, 30])), "run lengths of 500 pixels, its image has 600"),
    "runs missing": (entry("annotations", 2, segmentation=dict(size=[20, 30])), "run lengths without 'counts'"),
    "box without extent": (entry("annotations", 0, bbox=[2, 3, 0, 8]), r"annotation 1 \(image 10\) has a bbox without extent"),
    "box outside": (entry("annotations", 0, bbox=[31, 3, 10, 8]), "annotation 1 .*its bbox, x 31 to 41 and y 3 to 11, lies outside of 0.jpg"),
    "box of three": (entry("annotations", 0, bbox=[1, 2, 3]), r"has the bbox \[1, 2, 3\], expected x, y, width, height"),
    "box of nan": (entry("annotations", 0, bbox=[1, 2, 3, float("nan")]), "expected x, y, width, height"),
    "keypoints too short": (entry("annotations", 0, keypoints=[1, 2, 2]), "has the keypoints 3 numbers, expected 9: x, y, visibility of 3"),
    "keypoints missing": (without("annotations", 0, "keypoints"), "has the keypoints None, expected 9"),
    "visibility": (entry("annotations", 0, keypoints=[1, 2, 3, 5, 5, 1, 0, 0, 0]), "visibility other than 0, 1 and 2"),
    "keypoint count": (entry("annotations", 0, num_keypoints=3), "has num_keypoints 3, but 2 are labelled"),
    "keypoint outside": (entry("annotations", 0, keypoints=[90, 2, 2, 5, 5, 1, 0, 0, 0]), "its keypoints, .* reaches far outside"),
}  # fmt: skip


@pytest.mark.parametrize("defect", COCO_DEFECTS)
def test_defects_of_annotations(tmp_path, defect):
    change, message = COCO_DEFECTS[defect]
    data = content()
    change(data)
    report = check_annotations(coco(tmp_path, data))
    with pytest.raises(DenseDataError, match=f"with the data:\n  val: .*{message}"):
        raise_for_problems(report)
    unknown = defect in ("class unknown to the file", "image key missing")
    assert len(report.problems) == 1 or unknown


def test_classes_without_annotation_and_in_other_order(tmp_path):
    data = content()
    for annotation in data["annotations"]:
        annotation["category_id"] = 3
    report = check_annotations(coco(tmp_path, data))
    assert report.problems == [] and "1 of 2 classes have no annotation: 'dog'" in report.warnings[0]
    report = check_annotations(coco(tmp_path, content()), classes=("dog", "cat"))
    assert report.problems == [] and "the classes are in another order than the categories of a.json" in report.warnings[0]
    report = check_annotations(tmp_path, classes=("cat",))
    assert report.problems == [] and "1 categories of a.json are not among the classes: 'dog'" in report.warnings[0]
    data["annotations"] = []
    report = check_annotations(coco(tmp_path, data))
    assert len(report.problems) == 1 and "no annotation of any of the classes 'cat', 'dog'" in report.problems[0]
    data = content()
    for annotation in data["annotations"]:
        annotation.update(keypoints=[0] * 9, num_keypoints=0)
    assert "no annotation has a labelled keypoint" in check_annotations(coco(tmp_path, data)).problems[0]


def test_rare_defects_are_warnings(tmp_path):
    """COCO itself has a box of height 0; that must not stop anybody."""
    data = content()
    sound = data["annotations"][0]
    data["annotations"] += [{**sound, "id": number} for number in range(100, 1100)]
    data["annotations"][5]["bbox"] = [2, 3, 10, 0]
    data["annotations"][6]["segmentation"] = [[2, 3, 12, 3, 12, 20.9], [-1.4, 3, 12, 3, 12, 11]]
    report = check_annotations(coco(tmp_path, data))
    assert report.problems == []
    text = "\n".join(report.warnings)
    assert "1 of 1003 annotations have a bbox without extent: annotation 102 (image 10)" in text
    assert "1 of 1003 annotations have a polygon that reaches out of the image: annotation 103" in text
    data["annotations"][7]["bbox"] = [2, 3, 0, 4]
    assert len(check_annotations(coco(tmp_path, data)).problems) == 2


def test_images_of_annotations(tmp_path):
    data = content()
    for image in data["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    (problem,) = check_annotations(coco(tmp_path, data)).problems
    assert "none of the 4 images of the annotation file, such as 'train/0.jpg', is in" in problem
    assert "but there is '0.jpg': change data_prefix" in problem
    data = content()
    for image in data["images"]:
        image["file_name"] = f"x{image['file_name']}"
    (problem,) = check_annotations(coco(tmp_path, data)).problems
    assert "it holds 4 .jpg: 0.jpg, 1.jpg and 2 more. Do the file and the folder belong to the same split?" in problem
    (coco(tmp_path, content()) / "img" / "1.jpg").write_bytes(b"")
    (problem,) = check_annotations(tmp_path).problems
    assert "1.jpg' is an empty file" in problem
    cut_off(coco(tmp_path, content()) / "img" / "1.jpg")
    assert check_annotations(tmp_path).problems == []
    assert "cannot read image" in check_annotations(tmp_path, full=True).problems[0]


def test_missing_annotation_file_and_folder(tmp_path):
    root = tmp_path / "coco"
    root.mkdir()
    coco(root, content())
    report = check_coco(root / "b.json", root / "images", label="train")
    assert len(report.problems) == 2
    assert "annotation file" in report.problems[0] and "there is no 'b.json' in" in report.problems[0] and "'a.json'" in report.problems[0]
    assert "image folder" in report.problems[1] and "Did you mean 'img'?" in report.problems[1]
    report = check_coco(tmp_path / "a.json", root / "img")
    assert f"but there is '{root / 'a.json'}': point the data root at '{root}'" in report.problems[0]
    report = check_coco(root / "img", root / "img")
    assert "img' is a folder, not a file" in report.problems[0]


def test_quick_check_measures_few_images(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_module, "QUICK_IMAGES", 2)
    (coco(tmp_path, content()) / "img" / "1.jpg").write_bytes(b"")
    assert check_annotations(tmp_path).problems == []
    assert len(check_annotations(tmp_path, full=True).problems) == 1


# Layouts and the command


def test_error_names_the_first_and_counts_all():
    reports = [DenseReport("train", [f"train: {n}" for n in range(4)]), DenseReport("val", [f"val: {n}" for n in range(4)])]
    with pytest.raises(DenseDataError) as error:
        raise_for_problems(*reports)
    lines = str(error.value).splitlines()
    assert lines[0] == "8 problems with the data:" and lines[1:6] == [f"  train: {n}" for n in range(4)] + ["  val: 0"]
    assert lines[6] == "  and 3 more" and "tools/prepare_data.py check ROOT --layout" in lines[7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_data_is_good(tmp_path, layout, capsys):
    assert set(LAYOUTS) == set(LAYOUT_SPLITS)
    root = tmp_path / "shapes"
    write_shapes(root, layout, train=6, val=3, size=64)
    for full in (False, True):
        reports = check_layout(root, layout, full=full)
        assert [report.images for report in reports] == [6, 3] and not any(report.problems for report in reports)
        assert sum(sum(report.counts.values()) for report in reports) > 10
    capsys.readouterr()
    assert main(["check", str(root), "--layout", layout]) == 0
    output = capsys.readouterr().out
    assert "no problem found in 9 images" in output and LAYOUT_SPLITS[layout][0] in output and "class " in output
    victim = next(path for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png") and "labelIds" not in path.name)
    victim.write_bytes(b"")
    listing = tmp_path / "list.txt"
    assert main(["check", str(root), "--layout", layout, "--list", str(listing)]) == 1
    assert "1 problem found" in capsys.readouterr().out and f"{victim.name}' is an empty file" in listing.read_text()


def test_command_line(tmp_path, capsys):
    root = tmp_path / "shapes"
    write_shapes(root, "ade20k", train=6, val=3, size=64)
    assert main(["check", str(root), "--layout", "ade20k", "--split", "training", "--num-classes", "6", "--show", "1"]) == 1
    output = capsys.readouterr().out
    assert "holds the values 7, but 6 classes have the values 1 to 6" in output and "more (--list FILE" in output
    assert "validation" not in output
    assert main(["check", str(root), "--layout", "ade20k"]) == 0
    assert "143 of 150 classes occur in no map" in capsys.readouterr().out
    for arguments, message in (
        ([str(root), "--layout", "coco", "--num-classes", "6"], "--num-classes belongs to --layout ade20k or cityscapes, got"),
        ([str(root), "--num-classes", "6"], "--num-classes belongs to --layout ade20k"),
        ([str(root), "--layout", "coco", "--min-size", "6"], "--min-size is for folders of classes"),
        ([str(root), "--layout", "ade20k", "--split", "train"], "has no split 'train'. Did you mean 'training'"),
        ([str(tmp_path / "shape"), "--layout", "ade20k"], "data folder '.*shape' does not exist.*Did you mean 'shapes'"),
    ):
        assert main(["check", *arguments]) == 2
        assert message.split(".*")[-1] in capsys.readouterr().err
    with pytest.raises(DenseDataError, match="unknown layout 'ade'"):
        check_layout(root, "ade")
    assert main(["check", str(root), "--layout", "coco"]) == 1
    assert "annotation file" in capsys.readouterr().out


def test_paths_of_all_kinds(tmp_path, monkeypatch):
    pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert check_segmentation("img", "map", reduce_zero_label=True).problems == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_segmentation("~/img", os.path.join("~", "map"), reduce_zero_label=True).counts == {"0": 840, "1": 912}

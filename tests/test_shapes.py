"""Drawn data sets: exact masks, layouts that the real readers take, the same bytes every time."""

import contextlib
import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_ssm.data import scenes
from vision_ssm.data.figures import KEYPOINTS, SKELETON, _limb, draw_figures
from vision_ssm.data.masks import mask_box, mask_polygons, mask_runs
from vision_ssm.data.prepare import main
from vision_ssm.data.scenes import SHAPES, UNLABELLED, draw_shapes, has_crowd, is_empty
from vision_ssm.data.shapes import (
    CATEGORY_IDS,
    CITYSCAPES_IDS,
    CLASSES,
    COCO_NAMES,
    LAYOUTS,
    PALETTE,
    semantic_map,
    write_shapes,
)
from vision_ssm.data.writing import PrepareError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
TRAIN, VAL, SIZE = 16, 10, 96  # the sixth picture holds a crowd, the tenth nothing


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    for layout in LAYOUTS:
        assert write_shapes(root / layout, layout, train=TRAIN, val=VAL, size=SIZE)
    return {layout: root / layout for layout in LAYOUTS}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scene(layout: str, split: int, index: int) -> scenes.Scene:
    """What the data of the fixture must show."""
    height, width = ((SIZE, SIZE), (SIZE * 3 // 4, SIZE), (SIZE, SIZE * 3 // 4))[index % 3]
    if layout == "cityscapes":
        height, width = SIZE, 2 * SIZE
    draw = draw_figures if layout == "coco-keypoints" else draw_shapes
    return draw(0, split, index, (height, width), SIZE)


def annotations(folder: Path, kind: str, split: str) -> dict:
    return json.loads((folder / "annotations" / f"{kind}_{split}2017.json").read_text())


def coco_api(content: dict):
    from pycocotools.coco import COCO

    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def random_masks(count: int = 150):
    random = np.random.RandomState(0)
    for _ in range(count):
        yield random.rand(*random.randint(1, 14, 2)) < random.rand()


def test_polygons_and_runs_give_the_mask_back():
    from pycocotools import mask as api

    holes = 0
    for mask in random_masks():
        height, width = mask.shape
        polygons = mask_polygons(mask)
        corners = [np.reshape(polygon, (-1, 2)) for polygon in polygons]
        areas = [0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) for x, y in (c.T for c in corners)]
        assert all(area > 0 for area in areas) and sum(areas) == mask.sum()  # clockwise on the screen, no overlap
        runs = mask_runs(mask)
        assert sum(runs["counts"]) == mask.size and runs["size"] == [height, width]
        assert np.array_equal(api.decode(api.frPyObjects(runs, height, width)), mask)
        if mask.any():
            floats = [list(map(float, polygon)) for polygon in polygons]
            drawn = api.decode(api.merge(api.frPyObjects(floats, height, width)))
            assert np.array_equal(drawn, mask)
            assert mask_box(mask) == api.toBbox(api.frPyObjects(runs, height, width)).tolist()
        padded = np.pad(mask, 1)
        holes += int((~padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]).sum())
    assert holes > 100


def test_polygons_of_known_masks():
    square = np.zeros((4, 5), dtype=bool)
    square[1:3, 2:5] = True
    (polygon,) = mask_polygons(square)
    corners = list(zip(polygon[::2], polygon[1::2]))
    first = corners.index((2, 1))
    assert corners[first:] + corners[:first] == [(2, 1), (5, 1), (5, 3), (2, 3)]
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    assert len(mask_polygons(ring)) == 2  # no polygon has a hole: cut through its middle
    assert len(mask_polygons(np.eye(2, dtype=bool))) == 2  # touching corners do not join
    assert mask_polygons(np.zeros((2, 2), dtype=bool)) == []
    assert mask_runs(square) == {"counts": [9, 2, 2, 2, 2, 2, 1], "size": [4, 5]}
    assert mask_runs(~square)["counts"][0] == 0 and mask_box(square) == [2, 1, 3, 2]


def test_scenes_hold_what_they_promise():
    classes, smallest, several, unlabelled = set(), 10**6, 0, 0
    for index in range(40):
        drawn = draw_shapes(3, 0, index, (128, 128), 128)
        assert drawn.image.shape == (128, 128, 3) and drawn.image.dtype == np.uint8
        present = set(np.unique(drawn.owner).tolist()) - {0, UNLABELLED}
        assert present == set(range(1, len(drawn.classes) + 1))  # none is hidden altogether
        assert any(drawn.crowd) == has_crowd(index) and (not drawn.classes) == is_empty(index)
        classes |= set(drawn.classes)
        unlabelled += bool((drawn.owner == UNLABELLED).any())
        for number, (name, crowd) in enumerate(zip(drawn.classes, drawn.crowd), start=1):
            mask = drawn.owner == number
            several += name != "ring" and not crowd and len(mask_polygons(mask)) > 1
            smallest = min(smallest, int(mask.sum()))
    assert classes == set(SHAPES) and smallest > 80 and several > 3 and 5 < unlabelled < 25


def test_instances_differ_from_the_ground():
    """A shape that looks like its ground could not be learnt."""
    for index in range(20):
        drawn = draw_shapes(0, 1, index, (128, 128), 128)
        ground = np.median(drawn.image[drawn.owner == 0], 0)
        for number in range(1, len(drawn.classes) + 1):
            away = np.abs(drawn.image[drawn.owner == number] - ground).sum(-1)
            assert np.median(away) > 40, (index, drawn.classes[number - 1])


def test_semantic_maps(folders):
    for index in range(TRAIN):
        expected = semantic_map(scene("ade20k", 0, index))
        stored = np.asarray(Image.open(folders["ade20k"] / f"annotations/training/ADE_train_{index + 1:08d}.png"))
        assert stored.dtype == np.uint8 and np.array_equal(stored, np.where(expected == 255, 0, expected + 1))
        picture = Image.open(folders["ade20k"] / f"images/training/ADE_train_{index + 1:08d}.jpg")
        drawn = scene("ade20k", 0, index)
        assert picture.format == "JPEG" and np.abs(np.asarray(picture, dtype=int) - drawn.image).mean() < 5
    for path in (folders["cityscapes"] / "gtFine").rglob("*_gtFine_labelTrainIds.png"):
        labels = np.asarray(Image.open(path))
        own = np.asarray(Image.open(str(path).replace("labelTrainIds", "labelIds")))
        assert np.array_equal(own, np.array([*CITYSCAPES_IDS, 0])[np.where(labels == 255, 7, labels)])
    assert {path.name for path in (folders["cityscapes"] / "gtFine").iterdir()} == {"train", "val"}
    assert len(list((folders["cityscapes"] / "leftImg8bit/val").glob("*/*_leftImg8bit.png"))) == VAL
    assert len(CLASSES) == len(PALETTE) == len(CITYSCAPES_IDS) and CLASSES[1:] == SHAPES == tuple(CATEGORY_IDS)


def test_mmseg_reads_the_maps(folders):
    datasets = pytest.importorskip("mmseg.datasets")
    pipeline = [dict(type="LoadImageFromFile"), dict(type="mmseg.LoadAnnotations")]
    ade = dict(
        data_root=str(folders["ade20k"]), pipeline=pipeline,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    )  # fmt: skip
    small = datasets.BaseSegDataset(reduce_zero_label=True, metainfo=dict(classes=CLASSES, palette=PALETTE), **ade)
    city = datasets.CityscapesDataset(
        data_root=str(folders["cityscapes"]), pipeline=pipeline,
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
    )  # fmt: skip
    assert len(city) == VAL and city[0]["gt_seg_map"].shape == (SIZE, 2 * SIZE)
    labels = [np.unique(city[index]["gt_seg_map"]).tolist() for index in range(VAL)]
    assert set(sum(labels, [])) <= {*range(7), 255}
    for dataset in (datasets.ADE20KDataset(**ade), small):
        assert len(dataset) == TRAIN
        for index in range(TRAIN):
            sample = dataset[index]
            assert sample["img"].shape[:2] == sample["gt_seg_map"].shape
            assert np.array_equal(sample["gt_seg_map"], semantic_map(scene("ade20k", 0, index)))


def test_annotations_are_exact(folders):
    content = annotations(folders["coco"], "instances", "train")
    api = coco_api(content)
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(n, name) for name, n in CATEGORY_IDS.items()]
    assert len(content["images"]) == TRAIN and len({a["id"] for a in content["annotations"]}) == len(api.anns)
    crowds = 0
    for index, image in enumerate(content["images"]):
        drawn = scene("coco", 0, index)
        assert (image["height"], image["width"]) == drawn.owner.shape
        with Image.open(folders["coco"] / "train2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        found = api.loadAnns(api.getAnnIds(image["id"]))
        assert [CATEGORY_IDS[name] for name in drawn.classes] == [a["category_id"] for a in found]
        for number, annotation in enumerate(found, start=1):
            mask = drawn.owner == number
            assert np.array_equal(api.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() and annotation["bbox"] == mask_box(mask)
            assert annotation["iscrowd"] == int(drawn.crowd[number - 1]) == int(isinstance(annotation["segmentation"], dict))
            crowds += annotation["iscrowd"]
    assert crowds == 1 and not api.getAnnIds(content["images"][9]["id"])
    val = annotations(folders["coco"], "instances", "val")
    for part in ("images", "annotations"):
        assert not {entry["id"] for entry in content[part]} & {entry["id"] for entry in val[part]}


def test_mmdet_reads_the_annotations(folders, tmp_path):
    datasets = pytest.importorskip("mmdet.datasets")
    write_shapes(tmp_path / "named", "coco", train=3, val=1, size=SIZE, coco_names=True)
    keywords = dict(ann_file="annotations/instances_train2017.json", data_prefix=dict(img="train2017/"))
    with contextlib.redirect_stdout(io.StringIO()):
        own = datasets.CocoDataset(data_root=str(folders["coco"]), metainfo=dict(classes=SHAPES), **keywords)
        named = datasets.CocoDataset(data_root=str(tmp_path / "named"), **keywords)  # COCO's own 80 classes
        trained = datasets.CocoDataset(
            data_root=str(folders["coco"]), metainfo=dict(classes=SHAPES), filter_cfg=dict(filter_empty_gt=True), **keywords
        )
    assert len(own) == TRAIN and len(trained) == TRAIN - 1  # one picture is empty
    for index in range(TRAIN):
        drawn, found = scene("coco", 0, index), own.get_data_info(index)["instances"]
        assert [SHAPES[instance["bbox_label"]] for instance in found] == drawn.classes
        assert [instance["ignore_flag"] for instance in found] == [int(crowd) for crowd in drawn.crowd]
    names = [named.metainfo["classes"][i["bbox_label"]] for index in range(3) for i in named.get_data_info(index)["instances"]]
    drawn_names = [name for index in range(3) for name in scene("coco", 0, index).classes]
    assert names == [COCO_NAMES[CATEGORY_IDS[name]] for name in drawn_names]
    assert tuple(COCO_NAMES.values()) == named.metainfo["classes"]


@pytest.mark.parametrize(("layout", "kind", "metric"), [
    ("coco", "instances", "bbox"), ("coco", "instances", "segm"), ("coco-keypoints", "person_keypoints", "keypoints"),
])
def test_truth_against_itself_is_perfect(folders, layout, kind, metric):
    from pycocotools.cocoeval import COCOeval

    content = annotations(folders[layout], kind, "train")
    truth = coco_api(content)
    results = [
        {**annotation, "score": 1.0} for annotation in content["annotations"]
        if not annotation["iscrowd"] and (metric != "keypoints" or annotation["num_keypoints"])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        if metric == "segm":
            results = [{**result, "segmentation": truth.annToRLE(result)} for result in results]
        for result in results:
            if metric != "segm":
                result.pop("segmentation")
        evaluation = COCOeval(truth, truth.loadRes(results), metric)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0, abs=1e-9) and len(results) > 15


def test_keypoints(folders):
    content = annotations(folders["coco-keypoints"], "person_keypoints", "train")
    (category,) = content["categories"]
    assert category["id"] == 1 and category["name"] == "person"
    assert category["keypoints"] == list(KEYPOINTS) and category["skeleton"] == [list(bone) for bone in SKELETON]
    assert len(KEYPOINTS) == 17 and max(map(max, SKELETON)) == 17
    seen = np.zeros((17, 3), dtype=int)
    unlabelled = 0
    for index, image in enumerate(content["images"]):
        drawn = scene("coco-keypoints", 0, index)
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert len(found) == len(drawn.classes)
        for number, annotation in enumerate(found, start=1):
            points = np.reshape(annotation["keypoints"], (17, 3))
            x, y, visibility = points.T
            assert annotation["num_keypoints"] == (visibility > 0).sum() and set(visibility) <= {0, 1, 2}
            assert not points[visibility == 0].any()
            assert (x < image["width"]).all() and (y < image["height"]).all() and (points >= 0).all()
            assert (drawn.owner[y, x][visibility == 2] == number).all()  # what is visible lies on the figure
            unlabelled += annotation["num_keypoints"] == 0 and not annotation["iscrowd"]
            if annotation["num_keypoints"]:
                seen[np.arange(17), visibility] += 1
            else:
                assert annotation["iscrowd"] or annotation["area"] < 0.1 * SIZE**2
    assert (seen[:, 2] > 0).all() and seen[:, 1].sum() > 20 and seen[:, 0].sum() > 10 and unlabelled > 0
    assert sum(annotation["iscrowd"] for annotation in content["annotations"]) == 1


def test_mirrored_left_limbs_are_right_limbs():
    """Otherwise a flip, which exchanges the names of left and right, would teach nonsense."""
    canvas = scenes.blank(0, 0, 0, (64, 64), 64)
    colours = np.zeros(3), np.ones(3)
    ends = np.array([[20.0, 12.0], [45.0, 50.0]])
    mirrored = ends * (-1, 1) + (63, 0)
    pictures = []
    for (start, end), hand in ((ends, 1), (mirrored, -1), (mirrored, 1)):
        part = _limb(canvas, start, end, 6.0, hand, colours)
        picture = np.full((64, 64), 0.5)
        picture[part.window] = np.where(part.distance < 0, part.colour[..., 0], 0.5)
        pictures.append(picture)
    left, right, wrong = pictures
    assert np.allclose(left[:, ::-1], right, atol=1e-9) and np.abs(left[:, ::-1] - wrong).mean() > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bytes_again(folders, layout, tmp_path):
    write_shapes(tmp_path / "again", layout, train=2, val=1, size=SIZE)
    again = snapshot(tmp_path / "again")
    first = snapshot(folders[layout])
    pictures = [name for name in again if name.endswith((".jpg", ".png"))]
    assert len(pictures) >= 3 and all(again[name] == first[name] for name in pictures)
    write_shapes(tmp_path / "third", layout, train=2, val=1, size=SIZE)
    assert snapshot(tmp_path / "third") == again
    write_shapes(tmp_path / "other", layout, train=2, val=1, size=SIZE, seed=1)
    other = snapshot(tmp_path / "other")
    assert set(other) == set(again) and not any(other[name] == again[name] for name in pictures)


def test_readme_says_how_it_was_made(folders):
    text = (folders["coco"] / "README.txt").read_text()
    assert "38: square" in text and f"{TRAIN} training and {VAL} validation" in text
    assert f"shapes OUT --layout coco --train {TRAIN} --val {VAL} --size {SIZE} --seed 0" in text
    assert "96 x 96 and 72 x 96 and 96 x 72 pixels" in text
    assert "96 x 192 pixels" in (folders["cityscapes"] / "README.txt").read_text()


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "shapes"
    write_shapes(out, "ade20k", train=1, val=1, size=64)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not write_shapes(out, "ade20k", train=1, val=1, size=64)
    for layout, train in (("ade20k", 2), ("coco", 1)):
        with pytest.raises(PrepareError, match="not empty and holds something other than these shapes. Choose another"):
            write_shapes(out, layout, train=train, val=1, size=64)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(PrepareError, match="README.txt' is a file; the shapes need a folder of their own"):
        write_shapes(out / "README.txt", "coco")


@pytest.mark.parametrize(("keywords", "message"), [
    (dict(layout="ade20"), "unknown layout 'ade20'. Did you mean 'ade20k'"),
    (dict(size=63), "--size must be at least 64, got 63"),
    (dict(val=0), "--val must be at least 1, got 0"),
    (dict(seed=-1), "--seed must be from 0 to 4294967295, got -1"),
    (dict(coco_names=True), "--coco-names belongs to --layout coco, got --layout ade20k"),
])
def test_values_out_of_range(tmp_path, keywords, message):
    with pytest.raises(PrepareError, match=message):
        write_shapes(tmp_path / "x", **{"layout": "ade20k", **keywords})
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    original, written = Image.Image.save, []

    def save(image, path, *rest, **options):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        original(image, path, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    assert main(["shapes", str(tmp_path / "shapes"), "--layout", "coco", "--train", "9", "--val", "1"]) == 2
    assert len(written) == 3 and os.listdir(tmp_path) == []


def test_command(tmp_path, capsys):
    line = ["shapes", str(tmp_path / "s"), "--layout", "coco", "--train", "2", "--val", "1", "--size", "64", "--coco-names"]
    assert main(line) == 0
    output = capsys.readouterr()
    assert "written to" in output.out and "(coco): 2 train, 1 val images" in output.out and "drawing train" in output.err
    assert main(line) == 0 and "already complete in" in capsys.readouterr().out
    assert len(annotations(tmp_path / "s", "instances", "val")["categories"]) == 80
    with pytest.raises(SystemExit):
        main(["shapes", str(tmp_path / "t")])
    assert "--layout" in capsys.readouterr().err

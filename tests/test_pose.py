"""Top-down pose estimation: geometry, heat maps, decoding, the model, COCO's numbers, runs, configs, prediction."""

import copy
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from engine_support import CONFIGS, EXACT, ROOT, differences, read_config, run_python, runs_are_exact
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS
from PIL import Image
from torch import nn

from vision_ssm import CheckpointError, list_models
from vision_ssm.data import COCO_PERSON, CocoKeypoints, Draw, KeypointSet, TopDownTransform, collate_poses
from vision_ssm.data.top_down import apply_matrix, box_region, fit_aspect, heat_maps, warp_matrix
from vision_ssm.engine import (
    CocoKeypointMetric,
    HeatmapHead,
    ParameterGroups,
    PosePredictor,
    Runner,
    TopDownPose,
    draw_poses,
    load_pose_weights,
    object_keypoint_similarity,
    oks_nms,
    read_training,
)
from vision_ssm.engine.config import UsageError, check_option
from vision_ssm.engine.pose import decode_heat_maps, heat_map_loss, keypoint_accuracy
from vision_ssm.engine.pose_figures import LEFT, RIGHT
from vision_ssm.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # schedules without training

LEAVES = sorted((CONFIGS / "pose").glob("*.py"))
SHAPES = CONFIGS / "pose" / "heatmap_vmamba_micro_shapes.py"
COUNT = len(COCO_PERSON)
SIZE = (64, 48)  # input of the small model
SMALL = dict(train=False, input_size=SIZE)
MICRO = dict(name="vmamba_micro", dims=8, depths=(1, 1), out_indices=(1,))
# A standing person in a box of 1 x 1: columns are x and y
FIGURE = np.array([
    (0.50, 0.10), (0.54, 0.08), (0.46, 0.08), (0.60, 0.10), (0.40, 0.10), (0.72, 0.25), (0.28, 0.25), (0.85, 0.42),
    (0.15, 0.42), (0.95, 0.55), (0.05, 0.55), (0.64, 0.55), (0.36, 0.55), (0.68, 0.75), (0.32, 0.75), (0.70, 0.97),
    (0.30, 0.97),
])  # fmt: skip
COLORS = np.random.default_rng(3).integers(60, 256, (COUNT, 3))


def annotation(number: int, image_id: int, points: np.ndarray, box: list[float], **changes) -> dict:
    keypoints = np.column_stack([points, np.full(len(points), 2)])
    return dict(
        id=number, image_id=image_id, category_id=1, bbox=box, area=box[2] * box[3] * 0.6, iscrowd=0,
        num_keypoints=len(points), keypoints=keypoints.ravel().tolist(),
    ) | changes  # fmt: skip


def annotation_file(images: list[dict], annotations: list[dict]) -> dict:
    skeleton = [[first + 1, second + 1] for first, second in COCO_PERSON.skeleton]
    category = dict(id=1, name="person", keypoints=list(COCO_PERSON.names), skeleton=skeleton)
    return dict(images=images, annotations=annotations, categories=[category])


def write_persons(root: Path, splits=(("train", 8), ("val", 4))) -> Path:
    """Pictures of one or two figures, a coloured dot at every keypoint, in COCO's layout."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in splits:
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            canvas = generator.integers(0, 40, (96, 128, 3)).astype(np.uint8)
            for place in range(1 + image_id % 2):
                box = [8 + 60 * place + generator.uniform(0, 6), generator.uniform(2, 10), 40.0, 80.0]
                points = FIGURE * box[2:] + box[:2]
                for (x, y), color in zip(points, COLORS.tolist(), strict=True):
                    cv2.circle(canvas, (round(x), round(y)), 3, color, cv2.FILLED)
                annotations.append(annotation(len(annotations) + 1, image_id, points, box))
            name = f"{image_id:012}.jpg"
            Image.fromarray(canvas).save(root / f"{split}2017" / name, quality=95, subsampling=0)
            images.append(dict(id=image_id, file_name=name, width=128, height=96))
        content = annotation_file(images, annotations)
        (root / "annotations" / f"person_keypoints_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def persons(tmp_path_factory) -> Path:
    """Folder of small pictures of persons; not to be changed."""
    return write_persons(tmp_path_factory.mktemp("persons"))


def small_run(data: Path, work_dir: Path, epochs: int = 2) -> Config:
    """The config of the drawn figures, cut down to a run of seconds."""
    cfg = read_config(SHAPES)
    cfg.work_dir = str(work_dir)
    cfg.model.update(backbone=dict(**MICRO, drop_path_rate=0.1), deconv_channels=(16,))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.root = str(data)
        loader.dataset.transform.input_size = SIZE
    cfg.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
    cfg.param_scheduler = [
        dict(type="LinearLR", start_factor=0.5, begin=0, end=1, by_epoch=True, convert_to_iter_based=True)
    ]
    cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    return cfg


# Keypoints


def test_the_definition_of_a_person_is_consistent():
    assert (COUNT, len(COCO_PERSON.sigmas), len(COCO_PERSON.skeleton)) == (17, 17, 19)
    for place, other in enumerate(COCO_PERSON.mirrored):
        name = COCO_PERSON.names[place]
        swapped = {"left": "right", "right": "left"}.get(name.split("_")[0])
        assert COCO_PERSON.names[other] == (name if swapped is None else f"{swapped}_{name.split('_')[1]}")
    for first, second in COCO_PERSON.skeleton:  # the skeleton is its own mirror image
        pair = {COCO_PERSON.mirrored[first], COCO_PERSON.mirrored[second]}
        assert any(pair == set(line) for line in COCO_PERSON.skeleton)
    assert {COCO_PERSON.names[place].split("_")[-1] for place in set(range(17)) - set(COCO_PERSON.upper)} == {
        "hip", "knee", "ankle",
    }  # fmt: skip
    assert KeypointSet.build(json.loads(json.dumps(COCO_PERSON.as_dict()))) == COCO_PERSON


@pytest.mark.parametrize(
    ("definition", "error", "message"),
    [
        (dict(names=("a", "b"), sigmas=(0.1,)), ValueError, "needs a name and a positive sigma"),
        (dict(names=("a", "b"), sigmas=(0.1, 0.1), flip_pairs=((0, 2),)), ValueError, r"keypoint 2 .* not one of 0 \.\. 1"),
        (dict(names=("a", "b"), sigmas=(0.1, 0.1), flip_pairs=((0, 1), (1, 0))), ValueError, "one flip pair only"),
        (dict(names=("a",), sigmas=(0.1,), flips=()), TypeError, "unknown keyword 'flips'"),
    ],
)
def test_wrong_definitions(definition, error, message):
    with pytest.raises(error, match=message):
        KeypointSet.build(definition)


# Geometry


@pytest.mark.parametrize("box", [(10, 20, 30, 120), (5, 5, 200, 40)])
def test_region_holds_the_box_with_the_ratio_of_the_input(box):
    center, size = box_region(box)
    assert center.tolist() == [box[0] + box[2] / 2, box[1] + box[3] / 2]
    fitted = fit_aspect(size, 0.75)
    assert fitted[0] / fitted[1] == pytest.approx(0.75)
    assert (fitted >= 1.25 * np.array(box[2:]) - 1e-9).all()
    assert np.isclose(fitted, 1.25 * np.array(box[2:])).any()  # no larger than needed


def test_warp_puts_the_region_onto_the_input():
    center, size = np.array([50.0, 70.0]), np.array([60.0, 80.0])
    matrix = warp_matrix(center, size, 0.0, (256, 192))
    corners = center + np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]) * size
    assert np.allclose(apply_matrix(matrix, corners), [(0, 0), (192, 0), (192, 256), (0, 256)])
    turned = warp_matrix(center, size, 90.0, (256, 192))
    # the region is turned clockwise: what lies to the right of the centre comes to lie above it
    assert np.allclose(apply_matrix(turned, center + [10, 0]), np.array([96, 128]) + [0, -32])


@pytest.mark.parametrize("box", [(10, 20, 30, 60), (10, 5, 90, 70)])
def test_warp_and_back_is_the_identity(box):
    generator = np.random.default_rng(0)
    points = generator.uniform(0, 96, (20, 2))
    for angle in (0.0, 33.0, -80.0):
        center, size = box_region(box)
        matrix = warp_matrix(center, fit_aspect(size, 0.75), angle, (256, 192))
        back = apply_matrix(cv2.invertAffineTransform(matrix), apply_matrix(matrix, points))
        assert np.abs(back - points).max() < 1e-6
    # and the pixels: a white dot, seen in the input, is brought back to within half a pixel
    transform = TopDownTransform(train=False)
    for x, y in ((15, 30), (35, 70)):
        image = np.zeros((96, 128, 3), np.uint8)
        cv2.circle(image, (x, y), 2, (255, 255, 255), cv2.FILLED)
        sample = transform.evaluation_sample(image, box)
        assert sample["image"].shape == (3, 256, 192)
        seen = sample["image"][0].numpy() > (0.5 - transform.mean[0]) / transform.std[0]
        assert seen.sum() > 20
        found = apply_matrix(sample["inverse"].numpy(), np.argwhere(seen)[:, ::-1].mean(0))
        assert np.abs(found - [x, y]).max() < 0.5


def decoded(sample: dict) -> np.ndarray:
    """Keypoints of a training sample's heat maps, in pixels of the input."""
    return 4 * decode_heat_maps(sample["target"][None])[0][0].numpy()


@pytest.mark.parametrize("seed", range(3))
def test_mirroring_equals_a_mirrored_picture_with_pairs_exchanged(persons, seed):
    dataset = CocoKeypoints(persons, "train", dict(train=True))
    image, box, labels = dataset.image(0), dataset.boxes[0], dataset.labels[0]
    samples = []
    mirrored_labels = labels[COCO_PERSON.mirrored].copy()
    mirrored_labels[:, 0] = 127 - mirrored_labels[:, 0]
    mirrored_box = [127 - box[0] - box[2], *box[1:]]
    given = ((1.0, image, box, labels), (0.0, image[:, ::-1].copy(), mirrored_box, mirrored_labels))
    for flip, *picture in given:
        np.random.seed(seed)
        samples.append(TopDownTransform(train=True, flip=flip).training_sample(*picture))
    assert torch.equal(samples[0]["target"], samples[1]["target"]) and torch.equal(samples[0]["weight"], samples[1]["weight"])
    # the filter has steps of 1/32 of a pixel, which the two may round differently
    assert (samples[0]["image"] - samples[1]["image"]).abs().mean() < 0.02
    np.random.seed(seed)
    plain = TopDownTransform(train=True, flip=0.0).training_sample(image, box, labels)
    assert (plain["image"] - samples[1]["image"]).abs().mean() > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_augmented_heat_maps_stay_on_their_dots(persons, seed, flip):
    dataset = CocoKeypoints(persons, "train", dict(train=True, half_body=0, flip=flip))
    colors = COLORS[COCO_PERSON.mirrored] if flip else COLORS  # the mirrored right wrist is a left one
    sample = dataset[Draw(1, (seed, 0, 0))]
    pixels = sample["image"].permute(1, 2, 0) * torch.tensor((0.229, 0.224, 0.225))
    pixels = ((pixels + torch.tensor((0.485, 0.456, 0.406))) * 255).numpy()
    hits = []
    for place in (9, 10, 13, 14, 15, 16):
        if sample["weight"][place] == 0:
            continue
        x, y = decoded(sample)[place].astype(int)
        if 4 <= x < 188 and 4 <= y < 252:
            hits.append(np.abs(pixels[y - 4 : y + 5, x - 4 : x + 5] - colors[place]).max(2).min() < 40)
    assert len(hits) >= 2 and all(hits)


def test_half_body_zooms_into_the_upper_or_the_lower_part(persons):
    options = dict(train=True, flip=0, shift_prob=0, scale=(1, 1), rotation_prob=0)
    dataset = CocoKeypoints(persons, "train", dict(**options, half_body=1.0))
    seen = set()
    for number in range(12):
        weight = dataset[Draw(0, (number,))]["weight"].numpy()
        assert 0 < weight.sum() < COUNT
        shown = "upper" if weight[:9].all() and not weight[15:].any() else "lower"
        assert shown == "upper" or (weight[11:].all() and not weight[:5].any())
        seen.add(shown)
    assert seen == {"upper", "lower"}
    assert CocoKeypoints(persons, "train", dict(**options, half_body=1.0, half_body_least=18))[0]["weight"].all()


def test_samples_follow_their_draw_alone(persons):
    dataset = CocoKeypoints(persons, "train", dict(train=True, input_size=SIZE))
    np.random.seed(1)
    first = dataset[Draw(2, (0, 1, 5))]
    state = np.random.get_state()[1].copy()
    np.random.seed(2)
    again, other = dataset[Draw(2, (0, 1, 5))], dataset[Draw(2, (0, 2, 5))]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["target"], again["target"])
    assert not torch.equal(first["image"], other["image"])
    np.random.seed(1)
    assert (np.random.get_state()[1] == state).all()  # the global generator was left as it was


# Heat maps


def test_heat_maps_are_gaussians_around_the_nearest_pixel():
    points = np.array([(10.4, 20.6), (0, 0), (-3.0, 5.0), (-30.0, 5.0), (12, 12)])
    visible = np.array([True, True, True, True, False])
    maps, weight = heat_maps(points, visible, (64, 48), 2.0)
    assert maps.shape == (5, 64, 48) and weight.tolist() == [1, 1, 1, 0, 0]
    y, x = np.mgrid[:64, :48]
    expected = np.exp(-((x - 10) ** 2 + (y - 21) ** 2) / 8) * (np.abs(x - 10) <= 6) * (np.abs(y - 21) <= 6)
    assert np.allclose(maps[0], expected, atol=1e-6) and maps[0].max() == 1
    assert np.unravel_index(maps[1].argmax(), (64, 48)) == (0, 0)
    assert maps[2, 5, 0] == pytest.approx(np.exp(-9 / 8)) and maps[2].sum() > 0  # centre outside, edge inside
    assert not maps[3].any() and not maps[4].any()


def test_decoding_is_exact_and_moves_a_quarter_towards_the_higher_neighbour():
    generator = np.random.default_rng(0)
    points = np.column_stack([generator.integers(0, 48, 30), generator.integers(0, 64, 30)]).astype(float)
    maps, _ = heat_maps(points, np.ones(30, bool), (64, 48), 2.0)
    inside = (points >= 1).all(1) & (points < [47, 63]).all(1)
    found, scores = decode_heat_maps(torch.from_numpy(maps)[None])
    assert np.array_equal(found[0].numpy()[inside], points[inside]) and (scores == 1).all()
    assert np.array_equal(found[0].numpy()[~inside], points[~inside])
    maps = torch.zeros(1, 3, 8, 6)
    maps[0, :, 4, 3] = 1
    maps[0, 0, 4, 4] = 0.5
    maps[0, 1, 3, 3] = 0.5
    maps[0, 2, 4, 2], maps[0, 2, 5, 3] = 0.25, 0.25
    assert decode_heat_maps(maps)[0][0].tolist() == [[3.25, 4.0], [3.0, 3.75], [2.75, 4.25]]
    border = torch.zeros(1, 1, 8, 6)
    border[0, 0, 0, 5] = 1
    border[0, 0, 0, 4] = 0.9
    assert decode_heat_maps(border)[0][0].tolist() == [[5.0, 0.0]]


def test_loss_and_accuracy_leave_unlabelled_keypoints_out():
    points = np.array([(10.0, 20.0), (30.0, 40.0), (5.0, 5.0)])
    target, weight = heat_maps(points, np.array([True, True, False]), (64, 48), 2.0)
    target, weight = torch.from_numpy(target)[None], torch.from_numpy(weight)[None]
    wrong = target.clone()
    wrong[0, 2] = 7
    assert heat_map_loss(wrong, target, weight) == 0 and keypoint_accuracy(wrong, target, weight) == 1
    wrong[0, 1] += 0.5
    assert heat_map_loss(wrong, target, weight) == pytest.approx(0.25 / 3)  # one of three maps
    moved = {
        shift: torch.from_numpy(heat_maps(points + [shift, 0], np.ones(3, bool), (64, 48), 2.0)[0])[None]
        for shift in (2, 3)
    }  # 0.05 widths are 2.4 pixels
    assert keypoint_accuracy(moved[2], target, weight) == 1 and keypoint_accuracy(moved[3], target, weight) == 0
    assert keypoint_accuracy(wrong, target, torch.zeros_like(weight)) == 0


# Files


def changed(persons: Path, tmp_path: Path, change) -> dict:
    """Keywords of a dataset whose annotation file has been changed."""
    content = json.loads((persons / "annotations" / "person_keypoints_train2017.json").read_text())
    change(content)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(content))
    return dict(root=persons, split="train", ann_file=file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["annotations"][1]["keypoints"].pop(), ValueError, r"annotation 2 \(image '0{11}1.jpg'\) has 50 numbers for keypoints, expected 51"),
        (lambda c: c["annotations"][1].pop("bbox"), ValueError, "annotation 2 has no 'bbox'"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), ValueError, r"bbox is x, y, width, height, got \[1, 2, 3\]"),
        (lambda c: c["annotations"][1].update(image_id=99), ValueError, "annotation 2 belongs to image 99, which the file does not list"),
        (lambda c: c["images"][2].update(file_name="gone.jpg"), FileNotFoundError, "1 of 8 images that .* names are not in .*train2017': 'gone.jpg'"),
        (lambda c: c["images"][2].pop("width"), ValueError, "an image has no 'width'"),
        (lambda c: c.pop("images"), ValueError, "no COCO annotation file: it has no list 'images'"),
        (lambda c: c["categories"][0].pop("keypoints"), ValueError, "no category with the 17 keypoints nose .. right_ankle; it has person with 0"),
        (lambda c: [a.update(keypoints=[0] * 51) for a in c["annotations"]], ValueError, "has no person with a labelled keypoint"),
    ],
)  # fmt: skip
def test_wrong_annotations_are_named(persons, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        CocoKeypoints(**changed(persons, tmp_path, change))


def test_missing_and_broken_files(persons, tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation file 'annotations/person_keypoint_val2017.json' exists neither.* Did you mean 'person_keypoints_val2017.json'"):
        CocoKeypoints(persons, "val", ann_file="annotations/person_keypoint_val2017.json")
    with pytest.raises(FileNotFoundError, match="does not exist: there is no 'vals2017'.* Did you mean 'val2017'"):
        CocoKeypoints(persons, "val", image_folder="vals2017")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CocoKeypoints(tmp_path / "nothing", "val")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="no complete JSON file"):
        CocoKeypoints(persons, "val", ann_file=tmp_path / "cut.json")
    with pytest.raises(ValueError, match="unknown split 'vall'. Did you mean 'val'"):
        CocoKeypoints(persons, "vall")
    with pytest.raises(TypeError, match="annfile.*Did you mean 'ann_file'"):
        CocoKeypoints(persons, annfile="x")
    with pytest.raises(TypeError, match="input_sze.*Did you mean 'input_size'"):
        CocoKeypoints(persons, transform=dict(train=True, input_sze=64))
    with pytest.raises(ValueError, match="the stride 4 of the heat maps must divide"):
        TopDownTransform(train=True, input_size=(64, 50))

    def larger(content):
        content["images"][0]["width"] = 256

    dataset = CocoKeypoints(**changed(persons, tmp_path, larger))
    with pytest.raises(ValueError, match=r"000000000001.jpg' is 128 x 96 pixels, .* says 256 x 96"):
        dataset[0]


def test_which_persons_count(persons, tmp_path):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["keypoints"] = [0] * 51
        content["annotations"][2]["bbox"] = [200, 5, 10, 10]  # outside the image
        content["annotations"][3]["bbox"] = [-10, -5, 60, 500]

    dataset = CocoKeypoints(**changed(persons, tmp_path, change))
    whole = CocoKeypoints(persons)
    assert len(dataset) == len(whole) - 3 and whole.labels.shape == (len(whole), 17, 3)
    assert dataset.boxes[0].tolist() == [0, 0, 50, 95]


def write_detections(file: Path, rows: list[tuple]) -> Path:
    keys = ("image_id", "category_id", "bbox", "score")
    file.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
    return file


def test_boxes_of_a_detector(persons, tmp_path):
    rows = [(2, 1, [1, 2, 30, 40], 0.9), (1, 1, [3, 4, 50, 60], 0.4), (1, 2, [0, 0, 5, 5], 0.8), (3, 1, [0, 0, 9, 9], 0.1)]
    file = write_detections(tmp_path / "boxes.json", rows)
    dataset = CocoKeypoints(persons, "val", SMALL, detections=file, min_score=0.2)
    assert dataset.boxes.tolist() == [[1, 2, 30, 40], [3, 4, 50, 60]]
    batch = collate_poses([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, *SIZE) and batch["path"][0].endswith("000000000002.jpg")
    instance = batch["instance"]
    assert instance["box_score"].tolist() == pytest.approx([0.9, 0.4]) and instance["image_id"].tolist() == [2, 1]
    assert instance["inverse"].shape == (2, 2, 3) and instance["inverse"].dtype is torch.float64
    with pytest.raises(ValueError, match="detections have no keypoints to learn from"):
        CocoKeypoints(persons, "train", detections=file)
    with pytest.raises(ValueError, match="detection 0 is in image 77, which .* different splits"):
        CocoKeypoints(persons, "val", SMALL, detections=write_detections(tmp_path / "b.json", [(77, 1, [0, 0, 9, 9], 1.0)]))
    with pytest.raises(ValueError, match="no detection of category 1 with a score of 0.95"):
        CocoKeypoints(persons, "val", SMALL, detections=file, min_score=0.95)
    (tmp_path / "c.json").write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match="detection 0 has no 'category_id', 'bbox', 'score'"):
        CocoKeypoints(persons, "val", SMALL, detections=tmp_path / "c.json")


# Model


def test_modes_of_the_model(persons):
    model = TopDownPose(MICRO, deconv_channels=(16,))
    assert model.stride == 4
    data = CocoKeypoints(persons, "train", dict(train=True, input_size=SIZE))
    batch = model.data_preprocessor(collate_poses([data[Draw(i, (i,))] for i in range(3)]), True)
    maps = model(batch["image"])
    assert maps.shape == batch["target"].shape == (3, 17, 16, 12)
    losses = model(**batch, mode="loss")
    squares = (maps - batch["target"]).square() * batch["weight"][:, :, None, None]
    assert torch.allclose(losses["loss"], squares.mean()) and losses["accuracy"].shape == ()
    losses["loss"].backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch, mode="loss")
    assert half["loss"].dtype is torch.float32 and half["loss"].isfinite()
    with pytest.raises(ValueError, match="unknown mode 'lose'. Did you mean 'loss'"):
        model(**batch, mode="lose")
    with pytest.raises(ValueError, match="mode 'loss' needs target and weight"):
        model(batch["image"], mode="loss")
    with pytest.raises(ValueError, match=r"mode 'predict' needs instance=dict\(inverse=...\)"):
        model(batch["image"], mode="predict")
    coarse = TopDownPose(MICRO)
    with pytest.raises(ValueError, match=r"heat maps \(3, 17, 8, 6\) \(stride 8\).* transform needs stride=8"):
        coarse(**batch, mode="loss")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(backbone=dict(dims=8)), ValueError, "backbone needs the name of a model"),
        (dict(backbone=dict(name="vmamba_micr")), KeyError, "unknown model 'vmamba_micr'"),
        (dict(backbone=dict(name="vmamba_micro", dmis=8)), TypeError, "no keyword 'dmis'"),
        (dict(backbone=dict(name="vmamba_micro")), ValueError, r"reads one map, vmamba_micro gives 4 \(0: 16 channels at stride 4, 1: 32 .*out_indices=\(NUMBER,\)"),
        (dict(backbone=MICRO, deconv_channels=(8, 8, 8, 8)), ValueError, "4 transposed convolutions make a map of stride 8 finer"),
    ],
)  # fmt: skip
def test_wrong_models(options, error, message):
    with pytest.raises(error, match=message):
        TopDownPose(**options)


def test_transposed_convolutions_double_the_resolution():
    head = HeatmapHead(6, 3, (8, 4))
    assert head(torch.randn(2, 6, 5, 7)).shape == (2, 3, 20, 28)
    assert {name for name, _ in head.named_parameters()} == {
        "deconv_layers.0.weight", "deconv_layers.1.weight", "deconv_layers.1.bias", "deconv_layers.3.weight",
        "deconv_layers.4.weight", "deconv_layers.4.bias", "final_layer.weight", "final_layer.bias",
    }  # fmt: skip
    assert HeatmapHead(6, 3)(torch.randn(2, 6, 5, 7)).shape == (2, 3, 5, 7)


class Symmetric(nn.Module):
    """Maps of a picture and of its mirror image that mirror each other, pairs exchanged."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(17, 3)
        self.weight = nn.Parameter(weight + weight[COCO_PERSON.mirrored])

    def forward(self, image):
        means = nn.functional.avg_pool2d(image, 4)  # even strides, and still symmetric
        return [torch.einsum("kc,bchw->bkhw", self.weight, means)]


def symmetric_model() -> TopDownPose:
    model = TopDownPose(MICRO)
    model.backbone, model.head = Symmetric(), nn.Identity()
    return model


def test_flip_test_leaves_a_symmetric_model_as_it_is():
    model = symmetric_model()
    image = torch.randn(2, 3, 32, 24)
    inverse = torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3)
    results = []
    for model.flip_test, model.shift_heatmap in ((False, False), (True, False)):
        results.append(model(image, instance=dict(inverse=inverse, index=torch.arange(2)), mode="predict"))
    for alone, tested in zip(*results, strict=True):
        assert np.allclose(alone["keypoints"], tested["keypoints"]) and alone["index"] == tested["index"]
        assert np.allclose(alone["scores"], tested["scores"], atol=1e-6)
    plain = model.heat_maps(image)
    model.shift_heatmap = True
    shifted = 2 * model._tested_maps(image) - plain
    assert torch.allclose(shifted[..., 1:], plain[..., :-1], atol=1e-5)
    assert torch.allclose(shifted[..., 0], plain[..., 0], atol=1e-5)


def test_flip_test_exchanges_pairs():
    """A model whose maps do not mirror: the mirrored image's left wrist counts for the right one."""
    model = symmetric_model()
    model.shift_heatmap = False
    nn.init.zeros_(model.backbone.weight)
    with torch.no_grad():
        model.backbone.weight[9, 0] = 2.0  # only the left wrist's map sees the image
    image = torch.randn(1, 3, 32, 24)
    maps = model._tested_maps(image)[0]
    seen = nn.functional.avg_pool2d(image, 4)[0, 0]
    assert torch.allclose(maps[9], seen, atol=1e-6) and torch.allclose(maps[10], seen, atol=1e-6)
    assert maps.abs().sum((1, 2)).count_nonzero() == 2


def test_predictions_return_to_the_image(persons):
    """A model that gives the true heat maps finds the true keypoints, to within the maps' resolution."""
    dataset = CocoKeypoints(persons, "val", dict(train=False))
    fixed = dict(train=True, flip=0, half_body=0, shift_prob=0, scale=(1, 1), rotation_prob=0)
    truth = CocoKeypoints(persons, "val", fixed)
    model = symmetric_model()
    model.flip_test = False
    model.backbone.forward = lambda image: [torch.stack([truth[index]["target"] for index in range(len(image))])]
    batch = collate_poses([dataset[index] for index in range(len(dataset))])
    results = model(**batch, mode="predict")
    for index, result in enumerate(results):
        error = np.abs(result["keypoints"] - dataset.labels[index][:, :2]).max()
        pixel = result["area"] / (256 * 192)
        assert error <= 0.5 * 4 * np.sqrt(pixel) + 1e-6  # half a pixel of the map
        assert result["path"] == dataset.path(index) and result["index"] == index
        assert result["box"].tolist() == dataset.boxes[index].tolist()


# COCO's numbers


def own_oks(found: np.ndarray, truth: np.ndarray, area: float) -> float:
    total = 0.0
    for (x, y), (u, v), sigma in zip(found, truth, COCO_PERSON.sigmas, strict=True):
        k = 2 * sigma
        total += np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * area * k**2))
    return total / COUNT


def test_similarity_against_own_numbers():
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 100, (COUNT, 2))
    found = truth + generator.normal(0, 4, (3, COUNT, 2))
    values = object_keypoint_similarity(found, truth, 5000.0, COCO_PERSON.sigmas)
    assert values == pytest.approx([own_oks(points, truth, 5000.0) for points in found])
    assert object_keypoint_similarity(truth, truth, 5000.0, COCO_PERSON.sigmas) == 1
    # one keypoint off by its own spread: exp(-1/2) instead of 1
    moved = truth.copy()
    moved[0, 0] += 2 * 0.026 * np.sqrt(5000.0)
    assert object_keypoint_similarity(moved, truth, 5000.0, COCO_PERSON.sigmas) == pytest.approx((16 + np.exp(-0.5)) / 17)


def test_suppression_keeps_the_better_of_two_alike():
    truth = FIGURE * 100
    keypoints = np.stack([truth, truth + 0.5, truth + 40])
    scores, areas = np.array([0.5, 0.9, 0.3]), np.full(3, 8000.0)
    assert oks_nms(keypoints, scores, areas, COCO_PERSON.sigmas, 0.9) == [1, 2]
    assert oks_nms(keypoints, scores, areas, COCO_PERSON.sigmas, 1.0) == [1, 0, 2]
    # the area of a pair is the mean of both: with tiny areas the two are no longer alike
    assert oks_nms(keypoints, scores, areas / 1e5, COCO_PERSON.sigmas, 0.9) == [1, 0, 2]


def predictions(dataset: CocoKeypoints, shift: float = 0.0, score: float = 0.8) -> list[dict]:
    rows = []
    for index in range(len(dataset)):
        instance = dataset[index]["instance"]
        points = dataset.labels[index][:, :2] + [shift, 0.0]
        rows.append(
            dict(keypoints=points, scores=np.full(COUNT, score), path=dataset.path(index), index=index,
                 box_score=1.0, area=instance["area"], image_id=instance["image_id"])
        )  # fmt: skip
    return rows


def evaluate(dataset: CocoKeypoints, rows: list[dict], **options) -> tuple[dict, CocoKeypointMetric]:
    metric = CocoKeypointMetric(**options)
    metric.dataset_meta = dataset.metainfo
    metric.process({}, rows)
    return metric.evaluate(len(rows)), metric


@pytest.fixture(scope="module")
def truth(persons) -> CocoKeypoints:
    return CocoKeypoints(persons, "val", SMALL)


def test_perfect_predictions_have_an_ap_of_one(truth):
    metrics, metric = evaluate(truth, predictions(truth))
    assert metrics == pytest.approx({f"coco/{name}": 1.0 for name in ("AP", "AP50", "AP75", "AP_M", "AR", "AR50", "AR75", "AR_M")})
    assert sum(len(found) for _, found in metric.evaluation.images) == len(truth)
    # a sampler that fills up the last round repeats the first persons: nothing changes
    assert evaluate(truth, predictions(truth) + predictions(truth)[:2])[0] == metrics


@pytest.mark.parametrize("shift", [1.5, 3.0, 5.0])
def test_shifted_predictions_have_the_ap_of_their_similarity(truth, shift):
    """All persons are alike, so AP is the share of the ten thresholds that their OKS reaches."""
    points = truth.labels[0][:, :2].astype(float)
    similarity = own_oks(points + [shift, 0], points, 40 * 80 * 0.6)
    thresholds = np.arange(0.5, 1.0, 0.05)
    assert np.abs(thresholds - similarity).min() > 1e-3
    expected = (similarity > thresholds).mean()
    assert 0 < expected < 1
    metrics, _ = evaluate(truth, predictions(truth, shift))
    assert metrics["coco/AP"] == pytest.approx(expected) == metrics["coco/AR"]


def test_missed_and_invented_persons_cost(truth):
    rows = predictions(truth)
    missed, _ = evaluate(truth, rows[1:])
    assert missed["coco/AR"] == pytest.approx((len(rows) - 1) / len(rows)) and missed["coco/AP"] < 1
    wrong = copy.deepcopy(rows[0])
    wrong.update(index=99, box_score=2.0)  # ahead of all others
    wrong["keypoints"] += 50
    assert evaluate(truth, [*rows, wrong])[0]["coco/AP"] < 1
    double = copy.deepcopy(rows[0])
    double.update(index=98, box_score=0.9)
    assert evaluate(truth, [*rows, double])[0]["coco/AP"] == pytest.approx(1.0)  # suppressed
    found = evaluate(truth, [*rows, double], nms=None)[1].evaluation.images
    assert sum(len(persons) for _, persons in found) == len(rows) + 1


def test_score_of_a_person_counts_clear_keypoints(truth):
    rows = predictions(truth)[:1]
    rows[0]["box_score"] = 0.5
    rows[0]["scores"] = np.array([0.9, 0.7] + [0.1] * 15)
    _, metric = evaluate(truth, rows)
    assert metric.evaluation.images[0][1][0]["score"] == pytest.approx(0.5 * 0.8)
    rows[0]["scores"] = np.full(COUNT, 0.1)
    assert evaluate(truth, rows)[1].evaluation.images[0][1][0]["score"] == 0


def test_metric_says_what_it_lacks(truth, tmp_path):
    rows = predictions(truth)
    metric = CocoKeypointMetric()
    metric.process({}, rows)
    with pytest.raises(ValueError, match="knows no annotation file"):
        metric.evaluate(len(rows))
    for row in rows:
        row.update(keypoints=row["keypoints"][:5], scores=row["scores"][:5])
    with pytest.raises(ValueError, match="the model gives 5 keypoints, the dataset has 17"):
        evaluate(truth, rows)
    with pytest.raises(ValueError, match="nms is an object keypoint similarity"):
        CocoKeypointMetric(nms=2.0)
    evaluate(truth, predictions(truth), out_file=str(tmp_path / "found.json"))
    written = json.loads((tmp_path / "found.json").read_text())
    assert len(written) == len(truth) and len(written[0]["keypoints"]) == 51 and written[0]["category_id"] == 1


# Pictures


def test_skeletons_are_drawn_where_the_keypoints_are():
    image = np.zeros((200, 160, 3), np.uint8)
    points = FIGURE * (120, 180) + (20, 10)
    scores = np.ones(COUNT)
    scores[16] = 0.1
    drawn = draw_poses(image, points[None], scores[None])
    assert not image.any() and drawn.shape == image.shape
    for place, (x, y) in enumerate(np.rint(points).astype(int)):
        name = COCO_PERSON.names[place]
        color = LEFT if name.startswith("left") else RIGHT if name.startswith("right") else None
        if place == 16:
            assert not drawn[y, x].any()
        elif color is not None:
            assert tuple(drawn[y, x].tolist()) == color, name
    middle = np.rint((points[13] + points[15]) / 2).astype(int)
    assert tuple(drawn[middle[1], middle[0]].tolist()) == LEFT  # shin
    assert not draw_poses(image, np.zeros((0, 17, 2)), np.zeros((0, 17))).any()
    with pytest.raises(ValueError, match=r"expected keypoints \(N, 17, 2\)"):
        draw_poses(image, points, scores)


# Runs


@pytest.fixture(scope="module")
def trained(persons, tmp_path_factory) -> tuple[Config, Path]:
    cfg = small_run(persons, tmp_path_factory.mktemp("run"))
    cfg.default_hooks.checkpoint.update(every_iterations=1, keep=10)
    Runner.from_cfg(copy.deepcopy(cfg)).train()
    return cfg, Path(cfg.work_dir)


def test_training_lowers_the_loss_and_leaves_its_record(trained):
    cfg, folder = trained
    state = read_training(folder / "epoch_2.pth")
    loss = state["history"]["iterations"][:, 1]
    assert len(loss) == 2 * 3 and loss[-1] < loss[0]
    history = json.loads((folder / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2] and {"val_coco/AP", "train_accuracy"} <= set(history[-1])
    best = read_training(folder / "best_coco_AP.pth")
    assert best["meta"]["metric"] == "coco/AP"
    assert state["meta"]["dataset_meta"]["names"] == COCO_PERSON.names
    assert (folder / "poses.png").stat().st_size > 10_000 and (folder / "curves.png").is_file()


@runs_are_exact
def test_resume_is_exact(persons, trained, tmp_path):
    cfg = small_run(persons, tmp_path)
    shutil.copy(trained[1] / "iter_4.pth", tmp_path)  # in the middle of the second epoch
    (tmp_path / "last_checkpoint").write_text("iter_4.pth\n")
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    resumed, expected = (read_training(folder / "epoch_2.pth") for folder in (tmp_path, trained[1]))
    for part in EXACT:
        assert differences(resumed[part], expected[part], part) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bf16_run_on_boxes_of_a_detector(persons, tmp_path):
    rows = [(image_id, 1, [8, 5, 45, 80], 0.9) for image_id in range(1, 5)]
    cfg = small_run(persons, tmp_path / "run", epochs=1)
    cfg.optim_wrapper.precision = "bf16"
    cfg.val_dataloader.dataset.detections = str(write_detections(tmp_path / "boxes.json", rows))
    runner = Runner.from_cfg(cfg)
    runner.train()
    metric = runner.val_evaluator.metrics[0]
    assert len(metric.evaluation.images) == 4


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(persons, tmp_path):
    states = []
    for name, batch in (("one", 4), ("two", 2)):
        cfg = small_run(persons, tmp_path / name, epochs=1)
        # no batch norm, whose statistics a process takes of its own images alone
        cfg.model.update(backbone=dict(name="vmamba_micro", dims=8, depths=(1,), out_indices=(0,)), deconv_channels=())
        cfg.train_dataloader.batch_size = batch
        cfg.dump(tmp_path / f"{name}.py")
        if name == "one":
            Runner.from_cfg(cfg).train()
        else:
            process = run_python(
                "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tools" / "train.py",
                tmp_path / "two.py", "--launcher", "pytorch",
            )  # fmt: skip
            assert process.returncode == 0, process.stderr[-4000:]
        states.append(read_training(tmp_path / name / "epoch_1.pth"))
        written = json.loads((tmp_path / name / "history.json").read_text())
        states[-1]["validation"] = {key: value for key, value in written[-1].items() if key.startswith("val_coco/")}
    first, second = states
    assert second["meta"]["world_size"] == 2
    assert torch.allclose(first["history"]["iterations"][:, 1], second["history"]["iterations"][:, 1], rtol=0, atol=1e-6)
    for name, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][name], rtol=0, atol=1e-4), name
    assert len(first["validation"]) == 8 and first["validation"] == pytest.approx(second["validation"], abs=1e-6)


# Prediction


def test_predictor_follows_boxes_and_images(persons, trained, tmp_path):
    cfg, folder = trained
    predictor = PosePredictor.from_config(cfg, folder / "epoch_2.pth", "cpu")
    files = sorted((persons / "val2017").glob("*.jpg"))[:2]
    boxes = {str(files[0]): [[8, 5, 40, 80], [68, 5, 40, 80]]}
    found = predictor(files, boxes, batch_size=2)
    assert [len(found[str(file)]) for file in files] == [2, 1]
    assert found[str(files[1])][0]["box"].tolist() == [0, 0, 128, 96]
    for person in found[str(files[0])]:
        assert person["keypoints"].shape == (17, 2) and person["scores"].shape == (17,)
    alone = predictor([files[0]], {str(files[0]): boxes[str(files[0])][1:]})
    assert np.allclose(alone[str(files[0])][0]["keypoints"], found[str(files[0])][1]["keypoints"])
    predictor.draw(found, tmp_path / "poses.png")
    assert Image.open(tmp_path / "poses.png").size[0] > 300
    with pytest.raises(UsageError, match="boxes for .*other.jpg, which is not among the images"):
        predictor(files, {"other.jpg": []})
    with pytest.raises(UsageError, match="a box is x, y, width, height with a positive size"):
        predictor(files, {str(files[0]): [[1, 2, 0, 4]]})
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="broken.jpg.*left out"):
        assert predictor([tmp_path / "broken.jpg"]) == {}


def test_weights_of_other_models_are_refused(trained, tmp_path):
    _, folder = trained
    other = TopDownPose(MICRO, deconv_channels=(24,))
    with pytest.raises(CheckpointError, match=r"has other heads(?s:.*)deconv_layers.0.weight: \(16, 16, 4, 4\) in the"):
        load_pose_weights(other, folder / "epoch_2.pth")
    torch.save({"state_dict": other.backbone.state_dict()}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="holds no heat-map head"):
        load_pose_weights(other, tmp_path / "backbone.pth")
    with pytest.raises(UsageError, match="needs a config of a TopDownPose"):
        PosePredictor.from_config(Config(dict(model=dict(type="vision_ssm.ImageClassifier"))), folder / "epoch_2.pth")
    # a file of the backbone alone, or with another head's keys beside it, starts a pose model
    report = load_pose_weights(TopDownPose(MICRO, deconv_channels=(16,)), folder / "epoch_2.pth")
    assert report.complete and not report.ignored
    started = TopDownPose(MICRO, pretrained=str(tmp_path / "backbone.pth"))
    assert differences(started.backbone.state_dict(), other.backbone.state_dict()) == []


# Configs


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = read_config(path)
    assert len(path.read_text().splitlines()) <= 15
    match = re.fullmatch(r"heatmap_(\w+?)_(?:shapes|8xb32_210e_coco_(\d+)x(\d+))", path.stem)
    assert cfg.model.backbone.name == match[1]
    transforms = {}
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = cfg[loader].dataset
        assert DATASETS.get(dataset.type) is CocoKeypoints and dataset.split == loader.split("_")[0].replace("test", "val")
        transforms[loader] = TopDownTransform(**dataset.transform)
        assert transforms[loader].train is (loader == "train_dataloader")
    assert len({transform.input_size for transform in transforms.values()}) == 1
    METRICS.build(cfg.val_evaluator)
    for hook in [*cfg.default_hooks.values(), *cfg.custom_hooks]:
        HOOKS.build(hook)
    for key in ("model.pretrained", "val_dataloader.dataset.detections", "train_dataloader.dataset.transform.flip",
                "model.flip_test", "default_hooks.pictures.count"):  # fmt: skip
        check_option(cfg, key)
    if match[2]:
        train = transforms["train_dataloader"]
        assert train.input_size == (int(match[2]), int(match[3]))
        assert (train.map_size, train.sigma) in (((64, 48), 2.0), ((96, 72), 3.0))
        assert 8 * cfg.train_dataloader.batch_size == 256 == cfg.auto_scale_lr.base_batch_size
        assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.lr) == (210, 5e-4)
        assert cfg.optim_wrapper.optimizer.weight_decay == 0.01
    if cfg.model.backbone.name in list_models():
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
        assert model.stride == cfg.train_dataloader.dataset.transform.stride


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_takes_a_training_step(path, persons):
    """With a small backbone in place of its own, on small pictures in its layout, with its optimizer and schedule."""
    cfg = read_config(path)
    outside = len(cfg.model.deconv_channels) == 0
    cfg.model.backbone = dict(name="vmamba_micro", dims=8, depths=(1,), out_indices=(0,)) if outside else MICRO
    cfg.model.deconv_channels = cfg.model.deconv_channels[:1]
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, "root": str(persons)})
    model = MODELS.build(cfg.model)
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key not in ("type", "constructor")}
    optimizer = ParameterGroups({**wrapper, "precision": "fp32"})(model)
    for options in cfg.param_scheduler:
        PARAM_SCHEDULERS.build({"end": 10, **options}, default_args=dict(optimizer=optimizer, epoch_length=3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outputs = model.train_step(collate_poses([dataset[Draw(index, (index,))] for index in range(2)]), optimizer)
    assert outputs["loss"].isfinite() and 0 <= outputs["accuracy"] <= 1
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"head.final_layer.weight", "backbone.stem.conv1.weight"} <= moved and len(moved) > 0.8 * len(before)


def test_recipe_of_the_published_poses():
    """arXiv 2410.03174 and its code: AdamW, 210 epochs, 500 iterations of warm-up, steps at 170 and 200."""
    cfg = read_config(CONFIGS / "pose" / "heatmap_hrvmamba_small_pose_8xb32_210e_coco_256x192.py")
    optimizer = ParameterGroups(dict(optimizer=cfg.optim_wrapper.optimizer))(nn.Conv2d(2, 2, 1))
    length, rates = 100, {}
    schedulers = [
        PARAM_SCHEDULERS.build(dict(options), default_args=dict(optimizer=optimizer)) for options in cfg.param_scheduler
    ]
    for iteration in range(210 * length):
        rates[iteration] = optimizer.get_lr()["base_lr"][0]
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % length == 0:
                scheduler.step()
    assert rates[0] == pytest.approx(5e-7) and rates[250] == pytest.approx(2.5e-4, rel=5e-3)
    assert rates[499] == pytest.approx(5e-4) and rates[170 * length - 1] == pytest.approx(5e-4)
    assert rates[170 * length] == pytest.approx(5e-5) and rates[200 * length - 1] == pytest.approx(5e-5)
    assert rates[200 * length] == pytest.approx(5e-6)
    rates_of_drop_path = {
        path.stem: read_config(path).model.backbone.drop_path_rate for path in LEAVES if path != SHAPES
    }
    assert list(rates_of_drop_path.values()) == [0.2, 0.6, 0.1, 0.1, 0.0]  # base, base 384, small, small 384, tiny
    assert cfg.sync_bn == "torch" and cfg.model.flip_test and cfg.model.shift_heatmap

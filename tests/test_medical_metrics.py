"""Scores of volumes: by hand, against MONAI, against distances of all pairs; empty masks; the metrics of the Runner."""

import csv
import io
import json
import multiprocessing
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import METRICS as ROOT_METRICS
from rich.console import Console
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import distributed as dist

import vision_ssm.engine.medical_surface as medical_surface
from vision_ssm.engine import GlobalMetric, VolumeMetric, score_volume
from vision_ssm.engine.medical_scores import OUTCOMES, SCORES

SPACING = (2.5, 0.8, 1.3)
NAN = float("nan")


def empty(shape=(4, 6, 7)) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


def with_voxels(*places, shape=(4, 6, 12), label=1) -> np.ndarray:
    volume = empty(shape)
    for place in places:
        volume[place] = label
    return volume


def blobs(seed: int, shape=(9, 24, 20), classes=4) -> np.ndarray:
    """Smooth touching regions, with specks of other labels."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 2.0) for _ in range(classes)]
    labels = np.argmax(fields, 0).astype(np.uint8)
    specks = rng.random(shape) < 0.01
    labels[specks] = rng.integers(0, classes, int(specks.sum()))
    return labels


def noise(seed: int, shape=(5, 8, 9), classes=4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, shape)


def box(*sides, shape=(6, 9, 8), label=1) -> np.ndarray:
    volume = empty(shape)
    volume[tuple(slice(*side) for side in sides)] = label
    return volume


INNER = box((1, 4), (2, 7), (1, 5))
PAIRS = {
    "noise": (noise(0), noise(1), 4),
    "noise and blobs": (noise(2, (9, 24, 20)), blobs(0), 4),
    "blobs": (blobs(1), blobs(2), 4),
    "equal": (blobs(3), blobs(3), 4),
    "one voxel each": (with_voxels((0, 0, 0)), with_voxels((3, 5, 11)), 2),
    "one voxel in a region": (with_voxels((2, 3, 3), shape=INNER.shape), INNER, 2),
    "at the border": (box((0, 6), (0, 3), (0, 8)), box((0, 6), (0, 4), (1, 8)), 2),
    "everything": (box((0, 6), (0, 9), (0, 8)), INNER, 2),
    "everything in both": (box((0, 6), (0, 9), (0, 8)), box((0, 6), (0, 9), (0, 8)), 2),
    "hollow": (INNER - box((2, 3), (3, 6), (2, 4)), INNER, 2),
    "a plane": (box((2, 3), (0, 9), (0, 8)), INNER, 2),
    "apart": (box((0, 1), (0, 2), (0, 2)), box((4, 6), (7, 9), (6, 8)), 2),
    "one slice": (blobs(4, (1, 24, 20)), blobs(5, (1, 24, 20)), 4),
    "one row": (noise(3, (1, 1, 30)), noise(4, (1, 1, 30)), 4),
}


def monai_scores(prediction: np.ndarray, target: np.ndarray, classes: int, spacing) -> dict[str, np.ndarray]:
    """MONAI's numbers per foreground class; a single slice goes in as an image."""
    metrics = pytest.importorskip("monai.metrics")
    pair = []
    for labels in (prediction, target):
        labels = labels[0] if len(labels) == 1 else labels
        pair.append(torch.from_numpy(np.stack([labels == c for c in range(classes)])[None]).float())
    spacing = list(spacing[-(pair[0].ndim - 2):])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty masks, and deprecations within MONAI
        confusion = metrics.get_confusion_matrix(*pair, include_background=False)
        found = dict(
            dice=metrics.compute_dice(*pair, include_background=False),
            dice_kept=metrics.compute_dice(*pair, include_background=False, ignore_empty=False),
            iou=metrics.compute_iou(*pair, include_background=False),
            iou_kept=metrics.compute_iou(*pair, include_background=False, ignore_empty=False),
            hd95=metrics.compute_hausdorff_distance(*pair, percentile=95, spacing=spacing),
            asd=metrics.compute_average_surface_distance(*pair, symmetric=True, spacing=spacing),
            sensitivity=metrics.compute_confusion_matrix_metric("sensitivity", confusion),
            specificity=metrics.compute_confusion_matrix_metric("specificity", confusion),
        )
    return {name: values[0].double().numpy() for name, values in found.items()}


@pytest.mark.parametrize("dense", [0, None, 10**9], ids=["tree", "default", "transform"])
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_monai(name, dense, monkeypatch):
    if dense is not None:
        monkeypatch.setattr(medical_surface, "DENSE", dense)
    prediction, target, classes = PAIRS[name]
    theirs = monai_scores(prediction, target, classes, SPACING)
    ours = score_volume(prediction, target, classes, SPACING)
    assert set(ours.outcomes) == {"both"}
    for score in SCORES:
        np.testing.assert_allclose(getattr(ours, score), theirs[score], rtol=1e-6, atol=1e-7, err_msg=score)


EMPTY_CASES = {
    "missed": (empty(INNER.shape), INNER),
    "false": (INNER, empty(INNER.shape)),
    "absent": (empty(INNER.shape), empty(INNER.shape)),
}


@pytest.mark.parametrize("outcome", EMPTY_CASES)
def test_empty_masks_and_monai(outcome):
    """Equal where the rule gives a value; where not, what MONAI gives instead."""
    prediction, target = EMPTY_CASES[outcome]
    ours = score_volume(prediction, target, 2, SPACING)
    theirs = monai_scores(prediction, target, 2, SPACING)
    values = {score: getattr(ours, score)[0] for score in SCORES}
    share = 1 - INNER.sum() / INNER.size
    expected = dict(
        missed=dict(dice=0, iou=0, hd95=NAN, asd=NAN, sensitivity=0, specificity=1),
        false=dict(dice=0, iou=0, hd95=NAN, asd=NAN, sensitivity=NAN, specificity=share),
        absent=dict(dice=NAN, iou=NAN, hd95=NAN, asd=NAN, sensitivity=NAN, specificity=1),
    )[outcome]
    assert ours.outcomes == [outcome]
    assert values == pytest.approx(expected, nan_ok=True)
    assert {name: theirs[name][0] for name in ("sensitivity", "specificity", "hd95")} == pytest.approx(
        {name: values[name] for name in ("sensitivity", "specificity", "hd95")}, rel=1e-6, nan_ok=True
    )
    other = dict(
        missed=dict(dice=0, dice_kept=0, iou=0, iou_kept=0, asd=np.inf),
        false=dict(dice=NAN, dice_kept=0, iou=NAN, iou_kept=0, asd=np.inf),
        absent=dict(dice=NAN, dice_kept=1, iou=NAN, iou_kept=1, asd=NAN),
    )[outcome]
    assert {name: theirs[name][0] for name in other} == pytest.approx(other, nan_ok=True)


@pytest.mark.parametrize("outcome, value", [("missed", 0.0), ("false", 1.0), ("absent", 0.0)])
def test_empty_masks_in_papers(outcome, value):
    ours = score_volume(*EMPTY_CASES[outcome], 2, SPACING, rule="paper")
    assert (ours.dice[0], ours.iou[0], ours.hd95[0], ours.asd[0]) == (value, value, 0.0, 0.0)
    assert ours.outcomes == [outcome]


def test_every_class_follows_one_rule():
    """Four classes in four outcomes, in every order."""
    places = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    for shift in range(4):
        prediction, target = empty(), empty()
        classes = [1 + (shift + step) % 4 for step in range(4)]  # both, missed, false, absent
        prediction[places[0]] = target[places[0]] = classes[0]
        target[places[1]] = classes[1]
        prediction[places[2]] = classes[2]
        scores = score_volume(prediction, target, 5, SPACING)
        order = np.array(classes) - 1
        assert [scores.outcomes[index] for index in order] == list(OUTCOMES)
        np.testing.assert_array_equal(scores.dice[order], [1, 0, 0, NAN])
        np.testing.assert_array_equal(scores.iou[order], [1, 0, 0, NAN])
        np.testing.assert_array_equal(scores.hd95[order], [0, NAN, NAN, NAN])
        np.testing.assert_array_equal(scores.asd[order], [0, NAN, NAN, NAN])
        np.testing.assert_array_equal(scores.sensitivity[order], [1, 0, NAN, NAN])
        np.testing.assert_allclose(scores.specificity[order], [1, 1, 1 - 1 / prediction.size, 1], rtol=1e-12)
        paper = score_volume(prediction, target, 5, SPACING, rule="paper")
        np.testing.assert_array_equal(paper.dice[order], [1, 0, 1, 0])
        np.testing.assert_array_equal(paper.hd95[order], [0, 0, 0, 0])


def test_specificity_of_a_class_that_fills_the_volume_is_not_defined():
    full = np.ones((2, 3, 3), dtype=np.uint8)
    scores = score_volume(full, full, 2)
    assert np.isnan(scores.specificity[0]) and scores.sensitivity[0] == scores.dice[0] == 1


def test_two_voxels_by_hand():
    scores = score_volume(with_voxels((0, 0, 0)), with_voxels((1, 2, 3)), 2, (2.0, 1.0, 0.5))
    distance = (4 + 4 + 2.25) ** 0.5
    assert scores.hd95[0] == pytest.approx(distance) and scores.asd[0] == pytest.approx(distance)
    assert scores.dice[0] == scores.iou[0] == scores.sensitivity[0] == 0
    assert scores.specificity[0] == pytest.approx(286 / 287)
    assert (scores.reference[0], scores.predicted[0]) == (1, 1)


def test_percentiles_and_means_of_two_directions_by_hand():
    prediction, target = with_voxels((0, 0, 0)), with_voxels((0, 0, 0), (0, 0, 10))
    ours = score_volume(prediction, target, 2, (9.0, 9.0, 2.0))  # distances 0 one way, 0 and 20 mm the other
    assert ours.hd95[0] == pytest.approx(19.0)
    assert ours.asd[0] == pytest.approx(20 / 3)
    assert (ours.dice[0], ours.iou[0], ours.sensitivity[0], ours.specificity[0]) == pytest.approx((2 / 3, 0.5, 0.5, 1))
    paper = score_volume(prediction, target, 2, (9.0, 9.0, 2.0), rule="paper")  # 0, 0 and 10 voxels together
    assert paper.hd95[0] == pytest.approx(9.0)
    assert paper.asd[0] == pytest.approx(2.5)
    assert paper.dice[0] == ours.dice[0]


def all_pairs(first: np.ndarray, second: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Directed surface distances from the definition: a voxel with a face to something else is on the surface."""
    points = []
    for mask in (first, second):
        padded = np.pad(mask, 1)
        neighbours = [np.roll(padded, step, axis) for axis in range(mask.ndim) for step in (1, -1)]
        points.append(np.argwhere(padded & ~np.all(neighbours, 0)) * np.array(spacing))
    distances = cdist(*points)
    return distances.min(1), distances.min(0)


@pytest.mark.parametrize("name", ["noise", "blobs", "at the border", "hollow", "noise and blobs"])
def test_distances_of_all_pairs(name):
    prediction, target, classes = PAIRS[name]
    ours = score_volume(prediction, target, classes, SPACING)
    paper = score_volume(prediction, target, classes, SPACING, rule="paper")
    for index in range(classes - 1):
        masks = prediction == index + 1, target == index + 1
        there, back = all_pairs(*masks, SPACING)
        assert ours.hd95[index] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-12)
        assert ours.asd[index] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-12)
        there, back = all_pairs(*masks, (1, 1, 1))
        assert paper.hd95[index] == pytest.approx(np.percentile(np.hstack([there, back]), 95), rel=1e-12)
        assert paper.asd[index] == pytest.approx((there.mean() + back.mean()) / 2, rel=1e-12)


def test_threads_types_and_views_do_not_matter():
    prediction, target = blobs(6), blobs(7)
    expected = score_volume(prediction, target, 4, SPACING)
    torch.set_num_threads(3)
    for dtype in (np.int64, np.int16, np.uint8):
        given = np.asfortranarray(prediction.astype(dtype)), target.astype(dtype)[:, ::-1].copy()[:, ::-1]
        ours = score_volume(*given, 4, SPACING)
        for score in SCORES:
            np.testing.assert_array_equal(getattr(ours, score), getattr(expected, score))


def test_one_and_two_classes_are_binary_and_bool_is_a_label():
    prediction, target = INNER.astype(bool), box((0, 4), (2, 7), (1, 6)).astype(bool)
    for classes in (1, 2):
        scores = score_volume(prediction, target, classes, SPACING)
        assert len(scores.dice) == 1
        np.testing.assert_array_equal(scores.hd95, score_volume(INNER, target.astype(int), 2, SPACING).hd95)


def test_without_distances():
    scores = score_volume(blobs(0), blobs(1), 4, (0, 0, 0), distances=False)
    assert np.isnan(scores.hd95).all() and np.isnan(scores.asd).all() and (scores.dice > 0).all()


SHIFTED = INNER.copy()
SHIFTED[0, 0, 0] = 7
BAD_VOLUMES = [
    (INNER, INNER[:-1], {}, r"prediction of case7 has shape \(6, 9, 8\) and its mask \(5, 9, 8\)"),
    (INNER[0], INNER[0], {}, r"must be one \(D, H, W\)"),
    (INNER[:0], INNER[:0], {}, r"shape \(0, 9, 8\)"),
    (SHIFTED, INNER, {}, "prediction of case7 has labels from 0 to 7, but num_classes=2 allows 0 to 1"),
    (INNER, SHIFTED, {}, "mask of case7 has labels from 0 to 7"),
    (INNER, INNER.astype(int) - 1, {}, "labels from -1 to 0"),
    (INNER.astype(np.float32), INNER, {}, "prediction of case7 holds float32, labels are integers"),
    (INNER, INNER, dict(spacing=(1, 0, 1)), r"spacing of case7 is \(1.0, 0.0, 1.0\).*three positive numbers"),
    (INNER, INNER, dict(spacing=(1, 1, -1)), "three positive numbers"),
    (INNER, INNER, dict(spacing=(1, NAN, 1)), "three positive numbers"),
    (INNER, INNER, dict(spacing=(1, 1)), "three positive numbers"),
    (INNER, INNER, dict(rule="papers"), "unknown rule for empty masks 'papers'. Did you mean 'paper'"),
]  # fmt: skip


@pytest.mark.parametrize("prediction, target, keywords, message", BAD_VOLUMES)
def test_bad_volumes(prediction, target, keywords, message):
    with pytest.raises(ValueError, match=message):
        score_volume(prediction, target, 2, **keywords, case="case7")


META = dict(classes=("background", "liver", "spleen", "kidney"))


def samples() -> list[dict]:
    """Three volumes; class 3 is missed in the second one, false in the third one and absent in the first one."""
    first, second, third = (blobs(seed) for seed in (10, 11, 12))
    pairs = [(first.clip(0, 2), blobs(13).clip(0, 2)), (second.clip(0, 2), blobs(14)), (third, blobs(15).clip(0, 2))]
    return [
        dict(case=f"case{number}", prediction=prediction, target=target.astype(np.int64), spacing=SPACING)
        for number, (prediction, target) in enumerate(pairs)
    ]


def evaluate(metric, given: list[dict], meta: dict | None = META) -> dict[str, float]:
    metric.dataset_meta = meta
    for sample in given:
        metric.process({}, [sample])
    return metric.evaluate(len(given))


def test_volume_metric(tmp_path):
    metric = VolumeMetric(out_file=str(tmp_path / "scores.csv"))
    metrics = evaluate(metric, samples())
    scores = [score_volume(row["prediction"], row["target"], 4, SPACING) for row in samples()]
    assert [row.outcomes[2] for row in scores] == ["absent", "missed", "false"]
    for name in SCORES:
        values = np.stack([getattr(row, name) for row in scores])  # (3, 3), liver and spleen everywhere
        means = [values[:, 0].mean(), values[:, 1].mean(), np.nanmean(values[:, 2]) if name in ("dice", "iou", "sensitivity", "specificity") else NAN]
        assert metrics[name] == pytest.approx(np.nanmean(means), rel=1e-12)
    assert metrics["dice/liver"] == pytest.approx(np.mean([row.dice[0] for row in scores]))
    assert metrics["dice/kidney"] == 0 and metrics["hd95/spleen"] > 0
    assert "hd95/kidney" not in metrics and "iou/liver" not in metrics
    assert (metrics["missed"], metrics["false"], metrics["absent"]) == (1, 1, 1)

    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert len(rows) == 9 and list(rows[0]) == ["case", "class", "outcome", *SCORES, "reference", "predicted"]
    missed = rows[5]
    assert (missed["case"], missed["class"], missed["outcome"]) == ("case1", "kidney", "missed")
    assert missed["hd95"] == "" and float(missed["dice"]) == 0 and missed["predicted"] == "0"
    assert float(rows[0]["hd95"]) == scores[0].hd95[0] and int(rows[0]["reference"]) == scores[0].reference[0]

    console = Console(width=200, file=io.StringIO())
    console.print(metric.evaluation.table("Test"))
    lines = console.file.getvalue().splitlines()
    assert "Test, 3 volumes" in lines[0] and "HD95, mm" in console.file.getvalue()
    kidney = next(line for line in lines if "kidney" in line).split()
    assert kidney[1:5] == ["0.0000", "0.0000", "-", "-"] and kidney[-3:] == ["1", "1", "1"]
    mean = next(line for line in lines if "mean" in line).split()
    assert mean[1] == f"{metrics['dice']:.4f}" and mean[3] == f"{metrics['hd95']:.2f}"


def test_volume_metric_by_the_rule_of_papers():
    metric = VolumeMetric(rule="paper", per_class=("iou",))
    metrics = evaluate(metric, samples())
    scores = [score_volume(row["prediction"], row["target"], 4, rule="paper") for row in samples()]
    for name in ("dice", "hd95", "iou", "asd"):
        assert metrics[name] == pytest.approx(np.stack([getattr(row, name) for row in scores]).mean(), rel=1e-12)
    assert metrics["iou/kidney"] == pytest.approx(1 / 3) and "dice/kidney" not in metrics
    console = Console(width=200, file=io.StringIO())
    console.print(metric.evaluation.table())
    assert "HD95, voxels" in console.file.getvalue()


def test_one_class_prefix_and_no_distances():
    metric = VolumeMetric(num_classes=1, distances=False, prefix="val")
    metrics = evaluate(metric, [dict(case="a", prediction=INNER, target=box((1, 4), (2, 7), (1, 3)), spacing=SPACING)], {})
    assert metrics["val/dice"] == pytest.approx(2 / 3)
    assert set(metrics) == {f"val/{name}" for name in ("dice", "iou", "sensitivity", "specificity", "missed", "false", "absent")}
    assert metric.evaluation.classes == ("1",)


def test_metrics_are_in_the_registry_and_take_tensors():
    metric = ROOT_METRICS.build(dict(type="vision_ssm.VolumeMetric", num_classes=4))
    sample = samples()[1]
    given = {**sample, "prediction": torch.from_numpy(sample["prediction"]), "target": torch.from_numpy(sample["target"])}
    assert evaluate(metric, [given], None)["dice"] == evaluate(VolumeMetric(), [sample])["dice"]
    assert isinstance(ROOT_METRICS.build(dict(type="vision_ssm.GlobalMetric")), GlobalMetric)


def test_global_metric_by_hand():
    """The rule of ISIC papers: a large image weighs more."""
    small = dict(case="small", prediction=np.array([[[1, 0]]]), target=np.array([[[0, 1]]]))
    large = dict(case="large", prediction=np.array([[[1] * 6 + [0] * 4]]), target=np.array([[[1] * 5 + [0] * 5]]))
    metric = GlobalMetric()
    metrics = evaluate(metric, [small, large], dict(classes=("background", "lesion")))
    # hits 5, false 1 + 1, missed 1, background 4
    assert metric.confusion.tolist() == [[4, 2], [1, 5]]
    expected = dict(miou=5 / 8, dice=10 / 13, accuracy=9 / 12, specificity=4 / 6, sensitivity=5 / 6)
    assert metrics == pytest.approx(expected)


def test_global_metric_of_several_classes():
    given = samples()
    metrics = evaluate(GlobalMetric(), given)
    whole = score_volume(*(np.concatenate([row[key] for row in given]) for key in ("prediction", "target")), 4, distances=False)
    for name, ours in (("iou", "miou"), ("dice", "dice"), ("sensitivity", "sensitivity"), ("specificity", "specificity")):
        assert metrics[ours] == pytest.approx(getattr(whole, name).mean(), rel=1e-12)
    equal = np.concatenate([(row["prediction"] == row["target"]).ravel() for row in given])
    assert metrics["accuracy"] == pytest.approx(equal.mean())


@pytest.mark.parametrize("kind", [VolumeMetric, GlobalMetric])
def test_bad_evaluations(kind):
    nothing = [dict(case=f"case{n}", prediction=INNER, target=empty(INNER.shape), spacing=SPACING) for n in range(6)]
    with pytest.raises(ValueError, match=r"masks of all 6 volumes \(case0, case1, case2, case3, ...\) are empty"):
        evaluate(kind(num_classes=2), nothing, None)
    with pytest.raises(ValueError, match=f"{kind.__name__} does not know the classes"):
        evaluate(kind(), nothing, None)
    with pytest.raises(ValueError, match="num_classes=3, the dataset names 4 classes"):
        evaluate(kind(num_classes=3), samples())
    with pytest.raises(ValueError, match="volume case1 has no mask"):
        evaluate(kind(), [{**samples()[1], "target": None}])
    with pytest.raises(ValueError, match="mask of case1 has labels from 0 to 3"):
        evaluate(kind(num_classes=3), samples()[1:], None)


def test_bad_settings():
    with pytest.raises(ValueError, match="unknown rule"):
        VolumeMetric(rule="none")
    with pytest.raises(ValueError, match="per_class names no score with 'dise'. Did you mean 'dice'"):
        VolumeMetric(per_class=("dise",))


def evaluate_as_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    given = samples()
    mine = [given[1], given[0]] if rank else [given[0], given[2]]  # the sampler repeats the first one
    found = {}
    for metric in (VolumeMetric(), GlobalMetric()):
        metric.dataset_meta = META
        for sample in mine:
            metric.process({}, [sample])
        found[type(metric).__name__] = metric.evaluate(len(given))
        if rank == 0 and isinstance(metric, VolumeMetric):
            found["cases"] = metric.evaluation.cases
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    fork = multiprocessing.get_context("fork")  # with all that has been imported
    processes = [fork.Process(target=evaluate_as_rank, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["cases"] == ["case0", "case1", "case2"]
    for kind in (VolumeMetric, GlobalMetric):
        assert found[kind.__name__] == pytest.approx(evaluate(kind(), samples()), rel=1e-12)


@pytest.mark.slow
def test_a_large_volume_takes_less_than_a_minute():
    """512 x 512 x 150, eight organs of CT size, the prediction moved and with 40 false specks of each class."""
    shape = (150, 512, 512)
    grid = np.ogrid[tuple(slice(side) for side in shape)]
    volumes = []
    for seed in (1, 2):
        places, moves = np.random.default_rng(0), np.random.default_rng(seed)
        labels = empty(shape)
        for label in range(1, 9):
            middle = places.uniform(0.25, 0.75, 3) * shape + moves.normal(0, 3, 3)
            radii = places.uniform(0.08, 0.25, 3) * shape
            labels[sum(((x - m) / r) ** 2 for x, m, r in zip(grid, middle, radii)) < 1] = label
        volumes.append(labels)
    for label in range(1, 9):
        for corner in np.random.default_rng(label).integers(0, np.array(shape) - 6, (40, 3)):
            volumes[0][tuple(slice(start, start + 6) for start in corner)] = label
    torch.set_num_threads(2)
    start = time.perf_counter()
    scores = score_volume(*volumes, 9, (3.0, 0.8, 0.8))
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s")
    assert seconds < 60 and (scores.hd95 > 1).all() and (scores.dice > 0.5).all()

"""The arrow-pointing task: its pictures, its files, its configs, and a run on two sizes."""

import copy
import csv
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_cases
import numpy as np
import pytest
import torch
from engine_support import CONFIGS, read_config
from mmengine.config import Config
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from PIL import Image
from torch.utils.data import DataLoader

from vision_ssm import list_models
from vision_ssm.data import ArrowPointing, ImageFolder, UnreadableImageError, collate
from vision_ssm.data.arrows import CLASSES, SPLITS, draw_arrow
from vision_ssm.data.prepare import main as prepare
from vision_ssm.data.writing import PrepareError
from vision_ssm.engine import ParameterGroups, Runner, commands
from vision_ssm.engine.config import check_option
from vision_ssm.engine.predict import Predictor
from vision_ssm.engine.predict_command import predict
from vision_ssm.factory import find_family
from vision_ssm.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # schedules without training

GOLDEN = golden_cases.load("ops/arrow_pointing")["samples"]
LEAVES = sorted((CONFIGS / "arrows").glob("*.py"))
ABLATIONS = ("", "_pmodeonly", "_dmodeonly", "_conststm", "_noposemb")
BASELINES = ("vim_tiny", "vmamba_tiny_s1l8", "vssd_tiny", "timm:deit_tiny_patch16_224")


# Pictures


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['size']}-{case['index']}")
def test_pictures_are_those_of_the_original_code(case):
    dataset = ArrowPointing(size=case["size"], seed=case["seed"])
    scene, picture = dataset.scene(case["index"]), np.asarray(dataset.picture(case["index"]))
    assert (scene.label, scene.length, scene.width) == (case["label"], case["arrow_length"], case["arrow_width"])
    for ours, theirs in ((scene.arrow, "arrow"), (scene.disc, "circle"), (scene.radius, "radius"), (scene.angle, "angle")):
        assert np.allclose(ours, case[theirs], rtol=0, atol=1e-12), theirs
    assert picture.shape == (case["size"], case["size"], 3) and set(np.unique(picture)) == {0, 255}
    # Pillow's lines and ellipses differ by a few pixels between versions
    assert abs(int((picture[..., 0] == 0).sum()) - case["black_pixels"]) <= 12
    assert abs(int(picture.sum()) - case["image_sum"]) <= 12 * 3 * 255
    assert (picture == picture[..., :1]).all()


def test_splits_are_those_of_the_paper():
    expected = {
        "train": (100_000, 192, 42), "val": (5_120, 192, 100_042), "val_384": (5_120, 384, 100_043),
        "test": (10_240, 192, 200_042), "test_384": (10_240, 384, 200_043),
    }  # fmt: skip
    assert {name: tuple(split) for name, split in SPLITS.items()} == expected
    for name, (count, size, seed) in expected.items():
        dataset = ArrowPointing(name)
        assert len(dataset) == count and dataset.size == size and dataset.picture(count - 1).size == (size, size)
        other = ArrowPointing("train", size=size, seed=seed)
        assert dataset.scene(7) == other.scene(7)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_say_where_the_arrow_points(split):
    """Distance of the disc's centre from the line of the arrow, against the two bounds of the task."""
    dataset = ArrowPointing(split)
    labels = []
    for index in range(400):
        scene = dataset.scene(index)
        offset = np.subtract(scene.disc, scene.arrow)
        direction = np.array([math.cos(scene.angle), math.sin(scene.angle)])
        ahead, aside = offset @ direction, abs(offset[0] * direction[1] - offset[1] * direction[0])
        if scene.label:
            assert ahead > 0 and aside <= scene.radius / 1.2 + 1e-9
        else:
            assert ahead < 0 or aside >= scene.radius * 1.2 - 1e-9
        assert np.abs(offset).max() >= 2 * scene.radius - 1e-9  # the disc never covers the arrow's centre
        for x, y in (scene.arrow, scene.disc):
            assert 30 <= x <= dataset.size - 30 and 30 <= y <= dataset.size - 30
        assert 15 <= scene.radius < 30 and scene.length in range(15, 30) and scene.width in (2, 3)
        labels.append(scene.label)
    assert 0.42 < np.mean(labels) < 0.58


def test_the_picture_shows_the_scene():
    dataset = ArrowPointing("val")
    for index in range(40):
        scene, black = dataset.scene(index), np.asarray(dataset.picture(index))[..., 0] == 0
        y, x = np.nonzero(black)
        inside = np.hypot(x - scene.disc[0], y - scene.disc[1]) <= scene.radius + 2
        assert inside.sum() == pytest.approx(math.pi * scene.radius**2, rel=0.1)
        # what is not disc is arrow, and of it more lies near the tip than near the tail
        x, y = x[~inside] - scene.arrow[0], y[~inside] - scene.arrow[1]
        along = x * math.cos(scene.angle) + y * math.sin(scene.angle)
        assert len(along) > scene.length and np.abs(along).max() < scene.length / 2 + 4
        assert (along > 0).sum() > (along < 0).sum()


def test_arrow_and_disc_do_not_grow_with_the_picture():
    areas = []
    for size in (192, 384):
        dataset = ArrowPointing(size=size, count=200)
        areas.append(np.mean([(np.asarray(dataset.picture(index))[..., 0] == 0).sum() for index in range(200)]))
    assert areas[1] == pytest.approx(areas[0], rel=0.1)


def test_samples_are_normalised_and_never_resized():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    train = ArrowPointing("train", transform=dict(train=True, policy="none", input_size=192))
    val = ArrowPointing("val_384", transform=dict(train=False, crop_pct=1.0))
    for dataset in (train, val):
        sample = dataset[3]
        pixels = torch.from_numpy(np.array(dataset.picture(3))).permute(2, 0, 1) / 255  # (3, H, W)
        expected = (pixels - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(sample["image"], expected)
        assert sample["image"].dtype == torch.float32 and sample["label"] == dataset.scene(3).label
    assert torch.equal(ArrowPointing("train")[3]["image"], torch.from_numpy(np.array(train.picture(3))).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("workers", [1, 3])
def test_samples_depend_on_seed_and_index_alone(workers):
    dataset = ArrowPointing("train", count=12, transform=dict(train=True, policy="none"))
    alone = [dataset[index] for index in reversed(range(12))][::-1]
    batches = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate)
    found = {key: [value for batch in batches for value in batch[key]] for key in ("image", "label", "path")}
    for index, sample in enumerate(alone):
        assert torch.equal(found["image"][index], sample["image"]) and found["label"][index] == sample["label"]
        assert found["path"][index] == sample["path"] == f"train/{CLASSES[sample['label']]}/{index:06d}.png"
    other = ArrowPointing("train", count=12, seed=43)
    assert all(other.scene(index) != dataset.scene(index) for index in range(12))
    assert dataset.picture_of(found["path"][5]) == dataset.picture(5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(split="val_256"), ValueError, "unknown split 'val_256'.* Did you mean 'val' or 'val_384'"),
        (dict(size=160), ValueError, "size must be at least 180, got 160"),
        (dict(size=192.0), ValueError, "size must be a whole number, got 192.0"),
        (dict(count=0), ValueError, "count must be at least 1, got 0"),
        (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (dict(transform=dict(train=False, input_size=224)), ValueError, "input_size=224, the pictures are 192 pixels"),
        (dict(transform=dict(train=False, channels=1)), ValueError, r"RGB \(3 channels\), the transform is for 1"),
        (dict(transform=dict(train=False, crop=1)), TypeError, "crop"),
        (dict(root=__file__), NotADirectoryError, "is a file; the pictures need a folder"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        ArrowPointing(**options)


def test_wrong_index_and_number_of_classes():
    dataset = ArrowPointing("train", count=5)
    assert dataset[-1]["path"] == dataset[4]["path"]
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 5 pictures"):
            dataset[index]
    dataset.check_num_classes(2)
    with pytest.raises(ValueError, match="classes misses, points, the model has num_classes=1"):
        dataset.check_num_classes(1)
    with pytest.raises(ValueError, match="without a root no picture is kept"):
        dataset.keep(0)


# Files


def test_root_keeps_what_was_drawn(tmp_path):
    drawn, kept = ArrowPointing("val", count=6), ArrowPointing("val", count=6, root=tmp_path / "kept")
    with ThreadPoolExecutor(4) as pool:  # several readers may draw the same picture at the same time
        pictures = list(pool.map(kept.picture, [0, 1, 2, 3] * 4))
    assert all(picture == drawn.picture(index % 4) for index, picture in enumerate(pictures))
    files = sorted(path for path in kept.root.rglob("*") if path.is_file())
    assert files == sorted(Path(kept.path(index)) for index in range(4))  # and nothing half-written beside them
    path = Path(kept.path(2))
    Image.new("L", (192, 192), 7).save(path)
    assert kept.picture(2).getpixel((0, 0)) == (7, 7, 7)  # what is there is read
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableImageError, match=str(path)):
        kept[2]
    Image.new("L", (64, 64)).save(path)
    with pytest.raises(ValueError, match=r"is 64 x 64 pixels instead of 192 x 192.*remove it or choose another root"):
        kept[2]


def test_root_of_other_pictures_is_another_folder(tmp_path):
    names = {ArrowPointing("val", root=tmp_path, **options).path(0).split("/")[-3] for options in (
        {}, dict(count=3), dict(seed=1), dict(size=384), dict(size=384, seed=1),
    )}  # fmt: skip
    assert names == {"val", "val_size192_seed1", "val_size384_seed100042", "val_size384_seed1"}


def test_root_that_cannot_be_written(tmp_path):
    dataset = ArrowPointing("val", root=tmp_path / "kept", count=3)
    (tmp_path / "kept").write_text("a file has taken the place")
    with pytest.raises(PrepareError, match="cannot write .*kept"):
        dataset[0]


def test_command_writes_sheets_and_an_image_folder(tmp_path, capsys):
    out = tmp_path / "arrows"
    arguments = ["arrows", str(out), "--images", "train", "val_384", "--count", "9", "--workers", "2"]
    assert prepare(arguments) == 0
    assert "contact sheets, and pictures: 9 train, 9 val_384" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.txt", "contact_sheet_192.png", "contact_sheet_384.png", "train", "val_384",
    }  # fmt: skip
    for split, size in (("train", 192), ("val_384", 384)):
        folder, task = ImageFolder(out, split, strict=True), ArrowPointing(split, root=out, count=9)
        assert folder.classes == task.classes and len(folder) == 9
        found = {sample["path"]: sample for sample in (folder[index] for index in range(9))}
        for index in range(9):
            sample = task[index]
            assert torch.equal(found[sample["path"]]["image"], sample["image"]) and sample["image"].shape[1] == size
            assert found[sample["path"]]["label"] == sample["label"]
    for size, split in ((192, "val"), (384, "val_384")):
        with Image.open(out / f"contact_sheet_{size}.png") as sheet:
            pixels = np.asarray(sheet)
        first = np.asarray(ArrowPointing(split).picture(0))
        assert (pixels[40 : 40 + size, 16 : 16 + size] == first).all()
    text = (out / "README.txt").read_text()
    assert "val_384: 5,120 of 384 x 384, seed 100043" in text and "written: train (9), val_384 (9)" in text
    assert "arrows OUT --images train val_384 --count 9" in text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert prepare(arguments) == 0 and "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert prepare(["arrows", str(out)]) == 2
    assert "is not empty and holds something else" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_command_without_pictures(tmp_path, capsys):
    assert prepare(["arrows", str(tmp_path / "sheets")]) == 0
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        "README.txt", "contact_sheet_192.png", "contact_sheet_384.png",
    }  # fmt: skip
    assert prepare(["arrows", str(tmp_path / "other"), "--count", "3"]) == 2
    assert "say which splits are to be written" in capsys.readouterr().err
    assert prepare(["arrows", str(tmp_path / "other"), "--images", "val", "--count", "6000"]) == 2
    assert "split 'val' has 1 to 5120 pictures, got a count of 6000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare(["arrows", str(tmp_path / "other"), "--images", "valid"])
    assert not (tmp_path / "other").exists()


# Configs


def optimizer_of(cfg: Config, model):
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key not in ("constructor", "type")}
    return ParameterGroups({**wrapper, "precision": "fp32"})(model)


def test_there_is_a_config_for_every_model_of_the_experiment():
    names = {read_config(path).model.backbone.name for path in LEAVES}
    assert names == {*BASELINES, *(f"plstm_vis_t{ending}" for ending in ABLATIONS)}


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = read_config(path)
    name = cfg.model.backbone.name
    assert len(path.read_text().splitlines()) <= 15
    assert path.stem == f"{name.removeprefix('timm:').removesuffix('_224')}_arrows"
    assert name in list_models() or name.startswith("timm:")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    wrapper = optimizer_of(cfg, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in wrapper.optimizer.param_groups) == len(trained)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 < count < 35e6
    found = {}
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        found[loader] = DATASETS.build(cfg[loader].dataset)
    assert {key: dataset.split for key, dataset in found.items()} == {
        "train_dataloader": "train", "val_dataloader": "val", "test_dataloader": "test",
    }  # fmt: skip
    for key in ("train_dataloader.dataset.seed", "train_dataloader.dataset.count", "val_cfg.also.384.batch_size"):
        check_option(cfg, key)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_recipe_is_that_of_the_paper_at_a_tenth_of_its_learning_rate(path):
    cfg = read_config(path)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0) and cfg.train_cfg.max_epochs == 50
    assert cfg.train_dataloader.batch_size == 128 == cfg.auto_scale_lr.base_batch_size
    assert cfg.model.loss == dict(type="CrossEntropyLoss") and cfg.model.mixup is None and cfg.model.num_classes == 2
    assert not cfg.custom_hooks and cfg.model.backbone.get("drop_path_rate", 0.0) == 0.0
    if cfg.model.backbone.name.startswith("plstm"):
        assert cfg.model.backbone.num_heads == 6
    parameter = torch.nn.Linear(2, 2)
    wrapper = optimizer_of(cfg, parameter)
    length = 10
    options = [{**item, "end": item.get("end", 50)} for item in cfg.param_scheduler]
    defaults = dict(optimizer=wrapper, epoch_length=length)
    schedulers = [PARAM_SCHEDULERS.build(item, default_args=defaults) for item in options]
    rates = []
    for _ in range(50 * length):
        rates.append(wrapper.get_lr()["lr"][0])
        for scheduler in schedulers:
            scheduler.step()
    peak = 8 * length  # the paper's warm-up takes one epoch
    assert rates[0] < 2e-6 and rates[peak] == pytest.approx(1e-4) == max(rates)
    middle = (peak + 50 * length) // 2
    assert rates[middle] == pytest.approx((1e-4 + 1e-7) / 2, rel=1e-2)
    assert wrapper.get_lr()["lr"][0] == pytest.approx(1e-7, rel=2e-2)


def micro_backbone(cfg: Config) -> dict:
    """The smallest stand-in for a config's backbone."""
    name = cfg.model.backbone.name
    if name.startswith("timm:"):
        return dict(cfg.model.backbone, depth=1, embed_dim=24, num_heads=2)
    family = find_family(name)
    return dict(name=next(variant for variant in family.variants if variant.endswith("_micro")))


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_one_training_step_of_a_micro_model(path):
    cfg = read_config(path)
    model = MODELS.build({**cfg.model, "backbone": micro_backbone(cfg)})
    wrapper = optimizer_of(cfg, model)
    before = {name: value.detach().clone() for name, value in model.backbone.named_parameters()}
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, "count": 2})
    loss = model.train_step(collate([dataset[0], dataset[1]]), wrapper)["loss"]
    assert loss.isfinite()
    moved = [not torch.equal(value, before[name]) for name, value in model.backbone.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    for size in (192, 384):
        with torch.no_grad():
            logits = model.eval()(torch.randn(1, 3, size, size), mode="tensor")
        assert logits.shape == (1, 2) and logits.isfinite().all()


# A run


def small_run(work_dir: Path, name: str) -> Config:
    cfg = read_config(CONFIGS / "arrows" / f"{name}.py")
    cfg.model.backbone = micro_backbone(cfg)
    if name.startswith("vmamba"):
        cfg.model.backbone.update(dims=8, depths=(1, 1))
    for loader, count in ((cfg.train_dataloader, 12), (cfg.val_dataloader, 7), (cfg.test_dataloader, 10)):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False)
        loader.dataset.count = count
    for part in ("val_cfg", "test_cfg"):
        cfg[part].also["384"].update(batch_size=2)
        cfg[part].also["384"].dataset.count = 5
    cfg.work_dir, cfg.train_cfg.max_epochs, cfg.optim_wrapper.precision = str(work_dir), 2, "fp32"
    cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    cfg.env_cfg.cpu_threads = 1
    return cfg


@pytest.fixture(scope="module", params=["vmamba_tiny_s1l8_arrows", "deit_tiny_patch16_arrows"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrows")
    cfg = small_run(folder / "run", request.param)
    cfg.dump(folder / "config.py")
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return folder, runner


def test_run_validates_on_both_sizes(run):
    folder, runner = run
    history = runner.message_hub.log_scalars
    for key in ("val/top1", "val/384/top1", "val/384/cross_entropy", "val/384/mean_class_accuracy"):
        assert len(history[key].data[0]) == 2, key
    others = runner.val_loop.others
    assert list(others) == ["384"] and others["384"][1] is not runner.val_evaluator
    evaluations = [evaluator.metrics[0].evaluation for evaluator in (runner.val_evaluator, others["384"][1])]
    assert [len(evaluation.predictions) for evaluation in evaluations] == [7, 5]
    assert [evaluation.predictions[0].path.split("/")[0] for evaluation in evaluations] == ["val", "val_384"]
    assert evaluations[1].classes == CLASSES
    assert runner.val_dataloader.dataset.split == "val"  # the loop is left as it was
    for name in ("predictions", "confusion_matrix"):
        for ending in ("", "_384"):
            with Image.open(folder / "run" / f"{name}{ending}.png") as picture:
                assert min(picture.size) > 200
    rows = list(csv.DictReader((folder / "run" / "per_class_384.csv").open()))
    assert [row["class"] for row in rows] == list(CLASSES) and sum(int(row["images"]) for row in rows) == 5


def test_test_command_evaluates_both_sizes(run, capsys):
    folder, runner = run
    checkpoint, out = folder / "run" / "best_top1.pth", folder / "all.csv"
    arguments = [str(folder / "config.py"), str(checkpoint), "--work-dir", str(folder / "test"), "--out", str(out)]
    more = "batch_size=2", "dataset.size=224", "dataset.count=3", "dataset.transform.input_size=224"
    arguments += ["--cfg-options", *(f"test_cfg.also.224.{option}" for option in more)]
    assert commands.test(arguments) == 0
    printed = capsys.readouterr().out
    shown = {key: float(value) for key, value in re.findall(r"((?:\d+/)?top1)\W+([\d.]+)", printed)}
    rows = list(csv.DictReader(out.open()))
    parts = {"top1": [r for r in rows if r["path"].startswith("test/")],
             "384/top1": [r for r in rows if r["path"].startswith("test_384/")],
             "224/top1": [r for r in rows if r["path"].startswith("test_size224_seed200042/")]}  # fmt: skip
    assert {name: len(part) for name, part in parts.items()} == {"top1": 10, "384/top1": 5, "224/top1": 3}
    assert len(rows) == 18
    model = runner.bare_model.eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    for name, part in parts.items():
        share = 100 * sum(int(row["correct"]) for row in part) / len(part)
        assert shown[name] == pytest.approx(share, abs=0.01) or shown[name] == pytest.approx(share / 100, abs=0.01)
        size = 192 if name == "top1" else int(name.removesuffix("/top1"))
        split = "test_384" if size == 384 else "test"
        task = ArrowPointing(split, size=size, transform=dict(train=False, crop_pct=1.0))
        for index, row in enumerate(part):
            sample = task[index]
            with torch.no_grad():
                probability = model(sample["image"][None], mode="tensor").softmax(1)[0]
            assert sample["image"].shape[-1] == size and sample["path"] == row["path"]
            assert row["label"] == CLASSES[sample["label"]] and row["predicted"] == CLASSES[int(probability.argmax())]
            assert float(row["confidence"]) == pytest.approx(float(probability.max()), abs=1e-4)
    assert (folder / "test" / "predictions_384.png").exists()
    assert "Classes of the first set" in printed and "confusion_matrix_384.png and predictions_384.png" in printed


def test_predicted_pictures_keep_their_size(run, tmp_path, capsys):
    folder, _ = run
    file = tmp_path / "a.png"
    draw_arrow(ArrowPointing("test_384").scene(0), 384).save(file)
    arguments = [folder / "config.py", folder / "run" / "best_top1.pth", file, "--out", tmp_path / "p.png"]
    arguments = [str(argument) for argument in arguments]
    with pytest.raises(SystemExit):
        predict(arguments)
    assert "give --size 384 384" in capsys.readouterr().err
    assert predict([*arguments, "--size", "384"]) == 0
    name = Config.fromfile(arguments[0]).model.backbone.name
    if not name.startswith("timm:"):
        assert Predictor.from_weights(name, arguments[1]).only_size == (192, 192)


def test_run_that_is_resumed_equals_an_unbroken_one(run, tmp_path):
    """The validations on both sizes leave the random numbers of the training alone."""
    folder, runner = run
    cfg = Config.fromfile(str(folder / "config.py"))
    cfg.work_dir = str(tmp_path)
    cfg.load_from, cfg.resume = str(folder / "run" / "epoch_1.pth"), True
    again = Runner.from_cfg(cfg)
    again.train()
    ends = [torch.load(path / "epoch_2.pth", weights_only=True)["state_dict"] for path in (folder / "run", tmp_path)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_several_sets_need_the_config_of_a_loader(run):
    _, runner = run
    loop = type(runner.val_loop)
    with pytest.raises(TypeError, match="needs the config of a loader, got DataLoader"):
        loop(runner, runner.val_dataloader, evaluator=runner.val_evaluator, also={})

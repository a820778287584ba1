"""Segmentation and detection runs of the one train/test tool: exact resume, two processes, precision, pictures."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_support import (
    BATCH,
    CLASSES,
    PALETTE,
    SIDE,
    TRAIN,
    detection_config,
    segmentation_config,
    write_dense_pictures,
)
from engine_support import ROOT, differences, run_in_two_processes, runs_are_exact
from mmengine.config import Config
from PIL import Image

from vision_ssm.engine import Runner, SampleDrawer, commands, read_training
from vision_ssm.engine.config import UsageError, set_data_root
from vision_ssm.engine.dense import LEAST_SIDE
from vision_ssm.engine.dense_checks import check_batches
from vision_ssm.engine.predict_command import predict

EXACT = ("state_dict", "optimizer", "param_schedulers", "history", "rng")
ITERATIONS = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_dense_pictures(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def segmentation(pictures, tmp_path_factory) -> Path:
    """Work dir of an unbroken run."""
    work_dir = tmp_path_factory.mktemp("segmentation")
    cfg = segmentation_config(pictures, work_dir, ITERATIONS)
    cfg.default_hooks.checkpoint.every_iterations = 3
    Runner.from_cfg(cfg).train()
    cfg.dump(work_dir / "config.py")
    return work_dir


@pytest.fixture(scope="module")
def detection(pictures, tmp_path_factory) -> Path:
    """Work dir of an unbroken run."""
    work_dir = tmp_path_factory.mktemp("detection")
    cfg = detection_config(pictures, work_dir)
    cfg.default_hooks.checkpoint.every_iterations = 2
    Runner.from_cfg(cfg).train()
    cfg.dump(work_dir / "config.py")
    return work_dir


def resumed(cfg: Config, checkpoint: Path) -> None:
    shutil.copy(checkpoint, cfg.work_dir)
    cfg.resume = True
    Runner.from_cfg(cfg).train()


@runs_are_exact
@pytest.mark.parametrize("workers", [0, 2])
def test_segmentation_resumes_exactly(workers, pictures, segmentation, tmp_path):
    cfg = segmentation_config(pictures, tmp_path, ITERATIONS)
    cfg.train_dataloader.num_workers = workers
    # the weights that a run begins with are not needed to go on
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "gone.pth"))
    cfg.resume_anyway = True  # unlike the run whose checkpoint this is
    resumed(cfg, segmentation / "iter_3.pth")
    first, second = (read_training(folder / f"iter_{ITERATIONS}.pth") for folder in (segmentation, tmp_path))
    for part in EXACT:
        assert differences(second[part], first[part], part) == []
    losses = first["history"]["iterations"][:, 1]
    assert len(losses) == ITERATIONS and len(losses.unique()) == ITERATIONS
    assert first["meta"]["validation_due"] and [row["epoch"] for row in first["history"]["validation"]] == [4 / 3]


@runs_are_exact
def test_segmentation_killed_before_its_validation_validates_first(pictures, segmentation, tmp_path):
    cfg = segmentation_config(pictures, tmp_path, ITERATIONS)
    resumed(cfg, segmentation / f"iter_{ITERATIONS}.pth")
    assert (tmp_path / "predictions.png").is_file()
    rows = json.loads((tmp_path / "history.json").read_text())
    assert [sorted(key for key in row if key.endswith("mIoU")) for row in rows] == [[], ["val_mIoU"]]


@runs_are_exact
def test_detection_resumes_exactly(pictures, detection, tmp_path):
    cfg = detection_config(pictures, tmp_path)
    resumed(cfg, detection / "iter_2.pth")
    first, second = (read_training(folder / "epoch_2.pth") for folder in (detection, tmp_path))
    for part in EXACT:
        assert differences(second[part], first[part], part) == []
    assert len(first["history"]["iterations"]) == 2 * TRAIN // BATCH


def test_a_run_that_counts_iterations_needs_an_endless_sampler(pictures, tmp_path):
    cfg = segmentation_config(pictures, tmp_path, ITERATIONS)
    cfg.train_dataloader.sampler.endless = False
    with pytest.raises(ValueError, match=r"ended after 3 of 6 iterations.*endless=True"):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_picture_of_a_run(kind, request):
    """Truth beside prediction of every validation image, and curves."""
    work_dir = request.getfixturevalue(kind)
    assert all(Image.open(work_dir / name).size[0] > 500 for name in ("predictions.png", "curves.png"))


def test_names_of_classes_stand_where_mmseg_puts_them():
    from mmseg.visualization import SegLocalVisualizer

    ours, theirs = SampleDrawer("segmentation", dict(classes=CLASSES, palette=PALETTE)).visualizer, SegLocalVisualizer
    generator = np.random.default_rng(0)
    for share in (0.02, 0.5, 1.0):
        mask = (generator.random((9, 14)) < share).astype(np.uint8)
        assert ours._get_center_loc(mask).tolist() == theirs._get_center_loc(ours, mask).tolist()


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_commands_test_and_predict(kind, pictures, request, tmp_path, capsys):
    work_dir = request.getfixturevalue(kind)
    checkpoint = work_dir / ("iter_6.pth" if kind == "segmentation" else "epoch_2.pth")
    assert commands.test([str(work_dir / "config.py"), str(checkpoint), "--work-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((work_dir / "history.json").read_text())
    metric = "mIoU" if kind == "segmentation" else "coco/bbox_mAP"
    assert f"{metric} " in shown and (tmp_path / "predictions.png").is_file() and f"val_{metric}" in rows[-1]

    images = pictures / "images" / "validation"
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    common = [str(work_dir / "config.py"), str(checkpoint), str(images), str(tmp_path / "broken.jpg"), "--score", "0"]
    assert predict([*common, "--out", str(tmp_path / "drawn")]) == 0
    captured = capsys.readouterr()
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["000.png", "001.png", "002.png"]
    factor = math.ceil(LEAST_SIDE / SIDE)  # small images are drawn larger
    assert Image.open(tmp_path / "drawn" / "000.png").size == (factor * SIDE, factor * (SIDE - 16))
    assert "broken.jpg" in captured.err and "000.jpg" in captured.out
    assert predict([*common[:4], "--score", "0", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").is_file()


def test_multi_scale_flip_and_sliding_window(segmentation, tmp_path, capsys):
    common = [str(segmentation / "config.py"), str(segmentation / "iter_6.pth"), "--work-dir", str(tmp_path)]
    values = {}
    slide = ["model.test_cfg.mode=slide", "model.test_cfg.crop_size=48,48", "model.test_cfg.stride=32,32"]
    for name, flags in (("whole", []), ("slide", ["--cfg-options", *slide]), ("several", ["--tta"])):
        assert commands.test([*common, *flags]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "mIoU" in line and "│" in line)
        values[name] = line
    assert len(values) == 3


def test_detection_without_a_tta_pipeline_says_so(detection, tmp_path, capsys):
    with pytest.raises(SystemExit):
        commands.test([str(detection / "config.py"), str(detection / "epoch_2.pth"), "--tta", "--work-dir", str(tmp_path)])
    assert "this config lacks tta_model and tta_pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_bfloat16_on_a_cpu(kind, pictures, tmp_path):
    build = segmentation_config if kind == "segmentation" else detection_config
    cfg = build(pictures, tmp_path, 2 if kind == "segmentation" else 1)
    cfg.optim_wrapper.precision = "bf16"
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = [hook.iterations for hook in runner.hooks if hasattr(hook, "iterations")][0]
    assert len(losses) >= 2 and all(torch.isfinite(torch.tensor(row[1])) for row in losses)


def test_two_processes_train_and_test(pictures, tmp_path):
    """Through torchrun on CPUs, where SyncBN gives way to BN."""
    runs, commands = tmp_path / "runs", []
    last = {"segmentation": "iter_2.pth", "detection": "epoch_1.pth"}
    for kind, build, length in (("segmentation", segmentation_config, 2), ("detection", detection_config, 1)):
        build(pictures, runs / kind, length).dump(tmp_path / f"{kind}.py")
        common = [tmp_path / f"{kind}.py", "--launcher", "pytorch"]
        commands.append([ROOT / "tools" / "train.py", *common])
        commands.append([ROOT / "tools" / "test.py", *common, runs / kind / last[kind], "--work-dir", runs / kind / "test"])
    printed = run_in_two_processes(tmp_path / "launch", *commands)
    for kind, metric, tested in (("segmentation", "mIoU", printed[1]), ("detection", "coco/bbox_mAP", printed[3])):
        meta = read_training(runs / kind / last[kind])["meta"]
        assert (meta["world_size"], meta["iter"], meta["batch_size"]) == (2, 2, BATCH)
        assert tested.count(f" {metric} ") == 1
        for folder in (ROOT, runs / kind, runs / kind / "test"):
            assert not [name for name in (".dist_test", ".collected") if (folder / name).exists()]


def failing(capsys, cfg: Config, folder: Path, *flags: str) -> str:
    """What train.py says about a config that cannot be trained; nothing has been trained by then."""
    cfg.dump(folder / "broken.py")
    with pytest.raises(SystemExit):
        commands.train([str(folder / "broken.py"), *flags])
    assert not list(folder.rglob("*.pth"))
    return capsys.readouterr().err


def test_batches_that_processes_would_wait_for(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    cfg = detection_config(pictures, tmp_path)
    for kind, drop_last, refused in (
        ("AspectRatioBatchSampler", True, True), ("AspectRatioBatchSampler", False, False),
        ("vision_ssm.AspectRatioBatchSampler", True, False),
    ):  # fmt: skip
        cfg.train_dataloader.batch_sampler = dict(type=kind, drop_last=drop_last)
        cfg.launcher = "pytorch"
        if refused:
            said = failing(capsys, cfg, tmp_path, "--launcher", "pytorch")
            assert "and the others wait for it: use type='vision_ssm.AspectRatioBatchSampler'" in said
        else:
            check_batches(cfg)


def test_mistakes_are_named_before_training(pictures, tmp_path, capsys):
    cfg = segmentation_config(pictures, tmp_path)
    cfg.model.backbone = dict(cfg.model.backbone, variant="vmamba_mirco")
    assert "Did you mean 'vmamba_micro'" in failing(capsys, cfg, tmp_path)
    cfg = segmentation_config(pictures, tmp_path)
    cfg.model.backbone = dict(cfg.model.backbone, type="vision_ssm.VMambba")
    assert "Did you mean 'VMamba'" in failing(capsys, cfg, tmp_path)
    cfg = segmentation_config(pictures, tmp_path)
    cfg.model.decode_head.in_channels = [96, 192, 384, 768]
    assert "set model.decode_head.in_channels=[8, 16, 32, 64]" in failing(capsys, cfg, tmp_path)
    cfg = segmentation_config(pictures, tmp_path)
    assert "model.backbone" in failing(capsys, cfg, tmp_path, "--cfg-options", "model.backbone.init_cfg.type=Pretrained",
                                       "model.backbone.init_cfg.checkpoint=none.pth")  # fmt: skip
    cfg = detection_config(pictures, tmp_path)
    cfg.train_dataloader.dataset.ann_file = "annotations/instances_training.json"
    assert "instances_training.json" in failing(capsys, cfg, tmp_path)
    cfg = detection_config(pictures, tmp_path)
    assert "--cuda-graphs is for image classifiers" in failing(capsys, cfg, tmp_path, "--cuda-graphs")


def test_map_of_another_size_than_its_image(pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    Image.new("L", (10, 10)).save(tmp_path / "data" / "annotations" / "training" / "002.png")
    cfg = segmentation_config(tmp_path / "data", tmp_path)
    message = failing(capsys, cfg, tmp_path)
    assert "002.png" in message and "10 x 10" in message


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_data_root_moves_data_sets_and_evaluators(kind, pictures, tmp_path):
    build = segmentation_config if kind == "segmentation" else detection_config
    cfg = build(Path("data/elsewhere"), tmp_path)
    set_data_root(cfg, str(pictures))
    assert "elsewhere" not in cfg.pretty_text and cfg.pretty_text.count(str(pictures)) >= 4
    with pytest.raises(UsageError, match="is not a folder"):
        set_data_root(cfg, str(tmp_path / "nothing"))

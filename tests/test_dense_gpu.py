"""Segmentation and detection on a GPU: every precision, and two processes with NCCL. Run with ``pytest -m gpu``."""

from pathlib import Path

import pytest
import torch
from dense_support import BATCH, detection_config, segmentation_config, write_dense_pictures
from engine_support import ROOT, run_python

from vision_ssm.engine import Runner, read_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUILD = {"segmentation": segmentation_config, "detection": detection_config}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_dense_pictures(tmp_path_factory.mktemp("dense"))


def last_checkpoint(folder: Path) -> Path:
    return folder / (folder / "last_checkpoint").read_text().strip()


@pytest.fixture(scope="module", params=BUILD)
def on_cpu(request, pictures, tmp_path_factory) -> tuple[str, torch.Tensor]:
    """Losses of a run without noise in the model, on the CPU."""
    folder = tmp_path_factory.mktemp(request.param)
    quiet(BUILD[request.param](pictures, folder)).dump(folder / "config.py")
    process = run_python(ROOT / "tools" / "train.py", folder / "config.py")
    assert process.returncode == 0, process.stderr[-4000:]
    return request.param, read_training(last_checkpoint(folder))["history"]["iterations"][:, 1]


def quiet(cfg):
    """`cfg` without dropped paths and dropout."""
    cfg.model.backbone = dict(cfg.model.backbone, drop_path_rate=0.0)
    for head in ("decode_head", "auxiliary_head"):
        if head in cfg.model:
            cfg.model[head].dropout_ratio = 0.0
    return cfg


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-2), ("bf16", 1e-1), ("fp16", 5e-2)])
def test_every_precision_begins_like_the_cpu(precision, tolerance, on_cpu, pictures, tmp_path):
    """The first step; later ones of a detector sample regions from the device's own random numbers."""
    kind, losses = on_cpu
    cfg = quiet(BUILD[kind](pictures, tmp_path))
    cfg.optim_wrapper.precision = precision
    Runner.from_cfg(cfg).train()
    found = read_training(last_checkpoint(tmp_path))["history"]["iterations"][:, 1]
    assert found.isfinite().all() and len(found) == len(losses)
    if kind == "segmentation":
        assert (found[0] - losses[0]).abs() < tolerance * losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", BUILD)
def test_two_gpus_train_and_test(kind, pictures, tmp_path):
    cfg = BUILD[kind](pictures, tmp_path, 2 if kind == "segmentation" else 1)
    cfg.dump(tmp_path / "config.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    trained = run_python(*launch, ROOT / "tools" / "train.py", tmp_path / "config.py", "--launcher", "pytorch", gpus=True)
    assert trained.returncode == 0, trained.stderr[-4000:]
    meta = read_training(last_checkpoint(tmp_path))["meta"]
    assert (meta["world_size"], meta["iter"], meta["batch_size"]) == (2, 2, BATCH)
    tested = run_python(
        *launch, ROOT / "tools" / "test.py", tmp_path / "config.py", last_checkpoint(tmp_path), "--launcher", "pytorch",
        "--work-dir", tmp_path / "test", gpus=True,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr[-4000:]

"""Small pictures and a small config for the tests of the engine."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "classification" / "quickstart_digits.py"
CLASSES = ("bars", "blob", "rows")
TRAIN_PER_CLASS, VAL_PER_CLASS, BATCH = 12, 4, 4
# Parts of the last checkpoint in which a resumed run must equal an unbroken one.
EXACT = ("state_dict", "unaveraged_state_dict", "optimizer", "param_schedulers", "history", "rng")
ITERATIONS = TRAIN_PER_CLASS * len(CLASSES) // BATCH
# Tests that compare two ordinary runs bit by bit. On a GPU only deterministic ones are equal: test_engine_gpu.py.
runs_are_exact = pytest.mark.skipif(torch.cuda.is_available(), reason="an ordinary run on a GPU is not deterministic")


def write_pictures(root: Path) -> Path:
    """Grey 32 x 32 PNG files of three easy classes: vertical bars, a blob, horizontal rows; in ImageNet layout."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shift = generator.uniform(0, 6)
                pattern = {
                    "bars": np.sin((x + shift) * 0.8),
                    "rows": np.sin((y + shift) * 0.8),
                    "blob": 2 * np.exp(-((x - 13 - shift) ** 2 + (y - 16) ** 2) / 60) - 1,
                }[name]
                noisy = 127 + 90 * pattern + generator.normal(0, 12, (32, 32))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    return root


@cache
def _config_of(path: Path) -> Config:
    return Config.fromfile(str(path))


def read_config(path: Path) -> Config:
    """A config that the caller may change. A process reads each file once, which takes mmengine long enough."""
    return deepcopy(_config_of(path))


def small_config(data: Path, work_dir: Path, epochs: int = 2) -> Config:
    """The quick start's config, cut down to a model and a run of seconds, with all the randomness a run can have."""
    cfg = read_config(QUICKSTART)
    cfg.work_dir = str(work_dir)
    cfg.model = dict(
        type="vision_ssm.ImageClassifier",
        backbone=dict(name="vmamba_micro", in_chans=1, dims=8, depths=(1, 1), drop_path_rate=0.2, drop_rate=0.1),
        num_classes=len(CLASSES),
        loss=dict(type="SoftTargetCrossEntropy"),
        mixup=dict(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1),
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=BATCH, num_workers=0, persistent_workers=False)
        loader.dataset.root = str(data)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
    cfg.param_scheduler = [
        dict(type="LinearLR", start_factor=0.1, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", eta_min_ratio=0.1, begin=1, by_epoch=True, convert_to_iter_based=True),
    ]
    cfg.default_hooks.pictures.count = 4
    cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    return cfg


def plain(cfg: Config) -> Config:
    """`cfg` without any noise in the model: no mixing, no dropped paths."""
    cfg.model.update(loss=dict(type="CrossEntropyLoss"), mixup=None)
    cfg.model.backbone.update(drop_path_rate=0.0, drop_rate=0.0)
    return cfg


def differences(first: object, second: object, where: str = "") -> list[str]:
    """Places where two nested structures of tensors and plain values differ; tensors are compared bit by bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
        return [] if same and first.dtype == second.dtype else [f"{where}: tensors differ"]
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{where}: keys {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [line for key in first for line in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [line for i, pair in enumerate(zip(first, second)) for line in differences(*pair, f"{where}/{i}")]
    return [] if first == second else [f"{where}: {first!r} != {second!r}"]


def run_python(*arguments: str | Path, timeout: float = 240, gpus: bool = False) -> subprocess.CompletedProcess:
    """A Python process in the repository's root with one thread; never raises for its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *map(str, arguments)]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error:  # pipes stay open until workers miss a killed parent
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=error, timeout=timeout).returncode
        out.seek(0), error.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), error.read())


_COMMANDS_OF_A_RANK = """
import contextlib, json, runpy, sys
from pathlib import Path
from torch import distributed
from vision_ssm.engine import commands
distributed.init_process_group("gloo")
leave, commands.leave_process_group = commands.leave_process_group, distributed.barrier  # one group for all commands
folder, rank = sys.argv[1], distributed.get_rank()
for number, arguments in enumerate(json.load(open(f"{folder}/commands.json"))):
    sys.argv = arguments
    with open(f"{folder}/{number}_{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise
leave()
threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # would abort the process now and then
"""


def run_in_two_processes(folder: Path, *commands: Sequence[str | Path]) -> list[str]:
    """Tools with their arguments, one after the other in two processes of torchrun, which import all they need once.

    Returns what the processes printed during each command. Files are left in `folder`, which must be new.
    """
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps([list(map(str, arguments)) for arguments in commands]))
    (folder / "rank.py").write_text(_COMMANDS_OF_A_RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = run_python(*launch, folder / "rank.py", folder)
    assert process.returncode == 0, process.stderr[-4000:]
    return ["".join(file.read_text() for file in sorted(folder.glob(f"{i}_*.txt"))) for i in range(len(commands))]

"""Every config under configs/medical: short, built, run for one epoch of small data; the recipes are the papers'."""

import inspect
from pathlib import Path

import pytest
import torch
from engine_support import read_config
from medical_support import MEDICAL, SIZE, WRITERS, shrink
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS
from torch import nn

from vision_ssm import list_unets
from vision_ssm.backbones.family import owner_of
from vision_ssm.engine import Runner, read_training
from vision_ssm.engine.config import check_option, set_data_root
from vision_ssm.engine.medical_hooks import FreezeEncoderHook, StopOnPlateauHook
from vision_ssm.registry import DATASETS, UNETS

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")

LEAVES = sorted(MEDICAL.glob("*.py"))
PUBLISHED = [path for path in LEAVES if "micro" not in path.stem]
CLASSES = {"isic17": 1, "isic18": 1, "synapse": 9, "acdc": 4, "organs": 6}


def of_set(path: Path) -> str:
    return path.stem.rsplit("_", 1)[-1]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = read_config(path)
    assert len(path.read_text().splitlines()) <= 15
    assert cfg.model.unet.name in list_unets() and path.stem.startswith(cfg.model.unet.name.split("_")[0])
    cfg.model.pretrained = None
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert model.num_classes == CLASSES[of_set(path)]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        dataset = cfg[loader].dataset
        assert set(dataset) - {"type"} <= set(inspect.signature(DATASETS.get(dataset.type)).parameters)
    assert cfg.train_dataloader.dataset.split == "train" != cfg.val_dataloader.dataset.split
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
            METRICS.build(metric)
    for hook in [*cfg.default_hooks.values(), *cfg.custom_hooks]:
        HOOKS.build(hook)
    for key in ("model.pretrained", "model.inference.flips", "model.normalize", "train_dataloader.dataset.transform.size",
                "default_hooks.pictures.count", "train_cfg.val_begin"):  # fmt: skip
        check_option(cfg, key)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small data in each layout; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_trains_and_validates(path, folders, tmp_path):
    """One epoch of small images, with the family's micro model in place of its own."""
    cfg = shrink(read_config(path), tmp_path)
    cfg.model.pretrained = None
    variants = owner_of(cfg.model.unet.name, UNETS).variants
    cfg.model.unet = dict(name=next(name for name in variants if name.endswith("_micro")))
    kind = next(name for name in folders if name in cfg.train_dataloader.dataset.type)
    cfg.data_root = cfg.get("data_root")
    set_data_root(cfg, str(folders[kind]))
    if kind == "Nifti":
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.classes = "organs"
    cfg.train_dataloader.batch_size = 4
    cfg.train_cfg.update(max_epochs=1, val_interval=1, val_begin=1)
    cfg.param_scheduler = [dict(item, end=1) for item in cfg.param_scheduler if item.get("begin", 0) == 0]
    runner = Runner.from_cfg(cfg)
    before = {name: value.detach().clone() for name, value in runner.model.named_parameters()}
    runner.train()
    frozen = any(isinstance(hook, FreezeEncoderHook) for hook in runner.hooks)
    learns = [name for name in before if not (frozen and ".encoder." in name)]
    state = runner.model.state_dict()
    moved = [name for name in learns if not torch.equal(state[name], before[name])]
    assert len(moved) > 0.9 * len(learns) and all(torch.equal(state[n], before[n]) for n in set(before) - set(learns))
    assert read_training(tmp_path / "best_dice.pth")["meta"]["metric"] == "dice"
    assert (tmp_path / "per_case.csv").is_file() and (tmp_path / "predictions.png").is_file()


def rates(cfg: Config) -> list[float]:
    """Learning rate of each epoch."""
    parameter = nn.Parameter(torch.zeros(1))
    options = dict(cfg.optim_wrapper.optimizer)
    wrapper = OptimWrapper(getattr(torch.optim, options.pop("type"))([parameter], **options))
    schedulers = [PARAM_SCHEDULERS.build(dict(item), default_args=dict(optimizer=wrapper)) for item in cfg.param_scheduler]
    found = []
    for _ in range(cfg.train_cfg.max_epochs):
        found.append(wrapper.get_lr()["lr"][0])
        for scheduler in schedulers:
            scheduler.step()
    return found


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_recipe_is_the_published_one(path):
    """arXiv 2402.02491, 2406.05992 and 2408.13735 with their code: sections on training; baselines follow their sets."""
    cfg = read_config(path)
    kind, optimizer = of_set(path), cfg.optim_wrapper.optimizer
    msvm = path.stem.startswith("msvmunet") or kind == "acdc"
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_epochs, cfg.optim_wrapper.precision) == (32, 300, "fp32")
    assert (optimizer.type, optimizer.betas, optimizer.eps) == ("AdamW", (0.9, 0.999), 1e-8)
    assert "constructor" not in cfg.optim_wrapper and cfg.randomness.seed == 42  # everything is decayed
    size = 256 if kind.startswith("isic") else 224
    transform = cfg.train_dataloader.dataset.transform
    assert transform == dict(policy="isic" if size == 256 else "msvmunet" if msvm else "synapse", size=size)
    assert cfg.model.inference.size == (size, size)
    found = rates(cfg)
    if msvm:
        assert (optimizer.lr, optimizer.weight_decay) == (5e-4, 1e-4 if kind == "acdc" else 1e-3)
        assert cfg.model.loss == dict(kind="dice_ce", weights=(0.4, 0.6))
        assert cfg.model.normalize == dict(mean=0.5, std=0.5)
        assert found[0] == 5e-4 and found[150] == pytest.approx((5e-4 + 1e-6) / 2) and found[-1] < 2e-6
        hooks = [HOOKS.build(hook) for hook in cfg.custom_hooks]
        assert [hook.patience for hook in hooks if isinstance(hook, StopOnPlateauHook)] == [15]
        resting = [hook.epochs for hook in hooks if isinstance(hook, FreezeEncoderHook)]
        assert resting == ([10] if "plain" not in path.stem else []) and cfg.find_unused_parameters is bool(resting)
        assert cfg.train_cfg.val_interval == 20
    else:
        half = 50 if size == 256 else 100
        assert (optimizer.lr, optimizer.weight_decay) == (1e-3, 1e-2) and cfg.custom_hooks == []
        assert cfg.model.loss == dict(kind="dice_bce" if size == 256 else "dice_ce", weights=(1.0, 1.0))
        assert cfg.model.get("normalize") is None
        assert found[0] == 1e-3 and found[half // 2] == pytest.approx((1e-3 + 1e-5) / 2)
        assert found[half] == pytest.approx(1e-5) and found[2 * half] == pytest.approx(1e-3)  # and up again
    if path.stem.startswith("mhsvm"):
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
        thresholds = {part.threshold for part in model.modules() if hasattr(part, "threshold")}
        assert thresholds == {0.5 if kind == "isic18" else 0.0}
        assert cfg.train_cfg.val_begin == 101 and cfg.model.pretrained is None
    expected = dict(vmunet="vmamba_small_e238_ema.pth", msvmunet="vssm1_tiny_0230s_ckpt_epoch_264.pth")
    assert Path(cfg.model.pretrained or "").name == expected.get(path.stem.split("_")[0], "")


def test_every_set_has_a_baseline():
    sets = {of_set(path) for path in LEAVES}
    assert sets == set(CLASSES)
    for name in sets:
        stems = [path.stem for path in LEAVES if of_set(path) == name]
        assert sum(stem.startswith("plain_unet") for stem in stems) == 1 < len(stems)
    assert SIZE % 32 == 0  # of the small data, which every U-Net takes without padding

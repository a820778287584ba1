"""Every config under configs/ is built, part by part; the published recipe is what the configs say."""

import re
from pathlib import Path

import pytest
import torch
from engine_support import CONFIGS, read_config
from mmengine.config import Config
from mmengine.registry import HOOKS, LOG_PROCESSORS, METRICS, MODELS, PARAM_SCHEDULERS, VISBACKENDS

from vision_ssm import create_model, list_models
from vision_ssm.data import build_transform
from vision_ssm.engine.config import check_option
from vision_ssm.engine.optim import ParameterGroups
from vision_ssm.factory import find_family
from vision_ssm.registry import BACKBONES, DATA_SAMPLERS, DATASETS, FUNCTIONS

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # schedules without training

LEAVES = sorted((CONFIGS / "classification").glob("*.py"))
BASES = sorted(path for path in CONFIGS.rglob("*.py") if "_base_" in path.parts)
RECIPE = CONFIGS / "classification" / "vmamba_tiny_s1l8_8xb128_in1k.py"


def build(cfg: Config):
    """Model on the meta device and optimizer wrapper of a config; float32, because there is no GPU to ask."""
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    return model, optimizer_of(cfg, model)


def optimizer_of(cfg: Config, model):
    wrapper = {
        key: value for key, value in cfg.optim_wrapper.items() if key not in ("constructor", "paramwise_cfg", "type")
    }
    return ParameterGroups({**wrapper, "precision": "fp32"}, cfg.optim_wrapper.get("paramwise_cfg"))(model)


def schedule(cfg: Config, wrapper, epoch_length: int) -> list:
    options = [{**item, "end": item.get("end", cfg.train_cfg.max_epochs)} for item in cfg.param_scheduler]
    defaults = dict(optimizer=wrapper, epoch_length=epoch_length)
    return [PARAM_SCHEDULERS.build(item, default_args=defaults) for item in options]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = read_config(path)
    model, wrapper = build(cfg)
    assert cfg.model.backbone.name in list_models()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in wrapper.optimizer.param_groups) == len(trained)
    assert len(schedule(cfg, wrapper, 10)) == len(cfg.param_scheduler)
    channels = cfg.model.backbone.get("in_chans", 3)
    for loader, train in (("train_dataloader", True), ("val_dataloader", False), ("test_dataloader", False)):
        dataset = cfg[loader].dataset
        assert DATASETS.get(dataset.type) is not None and dataset.transform.train is train
        assert dataset.get("channels", 3) == channels
        assert callable(build_transform(**{"channels": channels, **dataset.transform}))
        DATA_SAMPLERS.build({**cfg[loader].sampler, "dataset": range(10), "seed": 0})
        assert callable(FUNCTIONS.get(cfg[loader].collate_fn.type))
        METRICS.build(cfg.val_evaluator)
    for hook in [*cfg.default_hooks.values(), *cfg.custom_hooks]:
        HOOKS.build(hook)
    for backend in cfg.visualizer.vis_backends:
        assert VISBACKENDS.get(backend.type) is not None
    LOG_PROCESSORS.build({"type": "LogProcessor", **cfg.log_processor})
    if cfg.model.mixup is not None:
        assert cfg.train_dataloader.batch_size % 2 == 0 and cfg.train_dataloader.drop_last


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict:
    """A small model in the place of the one that distilled models learn from."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(create_model("vmamba_micro").state_dict(), file)
    return dict(teacher="vmamba_micro", checkpoint=str(file))


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_one_training_step_of_a_micro_model(path, teacher):
    """Loss, mixing, distillation and optimizer of every config, with its family's micro model."""
    cfg = read_config(path)
    family = find_family(cfg.model.backbone.name)
    settings = {**family.variants[cfg.model.backbone.name], **cfg.model.backbone}
    kept = {key: settings[key] for key in ("drop_path_rate", "distilled", "in_chans") if key in settings}
    micro = next(name for name in family.variants if name.endswith("_micro"))
    distillation = cfg.model.get("distillation")
    model = MODELS.build(
        {**cfg.model, "backbone": dict(kept, name=micro), "pretrained": None, "reset_head": False,
         "distillation": distillation and {**distillation, **teacher}}
    )  # fmt: skip
    if distillation:
        model.distillation.prepare(torch.device("cpu"))
    wrapper = optimizer_of(cfg, model)
    before = {name: value.detach().clone() for name, value in model.backbone.named_parameters()}
    channels = kept.get("in_chans", 3)
    data = dict(image=torch.randn(2, channels, 64, 64), label=torch.tensor([1, 2]), path=["a.png", "b.png"])
    losses = [model.train_step(data, wrapper)["loss"] for _ in range(wrapper.accumulative_counts)]
    assert torch.stack(losses).isfinite().all()
    moved = [not torch.equal(value, before[name]) for name, value in model.backbone.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)  # a dropped path may leave a block of two images without gradient


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_leaf_is_short_and_names_its_model(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 15
    cfg = read_config(path)
    name = cfg.model.backbone.name
    if name != "vmamba_micro":
        assert re.fullmatch(rf"{name}_(\d+xb\d+_in1k(_distill|_stage[23]|_300e)?|finetune)", path.stem)
    if path.stem.endswith("_in1k"):
        family = find_family(name)
        assert cfg.model.backbone.get("drop_path_rate", 0.0) == family.variants[name].get("drop_path_rate", 0.0)
        batch = re.search(r"_(\d+)xb(\d+)_in1k$", path.stem)
        assert int(batch[2]) == cfg.train_dataloader.batch_size
        assert int(batch[1]) * int(batch[2]) == cfg.auto_scale_lr.base_batch_size
        published = family.published.get(name)
        if published is None:
            assert "Neither weights nor an accuracy are published" in " ".join(lines[:3])
        else:
            assert f"reported top-1 {published['top1_reported']} %" in " ".join(lines[:3])


def test_bases_have_no_bases_and_are_all_used():
    """Runtimes are the exception: that of a task adds to that of every run."""
    used = set()
    for path in CONFIGS.rglob("*.py"):
        used |= {(path.parent / base).resolve() for base in re.findall(r'"(\.{1,2}/[^"]+\.py)"', path.read_text())}
    assert used == {base.resolve() for base in BASES}
    for base in BASES:
        assert base.stem.endswith("_runtime") or not re.search("^_base_ ", base.read_text(), re.M)


def test_every_variant_has_a_config():
    configured = {re.sub(r"_\d+xb\d+_in1k$", "", path.stem) for path in LEAVES if path.stem.endswith("_in1k")}
    classifiers = {name for name in list_models() if not find_family(name).variants[name].get("features_only")}
    assert configured == {name for name in classifiers if not name.endswith("_micro")}


def test_every_family_has_a_config_to_fine_tune_with():
    """Weights of ImageNet as a start: few layers learn fast, and states are not decayed."""
    tuned = {}
    for path in CONFIGS.rglob("*_finetune.py"):
        cfg = read_config(path)
        model, wrapper = build(cfg)
        tuned[type(model.backbone)] = wrapper
        names = {id(parameter): name for name, parameter in model.backbone.named_parameters()}
        kept = model.backbone.no_weight_decay()
        groups = wrapper.optimizer.param_groups
        for group in groups:
            for name in (names[id(parameter)] for parameter in group["params"]):
                assert name not in kept or group["weight_decay"] == 0, name
        assert min(group["lr"] for group in groups) < 0.3 * max(group["lr"] for group in groups)
    assert set(tuned) == set(BACKBONES.module_dict.values())


def test_recipe_of_vmamba_on_imagenet():
    """arXiv 2401.10166 and its code: section "Training" of the original configs for 8 x 128 images."""
    cfg = read_config(RECIPE)
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == 1024 == cfg.auto_scale_lr.base_batch_size and cfg.auto_scale_lr.enable
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.betas, optimizer.eps) == ("AdamW", (0.9, 0.999), 1e-8)
    assert optimizer.lr == 5e-4 * batch / 512 and optimizer.weight_decay == 0.05
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0) and cfg.optim_wrapper.precision == "fp16"
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.model.loss == dict(type="SoftTargetCrossEntropy")
    assert cfg.model.mixup == dict(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1
    )
    train, val = cfg.train_dataloader.dataset.transform, cfg.val_dataloader.dataset.transform
    assert (train.auto_augment, train.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (train.erasing_prob, train.erasing_mode, train.interpolation) == (0.25, "pixel", "bicubic")
    assert val.input_size == 224 and round(val.input_size / val.crop_pct) == 256 and val.interpolation == "bicubic"
    assert [(hook.type, hook.momentum) for hook in cfg.custom_hooks] == [("EMAHook", 1e-4)]

    _, wrapper = build(cfg)
    length = 20
    schedulers = schedule(cfg, wrapper, length)
    rates = []
    for _ in range(300 * length):
        rates.append(wrapper.get_lr()["base_lr"][0])
        for scheduler in schedulers:
            scheduler.step()
    scale = batch / 512
    assert rates[0] == pytest.approx(5e-7 * scale)
    assert rates[20 * length] == pytest.approx(5e-4 * scale) and max(rates) == pytest.approx(5e-4 * scale)
    assert rates[10 * length] == pytest.approx(
        (5e-7 + (5e-4 - 5e-7) / 2 * (1 + 1 / (20 * length - 1))) * scale, rel=1e-3
    )
    assert rates[160 * length] == pytest.approx((5e-4 + 5e-6) / 2 * scale)  # half of the cosine
    assert wrapper.get_lr()["base_lr"][0] == pytest.approx(5e-6 * scale, rel=1e-5)


def test_recipe_decays_what_the_original_decays():
    model, wrapper = build(read_config(RECIPE))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in wrapper.optimizer.param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    leaves = {name.rsplit(".", 1)[-1] for name in decayed}
    assert leaves == {"weight", "A_log", "dt_proj_bias", "dt_proj_weight", "x_proj_weight"}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        expected = not name.endswith(".D") and (parameter.ndim > 1)
        assert (name in decayed) is expected, name


@pytest.mark.parametrize(
    "key",
    [
        "optim_wrapper.optimizer.lr",
        "optim_wrapper.optimizer.amsgrad",
        "optim_wrapper.paramwise_cfg",
        "model.backbone.drop_rate",
        "model.pretrained",
        "train_dataloader.dataset.strict",
        "train_dataloader.dataset.transform.hflip",
        "custom_hooks.0.momentum",
        "param_scheduler.1.begin",
        "default_hooks.checkpoint.every_iterations",
        "train_cfg.val_begin",
        "randomness.diff_rank_seed",
        "load_from",
        "find_unused_parameters",
    ],
)
def test_options_that_exist(key):
    check_option(read_config(RECIPE), key)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optim_wraper.optimizer.lr", r"the config has no key 'optim_wraper'. Did you mean 'optim_wrapper'"),
        ("optim_wrapper.optimizer.weight_dcay", r"has no key 'weight_dcay'. Did you mean 'weight_decay'"),
        ("optim_wrapper.accumulative_count", r"Did you mean 'accumulative_counts'"),
        ("train_cfg.max_epoch", r"train_cfg has no key 'max_epoch'. Did you mean 'max_epochs'"),
        ("model.num_class", r"model has no key 'num_class'. Did you mean 'num_classes'"),
        ("default_hooks.checkpoint.intervall", r"default_hooks.checkpoint has no key 'intervall'"),
        ("train_dataloader.dataset.rooot", r"Did you mean 'root'"),
        ("custom_hooks.3.momentum", r"custom_hooks is a list of 1, '3' is no place in it"),
        ("log_level.x", r"log_level is 'INFO' and has no parts"),
    ],
)
def test_options_that_do_not_exist(key, message):
    with pytest.raises(ValueError, match=message):
        check_option(read_config(RECIPE), key)


def test_config_files_are_where_they_belong():
    folders = {path.parent.relative_to(CONFIGS) for path in BASES}
    assert folders == {Path("_base_"), *(Path("_base_") / name for name in ("datasets", "models", "schedules"))}

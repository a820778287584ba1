"""Every config of segmentation and detection: built whole, its data read from disk, and one training step taken.

The step is that of a stand-in: the family's smallest variant under heads of few channels, on random images.
"""

import json
import re
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from engine_support import CONFIGS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from vision_ssm import create_model
from vision_ssm.backbones.plain import PlainBackbone
from vision_ssm.data.shapes import write_shapes
from vision_ssm.factory import find_family
from vision_ssm.integrations.checks import check_config
from vision_ssm.scans.windowed import FIXED
from vision_ssm.weights import load_state_dict

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step"),  # schedules without training
    pytest.mark.filterwarnings("ignore:Default ..avg_non_ignore.. is False"),
    pytest.mark.filterwarnings("ignore:.*reduce_zero_label"),
    pytest.mark.filterwarnings("ignore:The prefix is not set in metric class"),
]

LEAVES = {path.stem: path for folder in ("segmentation", "detection") for path in sorted((CONFIGS / folder).glob("*.py"))}
WIDTH, SIDE = 16, 64
METHODS = {
    "upernet": ("EncoderDecoder", "UPerHead"),
    "semantic_fpn": ("EncoderDecoder", "FPNHead"),
    "mask_rcnn": ("MaskRCNN", "StandardRoIHead"),
    "retinanet": ("RetinaNet", "RetinaHead"),
    "cascade_mask_rcnn": ("CascadeRCNN", "CascadeRoIHead"),
}
NAME = re.compile(
    rf"(?P<method>{'|'.join(METHODS)})_(?P<variant>\w+?)(_(fpn|simplefpn))?"
    r"(_(?P<gpus>\d+)xb(?P<batch>\d+)_(?P<length>\d+(k|x|e))_(?P<data>ade20k_512|cityscapes_512x1024|coco)|_shapes)"
)


@cache
def config(name: str) -> Config:
    return Config.fromfile(str(LEAVES[name]))


@pytest.fixture(params=LEAVES)
def name(request):
    """A leaf's name; the default scope is that of its runs."""
    with DefaultScope.overwrite_default_scope(config(request.param).default_scope):
        yield request.param


def segments(cfg: Config) -> bool:
    return cfg.default_scope == "mmseg"


def optimizer_of(cfg: Config, model: torch.nn.Module):
    """The optimizer wrapper of a config; fp16 needs a GPU and gives way to float32."""
    settings = cfg.optim_wrapper.to_dict()
    settings["precision"] = {"fp16": "fp32"}.get(settings["precision"], settings["precision"])
    return build_optim_wrapper(model, settings)


def rates_and_decays(name: str) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every trainable parameter of a leaf's model."""
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        with torch.device("meta"):
            model = MODELS.build(deepcopy(cfg.model))
        groups = optimizer_of(cfg, model).optimizer.param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {key: settings[id(value)] for key, value in model.named_parameters()}


# What every leaf is


def test_name_is_that_of_model_data_and_batch(name):
    cfg, match = config(name), NAME.fullmatch(name)
    assert match, "leaves are named METHOD_VARIANT[_NECK]_GPUSxbBATCH_LENGTH_DATA or METHOD_VARIANT_shapes"
    assert cfg.model.type == METHODS[match["method"]][0]
    assert match["variant"] == cfg.model.backbone.variant
    text = LEAVES[name].read_text()
    assert len(text.splitlines()) <= 15 and text.startswith("# ")
    if match["data"] is None:
        return
    assert int(match["batch"]) == cfg.train_dataloader.batch_size
    assert int(match["gpus"]) * int(match["batch"]) == cfg.auto_scale_lr.base_batch_size and cfg.auto_scale_lr.enable
    number, unit = int(match["length"][:-1]), match["length"][-1]
    if unit == "x":
        assert cfg.train_cfg.by_epoch and cfg.train_cfg.max_epochs == 12 * number
    else:  # 100 epochs of COCO are 184,375 batches of 64
        assert not cfg.train_cfg.by_epoch
        assert cfg.train_cfg.max_iters == (1000 * number if unit == "k" else 184375 * number // 100)
    classes = {"ade20k_512": 150, "cityscapes_512x1024": 19, "coco": 80}[match["data"]]
    assert set(re.findall(r"'num_classes': (\d+)", str(cfg.model.to_dict()))) == {str(classes)}


def test_pretrained_weights_are_the_published_ones(name):
    backbone = config(name).model.backbone
    classifier = backbone.variant.removesuffix("_seg")
    file = find_family(classifier).published.get(classifier, {}).get("file", "")
    if re.fullmatch(r"[\w.-]+\.(pth|ckpt|safetensors)", file):
        assert backbone.init_cfg == dict(type="Pretrained", checkpoint=f"checkpoints/{file}")
    else:
        assert backbone.init_cfg is None


def test_unverified_figures_are_not_repeated(name):
    """The papers of these families report figures that their code does not confirm."""
    unverified = {"LBVim", "LocalVim", "LocalVMamba", "EfficientVMamba", "GroupMamba"}
    family = config(name).model.backbone.type.removeprefix("vision_ssm.")
    if family in unverified:
        assert "reported" not in LEAVES[name].read_text()


def test_config_builds(name):
    cfg, method = config(name), NAME.fullmatch(name)["method"]
    with torch.device("meta"):
        model = MODELS.build(deepcopy(cfg.model))
    channels = [info["num_chs"] for info in model.backbone.out_info]
    heads = [model.decode_head] if segments(cfg) else [getattr(model, "roi_head", None) or model.bbox_head]
    assert [type(head).__name__ for head in heads] == [METHODS[method][1]]
    taker = getattr(model, "neck", None) or model.decode_head
    expected = [taker.in_channels] if isinstance(taker.in_channels, int) else list(taker.in_channels)
    assert expected == channels
    if method == "upernet":
        auxiliary = model.auxiliary_head
        assert auxiliary.in_channels == channels[auxiliary.in_index]
    if isinstance(model.backbone, PlainBackbone):
        check_plain_backbone(cfg, model.backbone)
    wrapper = optimizer_of(cfg, model)
    grouped = [id(parameter) for group in wrapper.optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    defaults = dict(optimizer=wrapper, epoch_length=10)
    schedulers = [PARAM_SCHEDULERS.build(item.to_dict(), default_args=defaults) for item in cfg.param_scheduler]
    assert len(schedulers) == len(cfg.param_scheduler)
    for hook in [*cfg.default_hooks.values(), *cfg.get("custom_hooks", [])]:
        HOOKS.build(hook.to_dict())


def check_plain_backbone(cfg: Config, backbone: PlainBackbone) -> None:
    """Blocks whose maps are taken, what these maps are, and what the heads make of them, as in the originals."""
    family = cfg.model.backbone.type.removeprefix("vision_ssm.")
    depth = len(backbone.stage_info)
    four = {20: [4, 9, 14, 19], 24: [5, 11, 17, 23], 36: [8, 17, 26, 35]}[depth]
    assert backbone.out_indices == ([depth - 1] if cfg.model.type == "CascadeRCNN" else four)
    mixes = family in ("LBVim", "LocalVim") or (family == "Vim" and segments(cfg))
    assert backbone.feature_source == ("mixer" if mixes else "stream")
    if segments(cfg):
        assert cfg.model.test_cfg.mode == ("slide" if family in ("Vim", "LBVim") else "whole")
        assert cfg.model.decode_head.channels == (backbone.num_features if family == "Vim" else 512)
        assert cfg.model.auxiliary_head.in_index == (3 if family == "PlainMamba" else 2)


# Data


@pytest.fixture(scope="session")
def roots(tmp_path_factory) -> dict[str, str]:
    """Small folders in the layout of each data set, by the end of the data root that configs have."""
    top = tmp_path_factory.mktemp("dense")
    for folder, layout, options in (
        ("ade20k", "ade20k", {}),
        ("shapes_ade20k", "ade20k", {}),
        ("cityscapes", "cityscapes", {}),
        ("coco", "coco", dict(coco_names=True)),
        ("shapes_coco", "coco", {}),
    ):
        write_shapes(top / folder, layout, train=10, val=4, size=64, **options)
    return {f"data/{path.name}": str(path) for path in top.iterdir()}


def relocated(settings: object, roots: dict[str, str]) -> object:
    """`settings` with the data roots of `roots` replaced."""
    if isinstance(settings, dict):
        return {key: relocated(value, roots) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return type(settings)(relocated(value, roots) for value in settings)
    if isinstance(settings, str) and settings.startswith("data/"):
        head = "/".join(settings.split("/")[:2])
        return roots[head] + settings.removeprefix(head)
    return settings


_READ: set[str] = set()


def once(*settings: object) -> bool:
    """Whether nothing with these settings, all from configs, has been asked for before."""
    key = json.dumps(settings, default=str)
    found = key in _READ
    _READ.add(key)
    return not found


def check_training_data(cfg: Config, roots: dict[str, str]) -> None:
    loader = relocated(cfg.train_dataloader.to_dict(), roots)
    loader.update(num_workers=0, persistent_workers=False, batch_size=2)
    assert loader["sampler"]["type"] == "vision_ssm.EpochSampler" and loader["sampler"]["shuffle"]
    assert loader["sampler"].get("endless", False) is not cfg.train_cfg.by_epoch
    batches = iter(Runner.build_dataloader(loader, seed=0))
    batch = next(batches)
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        if segments(cfg):
            size = cfg.model.data_preprocessor.size
            assert sample.gt_sem_seg.shape == image.shape[1:] and all(a <= b for a, b in zip(image.shape[1:], size))
            labels = sample.gt_sem_seg.data.unique().tolist()
            assert labels and set(labels) <= {*range(cfg.model.decode_head.num_classes), 255}
        else:
            truth = sample.gt_instances
            assert len(truth.bboxes) == len(truth.labels)
            assert ("masks" in truth) is (cfg.model.type != "RetinaNet")


def check_validation_data(cfg: Config, roots: dict[str, str]) -> None:
    assert cfg.val_dataloader.batch_size == 1 and cfg.test_dataloader.batch_size == 1
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline == cfg.test_pipeline
    assert not cfg.val_dataloader.sampler.shuffle and not cfg.val_dataloader.sampler.round_up
    dataset = DATASETS.build(relocated(cfg.val_dataloader.dataset.to_dict(), roots))
    assert len(dataset) == 4
    item = dataset[0]
    sample = item["data_samples"]
    height, width = sample.ori_shape
    if segments(cfg):
        assert sample.gt_sem_seg.shape == (height, width)  # never resized
    else:
        assert {"img_id", "scale_factor"} <= set(sample.metainfo_keys()) and "gt_instances" in sample
    metric = METRICS.build(relocated(cfg.val_evaluator.to_dict(), roots))
    metric.dataset_meta = dataset.metainfo
    if segments(cfg):
        perfect = dict(sample.to_dict(), pred_sem_seg=dict(data=sample.gt_sem_seg.data))
        metric.process(item, [perfect])
        result = metric.evaluate(1)
        assert result["mIoU"] == 100.0
    else:
        found = dict(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.long), masks=[])
        metric.process(item, [dict(img_id=sample.img_id, ori_shape=(height, width), pred_instances=found)])
        assert metric.results and metric.metrics[0] == "bbox"
        assert ("segm" in metric.metrics) is (cfg.model.type != "RetinaNet")


def check_augmented_test(cfg: Config, roots: dict[str, str]) -> None:
    dataset = DATASETS.build(relocated(cfg.val_dataloader.dataset.to_dict(), roots))
    result = Compose(cfg.to_dict()["tta_pipeline"])(dataset.get_data_info(0))
    flips = [sample.metainfo["flip"] for sample in result["data_samples"]]
    sizes = [tuple(image.shape[1:]) for image in result["inputs"]]
    assert len(flips) in (6, 12) and sum(flips) == len(flips) // 2
    assert len(set(sizes)) == len(flips) // 2
    assert cfg.tta_model.type == "SegTTAModel"


def test_data_is_read(name, roots):
    """Leaves share data sets: every different one is read once."""
    cfg = config(name)
    if once("train", cfg.train_dataloader.to_dict(), cfg.train_cfg.by_epoch):
        check_training_data(cfg, roots)
    if once("val", cfg.val_dataloader.to_dict(), cfg.test_dataloader.to_dict(), cfg.val_evaluator.to_dict()):
        check_validation_data(cfg, roots)
    if segments(cfg) and once("flips and scales", cfg.tta_pipeline):
        check_augmented_test(cfg, roots)


# One training step


def shrink(node: object) -> object:
    """Settings of necks, heads, samplers and paddings, with few channels and few proposals."""
    if isinstance(node, (list, tuple)):
        return type(node)(shrink(value) for value in node)
    if not isinstance(node, dict):
        return node
    small = {key: shrink(value) for key, value in node.items()}
    for key in ("feat_channels", "conv_out_channels", "fc_out_channels", "out_channels", "in_channels"):
        if isinstance(small.get(key), int):
            small[key] = WIDTH
        elif isinstance(small.get(key), list):
            small[key] = [WIDTH] * len(small[key])
    limits = dict(channels=WIDTH, nms_pre=64, max_per_img=16, num=16, size=(SIDE, SIDE))
    return {**small, **{key: value for key, value in limits.items() if key in small}}


def small_backbone(settings: dict) -> tuple[str, dict]:
    """The smallest variant of a family and the keywords that it has in the place of the leaf's variant."""
    family = find_family(settings["variant"])
    (variant,) = [variant for variant in family.variants if variant.endswith("_micro")]
    keywords = {}
    if issubclass(family, PlainBackbone):
        keywords["depth"] = 4
        if "directions" in family.variants[variant]:
            keywords["directions"] = FIXED
    if "maps" in family.variants[settings["variant"]]:
        keywords["maps"] = family.variants[settings["variant"]]["maps"]
    return variant, keywords


def stand_in(cfg: Config) -> ConfigDict:
    """The model of a config in small: all its switches, but not its sizes."""
    model = shrink(cfg.model.to_dict())
    backbone = cfg.model.backbone.to_dict()
    variant, keywords = small_backbone(backbone)
    if "maps" in find_family(variant).variants[backbone["variant"]]:  # HRVMamba for segmentation is a variant of its own
        keywords["maps"] = find_family(variant).variants[backbone["variant"]]["maps"]
    backbone.update(keywords, variant=variant, init_cfg=None)
    if "out_indices" in backbone:
        backbone["out_indices"] = (3,)
    if "out_dim" in backbone:
        backbone["out_dim"] = WIDTH
    if "img_size" in backbone:
        backbone["img_size"] = SIDE
    model["backbone"] = backbone
    widths = [info["num_chs"] for info in MODELS.build(dict(backbone)).out_info]
    taker = model.get("neck") or model["decode_head"]
    taker["in_channels"] = widths if isinstance(taker["in_channels"], list) else widths[0]
    if "auxiliary_head" in model:
        model["auxiliary_head"]["in_channels"] = widths[model["auxiliary_head"]["in_index"]]
    return ConfigDict(model)


def random_batch(cfg: Config) -> dict:
    """Two random images with random truth."""
    generator = np.random.default_rng(0)
    inputs = [torch.from_numpy(generator.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)) for _ in range(2)]
    samples = []
    for _ in inputs:
        if segments(cfg):
            from mmseg.structures import SegDataSample

            sample = SegDataSample()
            labels = generator.integers(0, cfg.model.decode_head.num_classes, (1, SIDE, SIDE))
            labels[:, :2] = 255
            sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels))
        else:
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            sample = DetDataSample()
            boxes = torch.tensor([[4.0, 6.0, 36.0, 40.0], [20.0, 10.0, 60.0, 60.0]])
            masks = np.zeros((2, SIDE, SIDE), np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
            labels = torch.from_numpy(generator.integers(0, 6, 2))
            sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, SIDE, SIDE))
            sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        sample.set_metainfo(dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1.0, 1.0)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def test_stand_in_takes_a_training_step(name):
    cfg, settings = config(name), stand_in(config(name))
    check_config({**cfg.to_dict(), "model": settings})
    torch.manual_seed(0)
    model = MODELS.build(deepcopy(settings))
    model.init_weights()
    model = revert_sync_batchnorm(model).train()
    wrapper = optimizer_of(cfg, model)
    wrapper.optimizer.register_step_pre_hook(lambda *_: silent.extend(without_gradient(model)))
    silent: list[str] = []
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    losses = model.train_step(random_batch(cfg), wrapper)
    assert losses and all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values())
    if cfg.get("find_unused_parameters", False):  # the detector begins at the second map
        assert silent and all(key.startswith(("backbone.out_norms.0.", "backbone.pyramid.levels.0.")) for key in silent)
    else:
        assert silent == []
    after = dict(model.named_parameters())
    assert all(torch.isfinite(after[key]).all() for key in before)
    assert any(not torch.equal(after[key], value) for key, value in before.items() if key.startswith("backbone."))


def without_gradient(model: torch.nn.Module) -> list[str]:
    """Trainable parameters that the loss does not reach: data-parallel training would wait for them."""
    return [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]


def test_weights_of_a_classifier_fill_the_backbone(name):
    """Nothing but output norms and pyramids, which a classifier has not, keeps its initial values."""
    settings = stand_in(config(name))["backbone"]
    variant, keywords = small_backbone(config(name).model.backbone)
    if not once("weights", settings):
        return
    classifier = create_model(variant, num_classes=3, **keywords)
    report = load_state_dict(MODELS.build(dict(settings)), classifier.state_dict())
    assert report.complete and report.loaded
    for key in (key for keys in report.ignored.values() for key in keys):
        assert key.startswith(("out_norms.", "pyramid.", "cls_token.", "norm.", "head.", "class_block."))


# What the recipes are, in the papers and in the originals' configs

DROP_PATHS = {
    **dict.fromkeys(("vanilla_vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"), 0.2),
    **dict.fromkeys(("vanilla_vmamba_small", "vmamba_small_s2l15"), 0.3),
    **dict.fromkeys(("vanilla_vmamba_base", "vmamba_base_s2l15"), 0.6),
    **dict.fromkeys(("msvmamba_nano", "msvmamba_micro_d64", "msvmamba_tiny"), 0.2),
    **{"spatialmamba_tiny": 0.2, "spatialmamba_small": 0.3, "spatialmamba_base": 0.5},
    **{"vssd_tiny": 0.2, "vssd_small": 0.4, "upernet_vssd_micro_d48": 0.2, "mask_rcnn_vssd_micro_d48": 0.1},
    **{"plainmamba_l1": 0.1, "plainmamba_l2": 0.2, "plainmamba_l3": 0.3},
    **{"upernet_localvmamba_tiny": 0.1, "upernet_localvmamba_small": 0.2, "upernet_localvim_tiny": 0.1},
    **dict.fromkeys(("efficientvmamba_tiny", "efficientvmamba_small", "efficientvmamba_base"), 0.1),
    **dict.fromkeys(("cascade_mask_rcnn_vim_tiny", "cascade_mask_rcnn_lbvim_300", "cascade_mask_rcnn_localvim_tiny"), 0.1),
    **{"vcmamba_s": 0.2, "vcmamba_b": 0.2, "groupmamba_tiny": 0.05, "hrvmamba_base_seg": 0.15},
}
WHAT_THERE_IS = {
    "upernet": "vanilla_vmamba_tiny vanilla_vmamba_small vanilla_vmamba_base vmamba_tiny_s1l8 vmamba_tiny_s2l5 "
    "vmamba_small_s2l15 vmamba_base_s2l15 msvmamba_nano msvmamba_micro_d64 msvmamba_tiny spatialmamba_tiny "
    "spatialmamba_small spatialmamba_base vssd_micro_d48 vssd_tiny vssd_small plainmamba_l1 plainmamba_l2 "
    "plainmamba_l3 lbvim_tiny lbvim_300 lbvim_small lbvim_528 localvim_tiny localvim_small localvmamba_tiny "
    "localvmamba_small vim_tiny vim_small hrvmamba_base_seg",
    "semantic_fpn": "efficientvim_m4 vcmamba_s vcmamba_b",
    "mask_rcnn_1x": "vanilla_vmamba_tiny vanilla_vmamba_small vanilla_vmamba_base vmamba_tiny_s1l8 vmamba_tiny_s2l5 "
    "vmamba_small_s2l15 vmamba_base_s2l15 msvmamba_nano msvmamba_micro_d64 msvmamba_tiny spatialmamba_tiny "
    "spatialmamba_small spatialmamba_base vssd_micro_d48 vssd_tiny vssd_small plainmamba_l1 plainmamba_l2 "
    "plainmamba_l3 localvmamba_tiny localvmamba_small efficientvmamba_tiny efficientvmamba_small efficientvim_m4 "
    "groupmamba_tiny",
    "mask_rcnn_3x": "vanilla_vmamba_tiny vanilla_vmamba_small vmamba_tiny_s1l8 vmamba_tiny_s2l5 vmamba_small_s2l15 "
    "msvmamba_micro_d64 msvmamba_tiny spatialmamba_tiny spatialmamba_small vssd_micro_d48 vssd_tiny vssd_small "
    "localvmamba_tiny localvmamba_small efficientvmamba_base",
    "retinanet_1x": "plainmamba_l1 plainmamba_l2 plainmamba_l3 efficientvim_m4",
    "cascade_mask_rcnn": "vim_tiny localvim_tiny localvim_small lbvim_tiny lbvim_300 lbvim_small lbvim_528",
}


def test_every_family_has_the_configs_that_its_original_has():
    found: dict[str, set[str]] = {}
    for name in LEAVES:
        match = NAME.fullmatch(name)
        length = f"_{match['length']}" if match["length"] in ("1x", "3x") else ""
        if match["data"]:
            found.setdefault(match["method"] + length, set()).add(match["variant"])
    assert found == {method: set(variants.split()) for method, variants in WHAT_THERE_IS.items()}


def test_drop_paths():
    seen = set()
    for name in LEAVES:
        match = NAME.fullmatch(name)
        for key in (match["variant"], f"{match['method']}_{match['variant']}"):
            if key in DROP_PATHS:
                assert config(name).model.backbone.drop_path_rate == DROP_PATHS[key], name
                seen.add(key)
    assert seen == set(DROP_PATHS)


def schedule(cfg: Config) -> list[tuple]:
    """Kind, first and last step, and what the scheduler is about, of every scheduler."""
    about = {"LinearLR": "start_factor", "PolyLR": "power", "MultiStepLR": "milestones"}
    return [(item.type, item.begin, item.end, item[about[item.type]]) for item in cfg.param_scheduler]


@pytest.mark.parametrize(
    ("pattern", "length", "batch", "lr", "decay", "steps", "count"),
    [
        ("upernet_(?!hrv).*_160k", 160000, 16, 6e-5, 0.01, [(1500, 1e-6), 1.0], 27),
        ("upernet_hrvmamba", 160000, 16, 6e-5, 0.01, [(1500, 1e-5), 1.0], 1),
        ("upernet_vmamba.*cityscapes", 80000, 8, 6e-5, 0.01, [(1500, 1e-6), 1.0], 1),
        ("upernet_vim_tiny", 60000, 32, 2e-4, 0.1, [(1500, 1e-6), 1.0], 1),
        ("upernet_vim_small", 60000, 32, 1e-4, 0.05, [(1500, 1e-6), 1.0], 1),
        ("semantic_fpn", 40000, 32, 2e-4, 1e-4, [0.9], 3),
        ("mask_rcnn_(?!efficientvim).*_1x", 12, 16, 1e-4, 0.05, [(1000, 1e-3), [8, 11]], 24),
        ("mask_rcnn_.*_3x", 36, 16, 1e-4, 0.05, [(1000, 1e-3), [27, 33]], 15),
        ("retinanet_plainmamba", 12, 16, 1e-4, 0.05, [(1000, 1e-3), [8, 11]], 3),
        ("(mask_rcnn|retinanet)_efficientvim", 12, 16, 2e-4, 0.05, [(500, 1e-3), [8, 11]], 2),
        ("cascade_mask_rcnn_(vim|lbvim).*_100e", 184375, 64, 1e-4, 0.1, [(250, 1e-3), [163889, 177546]], 5),
        ("cascade_mask_rcnn_lbvim.*_300e", 553125, 64, 1e-4, 0.1, [(250, 1e-3), [491667, 532639]], 1),
        ("cascade_mask_rcnn_localvim", 184375, 64, 1e-4, 0.05, [(250, 1e-3), [163889, 177546]], 2),
    ],
)
def test_schedules(pattern, length, batch, lr, decay, steps, count):
    names = [name for name in LEAVES if re.match(pattern, name)]
    assert len(names) == count
    for name in names:
        cfg = config(name)
        assert length == cfg.train_cfg.get("max_iters", cfg.train_cfg.get("max_epochs")), name
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", lr, decay), name
        assert cfg.auto_scale_lr.base_batch_size == batch
        found = schedule(cfg)
        warm = 0
        if isinstance(steps[0], tuple):
            warm, factor = steps[0]
            assert found.pop(0) == ("LinearLR", 0, warm, factor), name
        kind = "PolyLR" if isinstance(steps[-1], float) else "MultiStepLR"
        assert found == [(kind, warm if kind == "PolyLR" else 0, length, steps[-1])], name
        assert cfg.param_scheduler[-1].by_epoch is cfg.train_cfg.by_epoch


def test_last_rates_of_polynomial_schedules():
    for name in LEAVES:
        last = config(name).param_scheduler[-1]
        if last.type == "PolyLR":
            assert last.eta_min == (1e-6 if "efficientvim" in name else 0.0), name


@pytest.mark.parametrize("name", ["upernet_vmamba_tiny_s1l8_4xb4_160k_ade20k_512", "mask_rcnn_vssd_tiny_fpn_8xb2_1x_coco"])
def test_norms_alone_are_not_decayed(name):
    cfg = config(name)
    settings = rates_and_decays(name)
    for key, (lr, decay) in settings.items():
        assert lr == cfg.optim_wrapper.optimizer.lr
        spared = "norm" in key or "pos_embed" in key
        assert decay == (0.0 if spared else cfg.optim_wrapper.optimizer.weight_decay), key
    assert any(key.endswith("A_log") and decay for key, (_, decay) in settings.items())


def test_positions_are_not_decayed():
    settings = rates_and_decays("upernet_localvim_tiny_8xb2_160k_ade20k_512")
    assert settings["backbone.pos_embed.table"][1] == 0.0


@pytest.mark.parametrize("name", ["upernet_plainmamba_l1_8xb2_160k_ade20k_512", "mask_rcnn_plainmamba_l1_fpn_8xb2_1x_coco"])
def test_plainmamba_spares_vectors_states_and_directions(name):
    settings = rates_and_decays(name)
    spared = ("bias", "norm", "pos_embed", "A_log", ".D", "direction_bias", "bn.weight", "bn.bias", "conv_norm.weight")
    for key, (_, decay) in settings.items():
        if key.startswith("backbone.") and (key.endswith(spared) or any(part in key for part in ("norm", "pos_embed"))):
            assert decay == 0.0, key
    assert settings["backbone.stages.0.mixer.in_proj.weight"][1] > 0


@pytest.mark.parametrize(
    ("name", "factor", "blocks"),
    [
        ("upernet_vim_small_4xb8_60k_ade20k_512", 0.92, 24),
        ("cascade_mask_rcnn_vim_tiny_simplefpn_8xb8_100e_coco", 0.837, 24),
        ("cascade_mask_rcnn_localvim_tiny_simplefpn_8xb8_100e_coco", 0.807, 20),
    ],
)
def test_rates_fall_from_layer_to_layer(name, factor, blocks):
    """In ViTDet 0.7 over 12 blocks; the factors of the detectors reach the same over their numbers of blocks."""
    assert factor == 0.92 or factor**blocks == pytest.approx(0.7**12, rel=0.02)
    base = config(name).optim_wrapper.optimizer.lr
    rates = {key: lr for key, (lr, _) in rates_and_decays(name).items()}
    assert rates["backbone.stem.conv.weight"] == pytest.approx(base * factor**blocks)
    for number in (0, 7, blocks - 1):
        key = f"backbone.stages.{number}.mixer.out_proj.weight"
        assert rates[key] == pytest.approx(base * factor ** (blocks - 1 - number))
    assert {lr for key, lr in rates.items() if not key.startswith("backbone.")} == {base}

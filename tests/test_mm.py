"""Backbones and necks under the heads of mmseg and mmdet: built, trained, frozen, checked, and everything misspelt."""

import copy
import re
from importlib import metadata

import golden_cases
import numpy as np
import pytest
import torch

from vision_ssm.integrations import mm  # before mmcv's operators are imported

pytest.importorskip("mmseg")
pytest.importorskip("mmdet")

import mmdet.models  # noqa: E402, F401
import mmseg.models  # noqa: E402, F401
from mmdet.registry import MODELS as DETECTION  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config, ConfigDict, DictAction  # noqa: E402
from mmengine.model import BaseModule  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData, PixelData  # noqa: E402
from mmseg.registry import MODELS as SEGMENTATION  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

import vision_ssm  # noqa: E402
from vision_ssm.engine import ParameterGroups  # noqa: E402
from vision_ssm.engine.config import check_option  # noqa: E402
from vision_ssm.integrations import packages  # noqa: E402
from vision_ssm.integrations.checks import HeadMismatchError, check_config, check_heads  # noqa: E402
from vision_ssm.integrations.necks import EfficientViMFPN, SimpleFPN  # noqa: E402
from vision_ssm.registry import BACKBONES, MODELS  # noqa: E402

FAMILIES = sorted(BACKBONES.module_dict)
MICRO = dict(type="vision_ssm.VMamba", variant="vmamba_micro")
WIDTHS = [16, 32, 64, 128]


def smallest(family):
    """Name of a family's variant for tests."""
    names = [name for name in family.variants if "micro" in name]
    return next((name for name in names if name.endswith("_micro")), names[0])


def upernet(backbone=MICRO, widths=WIDTHS, aux=2):
    return dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", mean=[0.0] * 3, std=[1.0] * 3, size=(64, 64)),
        backbone=dict(backbone),
        decode_head=dict(
            type="UPerHead",
            in_channels=list(widths),
            in_index=list(range(len(widths))),
            pool_scales=(1, 2),
            channels=16,
            dropout_ratio=0.0,
            num_classes=4,
            norm_cfg=dict(type="BN"),
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
        ),
        auxiliary_head=dict(
            type="FCNHead",
            in_channels=widths[aux],
            in_index=aux,
            channels=8,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.0,
            num_classes=4,
            norm_cfg=dict(type="BN"),
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


CODER = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4)
PREPROCESSOR = dict(type="DetDataPreprocessor", mean=[0.0] * 3, std=[1.0] * 3, pad_mask=True, pad_size_divisor=32)
NMS = dict(nms_pre=100, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)


def sampler(count):
    return dict(type="RandomSampler", num=count, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=count < 50)


def assigner(high, low, match):
    return dict(
        type="MaxIoUAssigner",
        pos_iou_thr=high,
        neg_iou_thr=low,
        min_pos_iou=low,
        match_low_quality=match,
        ignore_iof_thr=-1,
    )


def extractor(size):
    return dict(
        type="vision_ssm.SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=size, sampling_ratio=0),
        out_channels=16,
        featmap_strides=[4, 8, 16, 32],
    )


def box_head():
    return dict(
        type="Shared2FCBBoxHead",
        in_channels=16,
        fc_out_channels=32,
        roi_feat_size=7,
        num_classes=3,
        bbox_coder=CODER,
        reg_class_agnostic=False,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    )


def mask_rcnn(backbone=MICRO, neck=None, cascade=False):
    rcnn = dict(assigner=assigner(0.5, 0.5, True), sampler=sampler(32), mask_size=14, pos_weight=-1, debug=False)
    roi_head = dict(
        type="CascadeRoIHead" if cascade else "StandardRoIHead",
        bbox_roi_extractor=extractor(7),
        bbox_head=[box_head(), box_head()] if cascade else box_head(),
        mask_roi_extractor=extractor(7),
        mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3),
    )
    if cascade:
        roi_head.update(num_stages=2, stage_loss_weights=[1, 0.5])
    return dict(
        type="CascadeRCNN" if cascade else "MaskRCNN",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(backbone),
        neck=neck or dict(type="FPN", in_channels=WIDTHS, out_channels=16, num_outs=5),
        rpn_head=dict(
            type="RPNHead",
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=CODER,
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        roi_head=roi_head,
        train_cfg=dict(
            rpn=dict(assigner=assigner(0.7, 0.3, True), sampler=sampler(64), allowed_border=-1, pos_weight=-1),
            rpn_proposal=NMS,
            rcnn=[rcnn, rcnn] if cascade else rcnn,
        ),
        test_cfg=dict(
            rpn=NMS,
            rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20, mask_thr_binary=0.5),
        ),
    )


def retinanet(backbone=dict(MICRO, out_indices=(1, 2, 3)), neck=None, strides=(8, 16, 32, 64, 128)):  # noqa: B006
    return dict(
        type="RetinaNet",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(backbone),
        neck=neck
        or dict(type="FPN", in_channels=WIDTHS[1:], out_channels=16, add_extra_convs="on_input", num_outs=5),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=16,
            stacked_convs=1,
            feat_channels=16,
            anchor_generator=dict(
                type="AnchorGenerator",
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[0.5, 1.0, 2.0],
                strides=list(strides),
            ),
            bbox_coder=CODER,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=1.0),
        ),
        train_cfg=dict(assigner=assigner(0.5, 0.4, True), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(
            nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20
        ),
    )


EFFICIENT = dict(type="vision_ssm.EfficientViM", variant="efficientvim_micro", out_norm=False, norm_eval=True)
TRANSPOSED = dict(type="vision_ssm.EfficientViMFPN", in_channels=[32, 32, 48], out_channels=16)
PLAIN = dict(type="vision_ssm.Vim", variant="vim_micro", out_indices=(3,))
SIMPLE = dict(type="vision_ssm.SimpleFPN", in_channels=32, out_channels=16)
GOOD_MODELS = {
    "upernet": upernet(),
    "upernet on one stride": upernet(dict(PLAIN, out_indices=(0, 1, 2, 3)), [32] * 4),
    "upernet on a pyramid": upernet(dict(PLAIN, out_indices=(0, 1, 2, 3), pyramid=True), [32] * 4),
    "mask r-cnn": mask_rcnn(),
    "cascade r-cnn, simple pyramid": mask_rcnn(PLAIN, SIMPLE, cascade=True),
    "mask r-cnn, transposed pyramid": mask_rcnn(EFFICIENT, dict(TRANSPOSED, finer=2, coarser=0)),
    "retinanet": retinanet(),
    "retinanet, transposed pyramid": retinanet(EFFICIENT, TRANSPOSED),
}


def changed(model, place, value):
    """A copy of a model's config with one entry replaced, such as ``backbone.variant``."""
    cfg = Config(dict(model=copy.deepcopy(model)))
    cfg.merge_from_dict({f"model.{place}": value})
    return cfg._cfg_dict.to_dict()["model"]


def build(model):
    """A model of mmseg or mmdet with its initial weights, which follow from seed 0."""
    registry = SEGMENTATION if model["type"] == "EncoderDecoder" else DETECTION
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(registry.scope):
        built = registry.build(ConfigDict(copy.deepcopy(model)))
    built.init_weights()
    return built


def segmentation_batch():
    """Two images of four squares each, a colour and a class per square."""
    images = 0.1 * golden_cases.images({"name": "segmentation", "shape": [2, 3, 64, 64]})
    samples = []
    for i in range(2):
        labels = torch.from_numpy(np.kron(np.array([[0, 1], [2, 3]]) if i else np.array([[3, 2], [1, 0]]), np.ones((32, 32))))
        images[i] += torch.nn.functional.one_hot(labels.long(), 4)[..., 1:].permute(2, 0, 1)
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=labels.long()[None])
        samples.append(sample)
    return dict(inputs=list(images), data_samples=samples)


def detection_batch():
    """Two images with two bright boxes each, classes by colour."""
    images = 0.1 * golden_cases.images({"name": "detection", "shape": [2, 3, 64, 96]})
    samples = []
    for i, boxes in enumerate(([[4, 4, 30, 28], [40, 20, 90, 60]], [[10, 8, 50, 40], [60, 30, 76, 50]])):
        masks = np.zeros((2, 64, 96), dtype=np.uint8)
        for label, (left, top, right, bottom) in enumerate(boxes):
            images[i, label, top:bottom, left:right] += 1
            masks[label, top:bottom, left:right] = 1
        shape = dict(img_shape=(64, 96), ori_shape=(64, 96), pad_shape=(64, 96), batch_input_shape=(64, 96))
        sample = DetDataSample(metainfo=dict(shape, scale_factor=(1.0, 1.0), img_id=i))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor([0, 1]), masks=BitmapMasks(masks, 64, 96)
        )
        samples.append(sample)
    return dict(inputs=list(images), data_samples=samples)


def losses_of(model, batch, steps, precision="fp32"):
    """Total loss of each of some training steps with AdamW."""
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    constructor = ParameterGroups(dict(optimizer=optimizer, precision=precision))
    wrapper = constructor(model)
    model.train()
    return [model.train_step(copy.deepcopy(batch), wrapper)["loss"].item() for _ in range(steps)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_backbone_of_both(name):
    family, variant = BACKBONES.module_dict[name], smallest(BACKBONES.module_dict[name])
    registry = (SEGMENTATION, DETECTION)[FAMILIES.index(name) % 2]
    model = registry.build(dict(type=f"vision_ssm.{name}", variant=variant)).eval()
    assert isinstance(model, family) and isinstance(model, BaseModule) and type(model) is MODELS.get(name)
    maps = model(torch.randn(1, 3, 64, 64))
    assert isinstance(maps, tuple)
    assert [(m.shape[1], 64 // m.shape[2], 64 // m.shape[3]) for m in maps] == [
        (info["num_chs"], info["reduction"], info["reduction"]) for info in model.out_info
    ]
    own = vision_ssm.create_model(variant, features_only=True)
    assert list(model.state_dict()) == list(own.state_dict())
    own.load_state_dict(model.state_dict())
    for ours, theirs in zip(own.eval()(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_backbone_is_initialised_once_and_as_everywhere():
    torch.manual_seed(0)
    own = vision_ssm.create_model("vmamba_micro", features_only=True, drop_path_rate=0.3)
    torch.manual_seed(0)
    model = mm.VMamba("vmamba_micro", drop_path_rate=0.3)
    assert model.pretrained_cfg == own.pretrained_cfg and not model.is_init
    model.init_weights()
    assert model.is_init and model.init_cfg is None
    for (name, ours), theirs in zip(own.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_keywords_reach_the_family():
    model = mm.VMamba("vmamba_micro", out_indices=(1, 3), in_chans=4, scan=dict(expand=2.0), out_norm=False)
    assert model.out_indices == [1, 3] and not model.out_norms and model.stem.conv1.in_channels == 4
    assert [m.shape[1] for m in model(torch.rand(1, 4, 32, 32))] == [32, 128]
    other = mm.VMamba("vmamba_micro", scan="bidirectional")
    assert type(other.stages[0].blocks[0].mixer).__name__ == "BidirectionalScan"
    assert mm.VMamba("vmamba_micro", out_indices=[-1]).out_indices == [3]


@pytest.mark.parametrize("variant,front", [("vmamba_micro", {"stem"}), ("vim_micro", {"stem", "pos_embed", "cls_token"})])
@pytest.mark.parametrize("frozen", [-1, 0, 2])
def test_frozen_stages(frozen, variant, front):
    cls = {"vmamba_micro": mm.VMamba, "vim_micro": mm.Vim}[variant]
    model = cls(variant, frozen_stages=frozen, drop_path_rate=0.5)
    quiet = front | {f"stages.{i}" for i in range(frozen)} if frozen >= 0 else set()

    def is_quiet(name):
        return any(name == part or name.startswith(f"{part}.") for part in quiet)

    for _ in range(2):
        model.train()
        for name, module in model.named_modules():
            assert module.training != (is_quiet(name) if name else False), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_quiet(name), name
    sum(m.sum() for m in model(torch.rand(2, 3, 32, 32))).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        name for name, _ in model.named_parameters() if is_quiet(name)
    }
    assert not any(module.training for module in model.eval().modules())


def test_norm_eval_keeps_statistics_and_trains_weights():
    for frozen in (False, True):
        model = mm.EfficientViM("efficientvim_micro", norm_eval=frozen).train()
        before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
        sum((m * m).sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
        same = all(torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before)
        assert before and same == frozen
        assert model.stages[0].blocks[0].conv1.norm.weight.grad.any()
        assert model.stages[0].training


@pytest.mark.parametrize("cls,variant", [(mm.VMamba, "vmamba_micro"), (mm.PlainMamba, "plainmamba_micro")])
def test_with_cp_computes_blocks_twice_and_the_same(cls, variant):
    model = cls(variant)
    saving = cls(variant, with_cp=True)
    saving.load_state_dict(model.state_dict())
    image, calls = torch.rand(2, 3, 32, 48), []
    for net in (model.train(), saving.train()):
        blocks = [module for name, module in net.named_modules() if name.endswith(("stages.0", "blocks.0"))]
        blocks[-1].register_forward_pre_hook(lambda block, *_: calls.append(block))
        sum((m**2).sum() for m in net(image)).backward()
    assert len(set(calls)) == 2 and [calls.count(block) for block in dict.fromkeys(calls)] == [1, 2]
    for ours, theirs in zip(model(image), saving(image), strict=True):
        torch.testing.assert_close(ours, theirs)
    for (name, a), b in zip(model.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.fixture
def classifier(tmp_path):
    """A trained classifier of ours and its file."""
    model = vision_ssm.create_model("vmamba_micro", num_classes=10)
    file = tmp_path / "classifier.pth"
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in model.state_dict().items()}}, file)
    return model, file


def test_pretrained_weights_come_with_a_report(classifier, caplog, monkeypatch):
    model, file = classifier
    lines = []
    monkeypatch.setattr(mm, "print_log", lambda message, *_: lines.append(message))
    built = build(upernet(dict(MICRO, init_cfg=dict(type="Pretrained", checkpoint=str(file)))))
    own = dict(model.named_parameters())
    for name, parameter in built.backbone.named_parameters():
        assert name.startswith("out_norms") or torch.equal(parameter, own[name]), name
    assert built.backbone.is_init and f"{file}: {len(own) - 4} tensors loaded" in lines[0]
    assert "ignored, output norms that a classifier's weights do not have: out_norms.0.weight" in lines[0]
    with torch.no_grad():
        built.backbone.stem.conv1.weight.zero_()
    built.backbone.init_weights()
    assert not built.backbone.stem.conv1.weight.any() and "called more than once" in lines[1]


def test_official_weights_in_a_detector(tmp_path):
    case = golden_cases.load("vim/vim_seg_micro_96")
    weights = golden_cases.weights(case)
    state = {f"backbone.{key}": value for key, value in weights.items()} | {"decode_head.conv_seg.bias": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "upernet_vim.pth")
    config = vision_ssm.backbones.vim.Vim.from_official_config(dict(case["config"]), set(weights))
    for key in ("features_only", "num_classes"):
        config.pop(key)
    model = mm.Vim("vim_micro", **config, init_cfg=dict(type="Pretrained", checkpoint=tmp_path / "upernet_vim.pth"))
    model.init_weights()
    with torch.inference_mode():
        maps = model.eval()(golden_cases.images(case["input"]))
    for expected, feature in zip(case["outputs"]["features"], maps, strict=True):
        assert golden_cases.sample_error(expected, feature) < case["tolerance"]


def test_missing_weights_say_where_they_are():
    model = mm.VMamba("vmamba_tiny_s1l8", depths=(1, 1, 1, 1), init_cfg=dict(type="Pretrained", checkpoint="no/file.pth"))
    message = (
        "no pretrained weights for vmamba_tiny_s1l8: no/file.pth does not exist. Let it be downloaded, --cfg-options "
        "model.backbone.init_cfg.checkpoint=True, or download https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny"
        "_0230s_ckpt_epoch_264.pth and name the file in model.backbone.init_cfg.checkpoint, or start from scratch:"
        " --cfg-options model.backbone.init_cfg=None"
    )
    with pytest.raises(FileNotFoundError) as caught:
        model.init_weights()
    assert str(caught.value) == message
    with pytest.raises(FileNotFoundError, match="vmamba_micro: https://x.org/y.pth is a link, not a file. No official"):
        mm.check_weights("vmamba_micro", dict(type="Pretrained", checkpoint="https://x.org/y.pth"))


def test_the_way_to_start_from_scratch():
    cfg = Config(dict(model=upernet(dict(MICRO, init_cfg=dict(type="Pretrained", checkpoint="no/file.pth")))))
    key, value = mm.FROM_SCRATCH.removeprefix("--cfg-options ").split("=")
    check_option(cfg, key)
    cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
    built = build(cfg.model.to_dict())
    assert built.backbone.init_cfg is None


def test_weights_of_another_family(tmp_path):
    torch.save(vision_ssm.create_model("vim_micro").state_dict(), tmp_path / "vim.pth")
    model = mm.VMamba("vmamba_micro", init_cfg=dict(type="Pretrained", checkpoint=tmp_path / "vim.pth"))
    with pytest.raises(vision_ssm.CheckpointError, match="this is no vmamba checkpoint: it looks like a vim checkpoint"):
        model.init_weights()


def test_checkpoints_of_a_run_load_anywhere(tmp_path):
    built = build(upernet())
    names = [key for key in built.state_dict() if key.startswith("backbone.")]
    own = vision_ssm.create_model("vmamba_micro", features_only=True)
    assert names == [f"backbone.{key}" for key in own.state_dict()]
    torch.save({"state_dict": built.state_dict()}, tmp_path / "run.pth")
    report = vision_ssm.load_weights(own, tmp_path / "run.pth", verbose=False)
    assert report.complete and len(report.loaded) == len(names)
    assert set(report.ignored) == {f"part of another model, {part}_head" for part in ("decode", "auxiliary")}


def test_layer_decay_follows_the_backbone():
    built = build(upernet(dict(MICRO, frozen_stages=0)))
    options = dict(optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.05))
    wrapper = ParameterGroups(options, dict(layer_decay=0.5))(built)
    rates = {id(p): group["lr"] for group in wrapper.optimizer.param_groups for p in group["params"]}
    trainable = [p for p in built.parameters() if p.requires_grad]
    assert set(rates) == {id(p) for p in trainable}
    assert {rates[id(p)] for p in built.decode_head.parameters()} == {1.0}
    blocks = [block for stage in built.backbone.stages for block in stage.blocks]
    found = [{rates[id(p)] for p in block.parameters()} for block in blocks]
    assert all(len(rate) == 1 for rate in found)
    found = [rate.pop() for rate in found]
    assert found == sorted(found) and len(set(found)) == len(blocks) and found[0] < 0.1
    assert {rates[id(p)] for p in built.backbone.out_norms.parameters()} == {1.0}


@pytest.mark.parametrize("name", GOOD_MODELS)
def test_models_pass_the_check_and_train(name):
    model = GOOD_MODELS[name]
    check_config(dict(model=model))
    built = build(model).train()
    batch = segmentation_batch() if name.startswith("upernet") else detection_batch()
    losses = built(**built.data_preprocessor(copy.deepcopy(batch), training=True), mode="loss")
    built.parse_losses(losses)[0].backward()
    assert all(torch.isfinite(value).all() for value in built.parse_losses(losses)[1].values())
    missing = {key for key, parameter in built.named_parameters() if parameter.grad is None}
    assert not missing, missing
    data = built.eval().data_preprocessor(copy.deepcopy(batch))
    with torch.no_grad():
        results = built.predict(data["inputs"], data["data_samples"])
    if name.startswith("upernet"):
        assert results[0].pred_sem_seg.data.shape == (1, 64, 64)
    else:
        assert results[0].pred_instances.bboxes.shape[1] == 4


# seed 0, two steps; recorded with torch 2.15 on a CPU
GOLDEN = {"upernet": [1.93742, 1.91894], "mask r-cnn": [3.69108, 4.17797]}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name):
    built = build(GOOD_MODELS[name])
    batch = segmentation_batch() if name == "upernet" else detection_batch()
    torch.manual_seed(0)
    np.random.seed(0)
    losses = losses_of(built, batch, 2)
    assert losses == pytest.approx(GOLDEN[name], abs=1e-3), losses


@pytest.mark.parametrize("name", GOLDEN)
def test_bfloat16(name):
    built = build(GOOD_MODELS[name])
    batch = segmentation_batch() if name == "upernet" else detection_batch()
    assert losses_of(built, batch, 2, "bf16") == pytest.approx(GOLDEN[name], rel=0.1)


def test_regions_keep_their_precision():
    """In bfloat16 a corner at 1001 would be read at 1000."""
    ours = build(mask_rcnn()).roi_head.bbox_roi_extractor
    settings = {key: value for key, value in extractor(7).items() if key != "type"}
    theirs = DETECTION.build(dict(settings, type="mmdet.SingleRoIExtractor"))
    ramp = (torch.arange(512) // 2 * 2.0).expand(1, 16, 4, 512)  # numbers that bfloat16 has
    rois = torch.tensor([[0, 1001.0, 0, 1017.0, 16.0]])
    exact = theirs((ramp,) * 4, rois)
    pooled = ours((ramp.bfloat16(),) * 4, rois)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, exact)
    assert (theirs((ramp.bfloat16(),) * 4, rois).float() - exact).abs().max() > 0.2


BAD_BACKBONES = [
    (dict(variant="vmamba_mikro"), KeyError, "unknown variant 'vmamba_mikro' of vision_ssm.VMamba. Did you mean 'vmamba_micro'"),
    (dict(variant="vim_tiny"), KeyError, "'vim_tiny' is a variant of Vim, not of VMamba: type='vision_ssm.Vim'"),
    (dict(variant=None), TypeError, "vision_ssm.VMamba needs the name of a variant, variant=..., got None. Known: .*vmamba_micro"),
    (dict(drop_path=0.1), TypeError, r"vision_ssm.VMamba \(vmamba_micro\) has no keyword 'drop_path'. Did you mean 'drop_path_rate'"),
    (dict(frozen_stage=1), TypeError, "has no keyword 'frozen_stage'. Did you mean 'frozen_stages'"),
    (dict(num_classes=5), TypeError, "is a dense backbone without a classifier and takes no num_classes"),
    (dict(features_only=False), TypeError, "takes no features_only"),
    (dict(out_indices=(0, 4)), ValueError, r"out_indices must be different stages in 0..3, got \(0, 4\)"),
    (dict(out_indices=3), TypeError, "out_indices .* a sequence of"),
    (dict(frozen_stages=5), ValueError, r"frozen_stages is -1 \(nothing\), 0 \(the stem\) or up to 4"),
    (dict(frozen_stages=-2), ValueError, "got -2"),
    (dict(init_cfg="file.pth"), TypeError, r"one dict\(type='Pretrained', checkpoint=FILE\), got 'file.pth'"),
    (dict(init_cfg=dict(type="TruncNormal", std=0.02)), ValueError, "got type 'TruncNormal': apart from that, every family"),
    (dict(init_cfg=dict(type="Pretrained")), TypeError, "init_cfg.checkpoint is the path of a file, True for the published weights or the tag of one of several, got None"),
    (dict(init_cfg=dict(type="Pretrained", checkpoint=False)), TypeError, "the tag of one of several, got False; init_cfg=None starts"),
    (dict(init_cfg=dict(type="Pretrained", checkpoint="a", prefix="b")), TypeError, "init_cfg has no key 'prefix'"),
]  # fmt: skip


@pytest.mark.parametrize("change,error,message", BAD_BACKBONES, ids=[str(change) for change, _, _ in BAD_BACKBONES])
def test_bad_backbones(change, error, message):
    backbone = {**MICRO, **change}
    with pytest.raises(error, match=message):
        SEGMENTATION.build(backbone)
    with pytest.raises(error, match=message):
        check_config(dict(model=upernet(backbone)), training=True)


BAD_NAMES = [
    (dict(model=upernet(dict(type="vision_ssm.VMambba", variant="vmamba_micro"))), "model.backbone.type='vision_ssm.VMambba': vision_ssm has no 'VMambba'. Did you mean 'VMamba'"),
    (dict(model=upernet(dict(type="VMamba", variant="vmamba_micro"))), "backbones of this library are named type='vision_ssm.VMamba'"),
    (dict(model=mask_rcnn(PLAIN, dict(SIMPLE, type="vision_ssm.SimpleFPM"))), "model.neck.type='vision_ssm.SimpleFPM': .* Did you mean 'SimpleFPN'"),
    (dict(custom_hooks=[dict(type="vision_ssm.ProgresHook")]), "custom_hooks.0.type='vision_ssm.ProgresHook': .* Did you mean 'ProgressHook'"),
    (dict(train_dataloader=dict(sampler=dict(type="vision_ssm.EpochSampeler"))), "train_dataloader.sampler.type=.* Did you mean 'EpochSampler'"),
]  # fmt: skip


@pytest.mark.parametrize("config,message", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_misspelt_names(config, message):
    with pytest.raises(KeyError, match=message):
        check_config(config)


MAPS = "vmamba_micro gives 4 maps of \\[16, 32, 64, 128\\] channels \\(strides 4, 8, 16, 32\\)"
BAD_HEADS = [
    (changed(upernet(), "decode_head.in_channels", [96, 192, 384, 768]), rf"model.decode_head.in_channels=\[96, 192, 384, 768\], but {MAPS}: set model.decode_head.in_channels=\[16, 32, 64, 128\]"),
    (changed(upernet(), "auxiliary_head.in_channels", 384), rf"model.auxiliary_head.in_channels=384, but {MAPS}: set model.auxiliary_head.in_channels=64"),
    (changed(upernet(), "auxiliary_head.in_index", 4), rf"model.auxiliary_head.in_index=4, but {MAPS}: there are numbers 0 to 3"),
    (changed(upernet(), "backbone.out_indices", (1, 2)), r"model.decode_head.in_index=\[0, 1, 2, 3\], but vmamba_micro gives 2 maps of \[32, 64\] channels"),
    (changed(upernet(), "auxiliary_head.in_channels", [16, 32]), "in_index=2 names one map, in_channels=.16, 32. several"),
    (dict(upernet(), auxiliary_head=[upernet()["auxiliary_head"], dict(in_channels=3, in_index=0)]), "model.auxiliary_head.1.in_channels=3, but .*: set model.auxiliary_head.1.in_channels=16"),
    (dict(upernet(), neck=dict(type="Feature2Pyramid", embed_dim=768)), f"model.neck.embed_dim=768, but {MAPS}: it takes the channels of 4 maps"),
    (dict(upernet(), neck=dict(type="MultiLevelNeck", in_channels=WIDTHS, out_channels=24)), r"decode_head.in_channels=.*but model.neck gives 4 maps of \[24, 24, 24, 24\] channels: set"),
    (changed(mask_rcnn(), "neck.in_channels", [96, 192, 384, 768]), rf"model.neck.in_channels=\[96, 192, 384, 768\], but {MAPS}: set model.neck.in_channels=\[16, 32, 64, 128\]"),
    (changed(mask_rcnn(), "neck.out_channels", 24), "(?s)model.rpn_head.in_channels=16, but model.neck gives 5 maps .*in_channels=24.*model.roi_head.bbox_roi_extractor.out_channels=16.*bbox_head.in_channels=24.*mask_head.in_channels=24"),
    (changed(mask_rcnn(), "neck.num_outs", 4), r"model.rpn_head.anchor_generator.strides=\[4, 8, 16, 32, 64\], but .* set .*strides=\[4, 8, 16, 32\]"),
    (changed(mask_rcnn(PLAIN, SIMPLE), "neck.in_channels", 192), r"model.neck.in_channels=192, but vim_micro gives 1 map of \[32\] channels \(stride 16\): set model.neck.in_channels=32"),
    (changed(mask_rcnn(PLAIN, SIMPLE), "backbone.out_indices", (0, 3)), r"model.neck takes one map, but vim_micro gives 2 maps of \[32, 32\] channels \(strides 16, 16\): set model.backbone.out_indices"),
    (mask_rcnn(dict(PLAIN, out_indices=(0, 1, 2, 3)), dict(type="FPN", in_channels=[32] * 4, out_channels=16, num_outs=5)), "(?s)anchor_generator.strides.*for maps of several strides a plain backbone takes pyramid=True, or out_indices of its last block alone and neck=dict.type='vision_ssm.SimpleFPN', in_channels=32"),
    (changed(mask_rcnn(PLAIN, SIMPLE, cascade=True), "roi_head.bbox_head", [dict(in_channels=16), dict(in_channels=7)]), "model.roi_head.bbox_head.1.in_channels=7, but .*=16"),
    (retinanet(strides=(4, 8, 16, 32, 64)), r"model.bbox_head.anchor_generator.strides=\[4, 8, 16, 32, 64\].*=\[8, 16, 32, 64, 128\]"),
    (retinanet(EFFICIENT, dict(TRANSPOSED, finer=2, coarser=0)), r"strides=\[8, 16, 32, 64, 128\], but .* \(strides 4, 8, 16, 32, 64\): set"),
]  # fmt: skip


@pytest.mark.parametrize("model,message", BAD_HEADS, ids=range(len(BAD_HEADS)))
def test_heads_that_do_not_fit(model, message):
    with pytest.raises(HeadMismatchError, match=message):
        check_config(dict(model=model))


def test_other_peoples_models_are_left_alone():
    check_heads(changed(upernet(), "backbone", dict(_delete_=True, type="ResNet", depth=50)))
    check_heads(dict(type="vision_ssm.ImageClassifier", backbone=dict(name="vmamba_micro")))
    check_config(dict(work_dir="x"))
    check_heads(dict(upernet(), neck=dict(type="OnlyTheyKnow"), decode_head=dict(in_channels=5)))


def test_a_pyramid_that_leaves_out_the_finest_map():
    neck = dict(type="FPN", in_channels=WIDTHS, out_channels=16, start_level=1, num_outs=5)
    check_heads(retinanet(MICRO, neck))
    with pytest.raises(HeadMismatchError, match=r"set model.bbox_head.anchor_generator.strides=\[4, 8, 16, 32, 64\]"):
        check_heads(retinanet(MICRO, dict(neck, start_level=0)))


@pytest.mark.parametrize(
    "part,right,wrong",
    [
        (dict(decode_head=dict(type="Mask2FormerHead", in_channels=WIDTHS)), WIDTHS, WIDTHS[::-1]),  # takes all maps
        (dict(neck=dict(type="YOLOV3Neck", in_channels=WIDTHS[::-1])), WIDTHS[::-1], WIDTHS),  # coarsest first
        (dict(neck=dict(type="CTResNetNeck", in_channels=WIDTHS[-1])), WIDTHS[-1], WIDTHS[0]),  # takes the last map
    ],
    ids=["Mask2FormerHead", "YOLOV3Neck", "CTResNetNeck"],
)
def test_which_maps_other_peoples_heads_and_necks_take(part, right, wrong):
    (place, settings), *_ = part.items()
    check_heads(dict(backbone=MICRO, **part))
    with pytest.raises(HeadMismatchError, match=re.escape(f"set model.{place}.in_channels={right!r}")):
        check_heads(dict(backbone=MICRO, **{place: dict(settings, in_channels=wrong)}))


def test_pretrained_weights_are_looked_for_before_a_training():
    model = upernet(dict(MICRO, init_cfg=dict(type="Pretrained", checkpoint="no/file.pth")))
    check_config(dict(model=model))
    with pytest.raises(FileNotFoundError, match="no pretrained weights for vmamba_micro: no/file.pth does not exist"):
        check_config(dict(model=model), training=True)


def test_packages_that_overwrite_each_other(monkeypatch):
    real = metadata.version
    versions = {"mmcv-lite": "2.1.0"}
    monkeypatch.setattr(packages.metadata, "version", lambda name: versions.get(name) or real(name))
    if "onedl-mmcv" in {d.metadata["Name"] for d in metadata.distributions()}:
        with pytest.raises(packages.PackageConflictError) as caught:
            packages.check_packages()
        assert str(caught.value) == (
            f"onedl-mmcv {real('onedl-mmcv')} and mmcv-lite 2.1.0 are both installed and own the same folder, mmcv: files"
            " of one have overwritten those of the other. Remove all and install one again: pip uninstall -y onedl-mmcv"
            f" mmcv-lite && pip install --no-deps onedl-mmcv=={real('onedl-mmcv')}"
        )
    versions = {}
    packages.check_packages()


@pytest.mark.parametrize("ours,theirs", [("onedl-mmengine", "mmengine"), ("onedl-mmsegmentation", "mmsegmentation"), ("onedl-mmdetection", "mmdet")])
def test_every_pair_of_packages(ours, theirs, monkeypatch):
    def version(name):
        if name in (ours, theirs):
            return "1.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "version", version)
    with pytest.raises(packages.PackageConflictError, match=f"{ours} 1.0 and {theirs} 1.0 are both installed"):
        packages.check_packages()


@pytest.mark.parametrize("height,width", [(4, 6), (5, 3)])
def test_simple_pyramid(height, width):
    neck = SimpleFPN(24, 16)
    maps = neck((torch.rand(2, 24, height, width),))
    sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
    for _ in range(2):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    assert [tuple(m.shape) for m in maps] == [(2, 16, *size) for size in sizes]
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in neck.parameters())
    torch.testing.assert_close(maps[4], maps[3][:, :, ::2, ::2])
    # every map ends in a norm over its channels
    torch.testing.assert_close(maps[0].mean(1), torch.zeros(2, *sizes[0]), atol=1e-5, rtol=0)


def test_simple_pyramid_has_the_layers_of_vitdet():
    shapes = {key: list(value.shape) for key, value in SimpleFPN(768).state_dict().items() if value.ndim == 4}
    assert list(shapes.values()) == [
        *([768, 384, 2, 2], [384, 192, 2, 2], [256, 192, 1, 1], [256, 256, 3, 3]),
        *([768, 384, 2, 2], [256, 384, 1, 1], [256, 256, 3, 3]),
        *([256, 768, 1, 1], [256, 256, 3, 3]) * 2,
    ]


@pytest.mark.parametrize("finer,coarser,count", [(1, 1, 5), (2, 0, 5), (0, 0, 3), (1, 2, 6)])
@pytest.mark.parametrize("sides", [[(8, 12), (4, 6), (2, 3)], [(5, 7), (3, 4), (2, 2)]])
def test_transposed_pyramid(sides, finer, coarser, count):
    neck = EfficientViMFPN([8, 12, 20], 16, finer, coarser)
    maps = neck([torch.rand(2, dim, *side) for dim, side in zip((8, 12, 20), sides)])
    expected = [tuple(side * 2**i for side in sides[0]) for i in range(finer, 0, -1)] + sides
    for _ in range(coarser):
        expected.append(tuple(-(-side // 2) for side in expected[-1]))
    assert [tuple(m.shape) for m in maps] == [(2, 16, *size) for size in expected] and len(maps) == count
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in neck.parameters())


def test_what_the_levels_of_a_transposed_pyramid_come_from():
    neck = EfficientViMFPN([8, 12, 20], 16, finer=2, coarser=1)
    inputs = [torch.rand(1, dim, side, side, requires_grad=True) for dim, side in ((8, 8), (12, 4), (20, 2))]
    for level, sources in enumerate([{0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {1, 2}, {2}, {2}]):
        weights = torch.randn(16, 1, 1)
        grads = torch.autograd.grad((neck(inputs)[level] * weights).sum(), inputs, allow_unused=True)
        assert {i for i, grad in enumerate(grads) if grad is not None and grad.any()} == sources, level
    # inputs are normed over their channels first: a shift or a positive factor of all of them changes nothing
    shifted = neck([3 * x + 5 for x in inputs])
    for ours, theirs in zip(neck(inputs), shifted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


BAD_NECKS = [
    (lambda: SimpleFPN([32, 32]), TypeError, r"SimpleFPN takes the channels of one map, in_channels=N, got \[32, 32\]"),
    (lambda: SimpleFPN(32, num_outs=3), ValueError, "SimpleFPN makes 4 maps or more, got num_outs=3"),
    (lambda: EfficientViMFPN(32), TypeError, "takes the channels of each map"),
    (lambda: EfficientViMFPN([32], finer=-1), ValueError, "got -1 and 1"),
    (lambda: SimpleFPN(32)([torch.rand(1, 16, 4, 4)]), ValueError, r"built for 1 map\(s\) of \[32\] channels and got 1 of \[16\]"),
    (lambda: EfficientViMFPN([8, 8])([torch.rand(1, 8, 4, 4)]), ValueError, "set out_indices of the backbone and in_channels"),
]  # fmt: skip


@pytest.mark.parametrize("make,error,message", BAD_NECKS, ids=range(len(BAD_NECKS)))
def test_bad_necks(make, error, message):
    with pytest.raises(error, match=message):
        make()

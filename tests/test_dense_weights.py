"""Checkpoints of segmentation and detection models: the backbone's part is loaded, heads are named and left."""

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.factory import families
from vision_ssm.weights import load_state_dict, split_parts, unwrap

HEADS = {
    "upernet": {
        "decode_head.psp_modules.0.1.conv.weight": (8, 32, 1, 1),
        "decode_head.conv_seg.bias": (150,),
        "decode_head.blocks.0.alpha": (4, 8),  # named like a part of a backbone
        "auxiliary_head.convs.0.conv.weight": (8, 16, 3, 3),
        "data_preprocessor.mean": (3, 1, 1),
    },
    "mask_rcnn": {
        "neck.lateral_convs.0.conv.weight": (8, 16, 1, 1),
        "neck.norm.weight": (8,),
        "rpn_head.rpn_conv.weight": (8, 8, 3, 3),
        "roi_head.bbox_head.fc_cls.bias": (81,),
        "roi_head.mask_head.convs.0.conv.weight": (8, 8, 3, 3),
    },
    "retinanet": {"neck.fpn_convs.0.conv.weight": (8, 8, 3, 3), "bbox_head.retina_cls.weight": (9, 8, 3, 3)},
}


def dense_file(tmp_path, weights, heads, wrap=""):
    """A checkpoint as mmseg and mmdet write it."""
    state = {f"{wrap}backbone.{key}": value for key, value in weights.items()}
    state |= {f"{wrap}{key}": golden_cases.tensor_for(key, shape) for key, shape in HEADS[heads].items()}
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / f"{heads}.pth")
    return tmp_path / f"{heads}.pth"


CASES = [
    ("localmamba/localvmamba_micro_backbone_68x104", "upernet"),
    ("localmamba/localvmamba_micro_backbone_68x104", "mask_rcnn"),
    ("lbvim/lbvim_micro_dense_160x256", "upernet"),
    ("vim/vim_seg_micro_96", "upernet"),
    ("plainmamba/plainmamba_l1_seg_128x192", "retinanet"),
    ("msvmamba/msvmamba_micro_dense_100x140", "mask_rcnn"),
    ("efficientvmamba/efficientvmamba_tiny_dense_100x140", "retinanet"),
    ("efficientvim/efficientvim_m4_backbone_135x201", "retinanet"),
]


@pytest.mark.parametrize("name,heads", CASES, ids=[f"{name.split('/')[1]}-{heads}" for name, heads in CASES])
def test_the_backbone_of_a_dense_checkpoint(name, heads, tmp_path):
    case = golden_cases.load(name)
    weights = golden_cases.weights(case)
    known = families()[name.split("/")[0]]
    cls = next((cls for cls in known if cls.recognises(set(weights))), known[0])
    model = cls(**cls.from_official_config(dict(case["config"]), set(weights))).eval()
    report = vision_ssm.load_weights(model, dense_file(tmp_path, weights, heads), verbose=False)
    assert report.complete
    for part in {key.split(".")[0] for key in HEADS[heads]}:
        left = [key for key in HEADS[heads] if key.startswith(part)]
        assert report.ignored.pop(f"part of another model, {part}") == left
    assert not report.ignored
    with torch.inference_mode():
        maps = model.forward_intermediates(golden_cases.images(case["input"]))
    for expected, feature in zip(case["outputs"]["features"], maps, strict=True):
        assert golden_cases.sample_error(expected, feature) < case["tolerance"]


@pytest.fixture(scope="module")
def trained():
    """A backbone of ours with output norms that are not the initial ones."""
    model = vision_ssm.create_model("vmamba_micro", features_only=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(0, 0.1, parameter.numel()).view_as(parameter))
    return model.eval()


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("heads", HEADS)
def test_our_own_names_and_wrappers(wrap, heads, trained, tmp_path):
    other = vision_ssm.create_model("vmamba_micro", features_only=True)
    file = dense_file(tmp_path, trained.state_dict(), heads, wrap)
    report = vision_ssm.load_weights(other, file, verbose=False)
    assert report.complete and len(report.loaded) == len(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), other.state_dict().values()))


def test_heads_may_outnumber_the_backbone(trained, tmp_path):
    state = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    state |= {f"decode_head.convs.{i}.weight": torch.zeros(1) for i in range(3 * len(state))}
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    other = vision_ssm.create_model("vmamba_micro", features_only=True)
    report = vision_ssm.load_weights(other, tmp_path / "file.pth", verbose=False)
    assert report.complete and len(report.loaded) == len(trained.state_dict())
    assert "part of another model, decode_head: decode_head.convs.0.weight" in str(report)


def test_a_report_names_parts_once(trained, tmp_path, capsys):
    other = vision_ssm.create_model("vmamba_micro", features_only=True)
    vision_ssm.load_weights(other, dense_file(tmp_path, trained.state_dict(), "upernet"))
    printed = capsys.readouterr().out
    assert "ignored, part of another model, auxiliary_head: auxiliary_head.convs.0.conv.weight" in printed
    assert printed.count("decode_head.conv_seg.bias") == 1


def test_norms_of_maps_that_are_not_asked_for(trained, tmp_path):
    other = vision_ssm.create_model("vmamba_micro", features_only=True, out_indices=(1, 2))
    report = vision_ssm.load_weights(other, dense_file(tmp_path, trained.state_dict(), "upernet"), verbose=False)
    assert report.complete
    assert report.ignored["output norms of maps that are not asked for"] == ["out_norms.0.weight", "out_norms.0.bias"] + [
        "out_norms.3.weight",
        "out_norms.3.bias",
    ]
    assert torch.equal(other.out_norms["2"].weight, trained.out_norms["2"].weight)


def test_unknown_parts_and_lost_parts_are_reported(trained):
    state = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    state["decode_head.conv_seg.bias"] = state["teacher.weight"] = torch.zeros(1)
    del state["backbone.stages.1.blocks.0.norm1.weight"]
    model = vision_ssm.create_model("vmamba_micro", features_only=True)
    report = load_state_dict(model, state, strict=False)
    assert not report.complete
    assert report.ignored["part of another model, teacher"] == ["teacher.weight"]
    assert not report.unexpected and report.missing == ["stages.1.blocks.0.norm1.weight"]


def test_another_variants_dense_weights_are_named(tmp_path):
    with torch.device("meta"):
        state = vision_ssm.create_model("vmamba_small_s1l20", features_only=True).state_dict()
        model = vision_ssm.create_model("vmamba_tiny_s1l8", features_only=True)
    state = {f"backbone.{key}": value for key, value in state.items()}
    state["neck.conv.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="the file fits vmamba_small_s1l20, not vmamba_tiny_s1l8"):
        load_state_dict(model, state)


def test_a_classifier_is_not_taken_for_a_dense_model():
    state = {"backbone.head.weight": torch.zeros(1), "backbone.neck.conv.weight": torch.zeros(1)}
    assert split_parts(state) == (state, {})
    bare = {"stem.conv1.weight": torch.zeros(1), "neck.0.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert split_parts(bare) == (bare, {})


def test_averaged_weights_of_mmengine(trained, tmp_path):
    """Its hook writes the averaged weights as state_dict and those as trained, with a counter, as ema_state_dict."""
    averaged = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    averaged["decode_head.conv_seg.bias"] = torch.ones(3)
    raw = {f"module.{key}": torch.zeros_like(value) for key, value in averaged.items()} | {"steps": torch.tensor(7)}
    content = {"state_dict": averaged, "ema_state_dict": raw}
    assert unwrap(content, "file")["decode_head.conv_seg.bias"].sum() == 3
    plain = unwrap(content, "file", ema=False)
    assert set(plain) == set(averaged) and not any(value.any() for value in plain.values())


def test_parts_of_any_name():
    """Detectors such as DETR have an encoder and a decoder of their own beside backbone and head."""
    own, parts = split_parts({"backbone.stem.weight": 1, "encoder.layers.0.w": 2, "query_embedding.w": 3, "bbox_head.w": 4})
    assert own == {"stem.weight": 1}
    assert parts == {"encoder": ["encoder.layers.0.w"], "query_embedding": ["query_embedding.w"], "bbox_head": ["bbox_head.w"]}

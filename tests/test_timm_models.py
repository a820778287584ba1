"""Plain timm models as baselines in a classification config."""

import copy

import pytest
import timm
import torch
from engine_support import CLASSES, small_config

from vision_ssm import CheckpointError
from vision_ssm.engine import ImageClassifier, Runner, commands, parameter_groups
from vision_ssm.engine.predict import Predictor
from vision_ssm.engine.timm_models import create_classifier, load_classifier

SMALL = dict(img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2, in_chans=1, dynamic_img_size=True)
NAME = "timm:deit_tiny_patch16_224"
LOSS = dict(type="CrossEntropyLoss")


def classifier(classes: int = 3, **options) -> ImageClassifier:
    return ImageClassifier(backbone=dict(SMALL, name=NAME), num_classes=classes, loss=LOSS, **options)


def test_it_is_timms_model():
    torch.manual_seed(3)
    ours = create_classifier(NAME, 5, **SMALL).eval()
    torch.manual_seed(3)
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=5, **SMALL).eval()
    assert type(ours) is type(theirs)
    for size in (32, 64):
        x = torch.randn(2, 1, size, size)
        assert torch.equal(ours(x), theirs(x))
    assert type(create_classifier("vmamba_micro", 5)).__module__.startswith("vision_ssm")


def test_weight_decay_follows_timms_contract():
    groups = parameter_groups(classifier(), 1e-3, 0.05, layer_decay=0.5)
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert decays["backbone.pos_embed"] == decays["backbone.cls_token"] == decays["backbone.norm.bias"] == 0.0
    assert decays["backbone.head.weight"] == decays["backbone.blocks.0.attn.qkv.weight"] == 0.05
    assert rates["backbone.patch_embed.proj.weight"] < rates["backbone.head.weight"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(name="timm:deit_tiny_patch61_224"), KeyError, "unknown model 'deit_tiny_patch61_224' of timm. Did you mean"),
        (dict(name="deit_tiny_patch16_22"), KeyError, "unknown model 'deit_tiny_patch16_22'"),
        (dict(name=NAME, pretrained=True), TypeError, "takes no pretrained; weights are read from a file, model.pretrained"),
        (dict(name=NAME, drop_path=0.1), TypeError, "cannot be built with drop_path: .*drop_path"),
    ],
)
def test_wrong_names_and_keywords(options, error, message):
    with pytest.raises(error, match=message):
        ImageClassifier(backbone=options, num_classes=3, loss=LOSS)


def test_a_teacher_needs_a_model_of_this_library(tmp_path):
    with pytest.raises(ValueError, match="distillation teaches models of this library; timm:deit.* is one of timm's"):
        classifier(distillation=dict(teacher="vmamba_micro", checkpoint=str(tmp_path / "none.pth")))


def test_pretrained_weights_and_a_new_head(tmp_path):
    source, file = classifier(), tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, file)
    for given in (file, tmp_path / "bare.pth"):
        torch.save(source.backbone.state_dict(), tmp_path / "bare.pth")
        loaded = classifier(pretrained=str(given)).backbone.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in source.backbone.state_dict().items())
    with pytest.raises(CheckpointError, match="(?s)does not fit VisionTransformer.*head.weight"):
        classifier(7, pretrained=str(file))
    other = create_classifier(NAME, 7, **SMALL)
    head = other.head.weight.detach().clone()
    report = load_classifier(other, file, reset_head=True)
    assert "classifier new (head.weight, head.bias)" in report and torch.equal(other.head.weight, head)
    assert torch.equal(other.pos_embed, source.backbone.pos_embed)
    same = create_classifier(NAME, 3, **SMALL)
    load_classifier(same, file, reset_head=True)
    assert torch.equal(same.head.weight, source.backbone.head.weight)
    tensors = source.backbone.state_dict()
    del tensors["norm.weight"]
    torch.save(tensors, file)
    for classes in (3, 7):
        with pytest.raises(CheckpointError, match="(?s)does not fit.*norm.weight"):
            load_classifier(create_classifier(NAME, classes, **SMALL), file, reset_head=True)


def test_a_run_is_trained_tested_and_predicts(data, tmp_path, capsys):
    cfg = small_config(data, tmp_path / "run", epochs=1)
    cfg.model.backbone = dict(SMALL, name=NAME)
    cfg.dump(tmp_path / "config.py")
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    checkpoint = tmp_path / "run" / "epoch_1.pth"
    assert commands.test([str(tmp_path / "config.py"), str(checkpoint), "--work-dir", str(tmp_path / "test")]) == 0
    assert "top1" in capsys.readouterr().out
    predictor = Predictor.from_config(cfg, checkpoint, "cpu")
    picture = next((data / "val").rglob("*.png"))
    (found,) = predictor([picture], top=3).values()
    assert {name for name, _ in found} == set(CLASSES) and sum(value for _, value in found) == pytest.approx(1, abs=1e-5)

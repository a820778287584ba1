"""VCMamba. Its scan is tested with PlainMamba's."""

import golden_cases
import pytest
import torch
from torch import nn

import vision_ssm
from vision_ssm.factory import families
from vision_ssm.layers import DistilledHead, resample_position_table
from vision_ssm.scans.continuous import ContinuousScan
from vision_ssm.weights import load_state_dict

MINI = golden_cases.load("vcmamba/vcmamba_mini_nopos_128x192")
DENSE = golden_cases.load("vcmamba/vcmamba_b_backbone_256")


def micro(**options):
    return vision_ssm.create_model("vcmamba_micro", **options)


def test_scan_sits_in_the_last_blocks_alone():
    model = vision_ssm.create_model("vcmamba_micro", scan="multi_direction")
    assert [[hasattr(block, "mixer") for block in stage.blocks] for stage in model.stages] == [
        [False], [False], [False], [False, True, True],
    ]  # fmt: skip
    mixer = micro(scan=dict(state_dim=4)).stages[3].blocks[2].mixer
    assert isinstance(mixer, ContinuousScan) and mixer.core.state_dim == 4
    assert not mixer.gate and isinstance(mixer.out_act, nn.ReLU) and isinstance(mixer.in_proj[1], nn.BatchNorm2d)
    every = micro(scan_blocks=9)
    assert all(hasattr(block, "mixer") for block in every.stages[3].blocks) and not hasattr(every.stages[2].blocks[0], "mixer")
    assert all(not hasattr(block, "mixer") for block in micro(scan_blocks=0).stages[3].blocks)


def test_blocks_are_what_the_text_says():
    torch.manual_seed(0)
    model = micro().eval()
    block, x = model.stages[0].blocks[0], torch.randn(2, 5, 7, 16)
    for module in block.mlp.modules():  # so that the norms do something
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    mlp = block.mlp
    h = torch.nn.functional.gelu(mlp.norm1(mlp.fc1(x)))
    h = torch.nn.functional.gelu(mlp.conv_norm(mlp.conv(h)))
    values, (branch, _) = mlp.norm2(mlp.fc2(h)), block(x)[1]
    torch.testing.assert_close(branch, 1e-5 * values)
    block = micro(layer_scale=None).eval().stages[0].blocks[0]
    torch.testing.assert_close(block(x)[1][0], block.mlp(x))


def test_positions_come_before_the_first_scan():
    model = micro().eval()
    first = model.stages[3].blocks[1]
    assert first.pos_embed.table.shape == (1, 48, 2, 2) and model.stages[3].blocks[2].pos_embed is None
    assert "stages.3.blocks.1.pos_embed.table" in model.no_weight_decay()
    seen = []
    first.norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, added = torch.randn(1, 3, 4, 48), torch.randn(1, 3, 4, 48)
    first(x, (added, nn.Identity()))
    table = resample_position_table(first.pos_embed.table, 3, 4).permute(0, 2, 3, 1)
    torch.testing.assert_close(seen[0], x + added + table)
    assert micro(pos_embed=False).stages[3].blocks[1].pos_embed is None


def test_positions_of_another_size_are_resampled_when_loaded():
    small, large = micro(), micro(img_size=160)
    assert load_state_dict(large, small.state_dict()).complete
    key = "stages.3.blocks.1.pos_embed.table"
    expected = resample_position_table(small.state_dict()[key], 5, 5)
    torch.testing.assert_close(large.state_dict()[key], expected)


def test_initial_values():
    torch.manual_seed(0)
    model = micro(dims=(64, 64, 64, 64))
    for conv in (model.stem[0].conv, model.stem[1].conv):
        fan_in = conv.weight[0].numel()
        assert not conv.bias.any() and conv.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.15)
    core = model.stages[3].blocks[1].mixer.core
    assert not core.dt_proj_bias.any() and core.D.eq(1).all() and core.A_log[5, 15].exp().item() == pytest.approx(16)
    mlp = model.stages[1].blocks[0].mlp
    for weight in (core.x_proj_weight, core.dt_proj_weight, mlp.fc1.weight, model.head.label.weight):
        assert 0.018 < weight.std() < 0.022
    assert not mlp.fc1.bias.any() and mlp.conv.bias.any()  # convolutions start as torch makes them
    assert model.stages[1].blocks[0].layer_scale.eq(1e-5).all()
    bound = 64**-0.5
    assert bound * 0.9 < model.stages[3].blocks[1].mixer.in_proj[0].weight.abs().max() <= bound


def test_two_classifiers():
    model = micro(num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    label, teacher = model(x)
    assert isinstance(model.head, DistilledHead) and label.shape == teacher.shape == (2, 4)
    model.eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), (model.head.label(pooled) + model.head.teacher(pooled)) / 2)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    single = micro(num_classes=4, distilled=False)
    assert single(x).shape == (2, 4) and single.classifier_key == "head.weight"
    report = load_state_dict(micro(num_classes=3), model.state_dict())
    assert report.complete
    fresh = micro(num_classes=5)
    assert "head.label.weight" in load_state_dict(fresh, model.state_dict(), reset_head=True).ignored[
        "classifier of another size, re-initialised"
    ]  # fmt: skip


def test_dense_backbone_has_another_stem_and_no_norms():
    options = families()["vcmamba"][0].from_official_config(DENSE["config"], set(DENSE["state_dict"]))
    assert options["features_only"] and options["stem_act"] == "gelu" and not options["out_norm"]
    assert options["img_size"] == 256
    assert isinstance(micro(stem_act="gelu").stem[1].bn.act, nn.GELU)
    assert isinstance(micro().stem[1].bn.act, nn.ReLU)


def imported(config=None, drop=()):
    weights = {key: value for key, value in golden_cases.weights(MINI).items() if not key.startswith(drop or "-")}
    return vision_ssm.import_official("vcmamba", {**MINI["config"], **(config or {})}, weights)


def test_import_of_other_forms():
    x = golden_cases.images(MINI["input"])
    whole = imported()
    headless = imported(drop=("head.", "dist_head."))
    assert not headless.features_only and headless(x).shape == (2, 48)
    single = imported(drop=("dist_head.",))
    torch.testing.assert_close(single(x), whole.head.label(headless(x)))
    without_scale = [f"network.{2 * i}.0.layer_scale_2" for i in range(4)]
    plain = imported(dict(use_layer_scale=False), drop=tuple(without_scale))
    assert plain.stages[0].blocks[0].layer_scale is None and torch.isfinite(plain(x)).all()
    with pytest.raises(ValueError, match="fork_feat=True belongs to the original's segmentation backbone"):
        imported(dict(fork_feat=True))
    dense = imported(dict(fork_feat=True), drop=("head.", "dist_head.", "norm."))
    assert dense.features_only and len(dense(x)) == 4


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(layer=[1, 1, 1, 3]), "unknown hyperparameters of an original VCMamba: layer. Did you mean 'layers'"),
        (dict(down_stride=4), "down_stride of an original VCMamba is 2, got 4"),
        (dict(downsamples=[True, True, True, False]), "downsamples of an original VCMamba is"),
    ],
)
def test_wrong_hyperparameters(config, message):
    with pytest.raises(ValueError, match=message):
        imported(config)


def test_wrong_stages():
    with pytest.raises(ValueError, match="dims and depths must have one entry per stage"):
        micro(dims=(16, 32))
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        micro(stem_act="swish")

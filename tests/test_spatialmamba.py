"""Spatial-Mamba: initial values, official weights, and what they were trained with."""

import golden_cases
import pytest
import torch
from engine_support import CONFIGS, read_config

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.backbones.spatialmamba import SpatialMamba
from vision_ssm.engine.optim import ParameterGroups
from vision_ssm.factory import families
from vision_ssm.scans import build_scan
from vision_ssm.scans.state_fusion import StateFusionScan
from vision_ssm.weights import load_state_dict

CASE = golden_cases.load("spatialmamba/spatialmamba_mini_64x96")


@pytest.fixture(scope="module")
def official():
    return golden_cases.weights(CASE)


def test_initial_values():
    mixer = build_scan("state_fusion", 48)
    core = mixer.core
    shapes = {name: tuple(parameter.shape) for name, parameter in core.named_parameters()}
    assert shapes == {
        "x_proj_weight": (1, 5, 96),  # rank ceil(48 / 16) and two states
        "dt_proj_weight": (1, 96, 3),
        "dt_proj_bias": (1, 96),
        "A_log": (1, 96, 1),
        "D": (1, 96),
        "kernels": (3, 96, 3, 3),
        "alpha": (3,),
    }
    for parameter in (core.kernels, core.alpha, core.D):
        assert torch.equal(parameter, torch.ones_like(parameter))
    assert not core.A_log.any()
    assert core.x_proj_weight.abs().max() <= 96**-0.5 and core.dt_proj_weight.abs().max() <= 3**-0.5
    steps = torch.nn.functional.softplus(core.dt_proj_bias)
    assert 0.99e-3 <= steps.min() and steps.max() <= 0.101


def test_linear_layers_of_a_model():
    model = vision_ssm.create_model("spatialmamba_tiny", depths=(1,), dims=(64,), num_classes=10)
    mixer = model.stages[0].blocks[0].mixer
    for layer in (mixer.in_proj, mixer.out_proj, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any()


def test_a_state_reaches_cells_before_its_own():
    """The scan looks back alone; fusion looks up to five cells ahead, along rows and columns."""
    core = build_scan("state_fusion", 16).double().core
    x = torch.randn(1, 13, 13, 32, dtype=torch.float64)
    other = x.clone()
    other[0, 6, 6] += 1.0
    changed = (core(x) != core(other)).any(-1)[0]
    assert changed[1, 1] and changed[6, 1] and changed[1, 6] and changed[12, 12]
    assert not changed[0].any() and not changed[1, 0]


def test_routes():
    """Walking columns is walking rows of the map on its side."""
    rows, columns = build_scan("state_fusion", 16), build_scan(dict(type="state_fusion", route="column"), 16)
    turned = {
        key: value.transpose(-1, -2) if key in ("conv.weight", "core.kernels") else value
        for key, value in rows.state_dict().items()
    }
    columns.load_state_dict(turned)
    x = torch.randn(2, 5, 7, 16)
    torch.testing.assert_close(columns(x.transpose(1, 2)).transpose(1, 2), rows(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_finite(dtype):
    mixer = build_scan("state_fusion", 16)
    x = torch.randn(1, 6, 7, 16)
    exact = mixer(x)
    with torch.autocast("cpu", dtype=dtype):
        close, large = mixer(x), mixer(300 * x)
    assert torch.isfinite(large).all()
    error = (close.float() - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 4e-3), float(error)
    halved = mixer.to(dtype)(x.to(dtype))
    assert halved.dtype == dtype
    assert (halved.float() - exact).norm() / exact.norm() < 4e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(expand=0.0), r"expand \* dim must be at least 1"),
        (dict(conv_kernel=2), "conv_kernel must be odd, so that the map keeps its size; got 2"),
        (dict(dt_rank=0), "dt_rank is 'auto' or a positive whole number, got 0"),
        (dict(route="cross"), "states of one route can be fused, but 'cross' has 4; try 'raster'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        StateFusionScan(8, **options)


def test_official_names(official):
    """Shapes of ours, and the dilations of the three kernels."""
    ours = SpatialMamba.official_keys(official)
    prefix, theirs = "stages.2.blocks.1.mixer.core.", "layers.2.blocks.1.self_attention."
    assert torch.equal(ours[f"{prefix}D"][0], official[f"{theirs}Ds"])
    for i, name in enumerate(("kernel_3", "kernel_3_1", "kernel_3_2")):
        assert torch.equal(ours[f"{prefix}kernels"][i], official[f"{theirs}state_fusion.{name}"][:, 0])
    assert "stages.1.downsample.expand.weight" in ours and "stem.conv4.bn.running_var" in ours
    assert SpatialMamba.official_keys(ours) == ours


def test_round_trip_of_official_weights(official):
    model = vision_ssm.import_official("spatialmamba", CASE["config"], official)
    dense = vision_ssm.create_model("spatialmamba_micro", dims=32, features_only=True, out_norm=False).eval()
    report = load_state_dict(dense, model.state_dict())
    assert list(report.ignored) == ["classifier of a model without one"]
    x = golden_cases.images(CASE["input"])
    with torch.no_grad():
        for ours, theirs in zip(dense(x), model.forward_intermediates(x), strict=True):
            assert torch.equal(ours, theirs)


def test_which_weights_are_recognised(official):
    model = vision_ssm.create_model("spatialmamba_micro", scan="multi_direction")
    assert SpatialMamba.recognises(set(official)) and SpatialMamba.recognises(set(model.state_dict()))
    dense = {key for key in official if not key.startswith(("head.", "norm."))} | {"outnorm0.weight"}
    assert SpatialMamba.recognises(dense)
    for family, classes in families().items():
        if family != "spatialmamba":
            assert not any(cls.recognises(set(official)) for cls in classes), family
            for name in golden_cases.names(family):
                assert not SpatialMamba.recognises(set(golden_cases.load(name)["state_dict"])), name
    with pytest.raises(CheckpointError, match="this is no vmamba checkpoint: it looks like a spatialmamba checkpoint"):
        load_state_dict(vision_ssm.create_model("vmamba_micro"), official)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(d_state=4), "d_state=4 never worked in the original: it fuses one state per channel"),
        (dict(expand=4), "expand of an original Spatial-Mamba is 2, got 4"),
        (dict(patch_size=8), "the stem's stride is always 4, got patch_size=8"),
        (dict(depth=[1]), "unknown hyperparameters of an original Spatial-Mamba: depth. Did you mean 'depths'"),
    ],
)
def test_wrong_hyperparameters(official, config, message):
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("spatialmamba", {**CASE["config"], **config}, official)


def test_hyperparameters_without_effect(official):
    config = dict(CASE["config"], dt_init="constant", use_checkpoint=True, pretrained="weights.pth")
    assert SpatialMamba.from_official_config(config, set(official)) == SpatialMamba.from_official_config(
        CASE["config"], set(official)
    )


def test_widths_per_stage():
    model = vision_ssm.create_model("spatialmamba_micro", dims=(16, 48, 64, 80), num_classes=2).eval()
    assert [info["num_chs"] for info in model.feature_info] == [16, 48, 64, 80]
    assert model(torch.randn(1, 3, 33, 64)).shape == (1, 2)
    with pytest.raises(ValueError, match="one entry per stage"):
        vision_ssm.create_model("spatialmamba_micro", dims=(16, 32))


def test_recipe_decays_what_the_original_decays():
    """Of the parameters of a mixer, those with more than one dimension in the original."""
    cfg = read_config(CONFIGS / "classification" / "spatialmamba_tiny_8xb128_in1k.py")
    with torch.device("meta"):
        model = vision_ssm.create_model("spatialmamba_micro")
    options = {**cfg.optim_wrapper.optimizer}
    wrapper = ParameterGroups({"optimizer": options, "precision": "fp32"}, cfg.optim_wrapper.paramwise_cfg)(model)
    decayed = {id(p) for group in wrapper.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    core = dict(model.stages[0].blocks[0].mixer.core.named_parameters())
    kept = {name for name, parameter in core.items() if id(parameter) in decayed}
    assert kept == {"x_proj_weight", "dt_proj_weight", "A_log", "kernels"}

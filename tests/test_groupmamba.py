"""GroupMamba: its layer and its block against the original, its tables, its start, its two heads."""

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.backbones.base import add_branch
from vision_ssm.backbones.groupmamba import GroupBlock, GroupMamba
from vision_ssm.layers import ConvMlp, DistilledHead
from vision_ssm.scans import MultiDirectionScan, build_routes, build_scan
from vision_ssm.scans.channel_groups import ChannelGroupsScan

PREFIX = {"layer": ("block1.0.attn.", "stages.0.blocks.0.mixer."), "block": ("block1.0.", "stages.0.blocks.0.")}


def ours(tensors: dict, part: str) -> dict:
    """Tensors of an original layer or block under our names."""
    official, converted = PREFIX[part]
    renamed = GroupMamba.official_keys({official + key: value for key, value in tensors.items()})
    return {key.removeprefix(converted): value for key, value in renamed.items()}


def official_gradients(module: torch.nn.Module, shapes: dict, part: str) -> dict:
    """Gradients of our parameters, taken apart as the original keeps its own."""
    numbers, count = {}, 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel()
        numbers[key] = torch.arange(count, count + size).view(shape)
        count += size
    flat = torch.full((count,), float("nan"), dtype=torch.float64)
    places = ours(numbers, part)
    for key, parameter in module.named_parameters():
        flat[places[key].flatten()] = parameter.grad.flatten()
    return {key: flat[places] for key, places in numbers.items()}


@pytest.mark.parametrize("part", ["layer", "block"])
def test_golden_operator(part):
    case = golden_cases.load(f"ops/groupmamba_{part}")
    config, shapes = case["config"], {key: shape for key, shape, _ in case["state_dict"]}
    if part == "layer":
        scan = dict(expand=config["expand"], state_dim=config["d_state"], reduction=config["reduction"])
        module = ChannelGroupsScan(config["input_dim"], **scan)
    else:
        module = GroupBlock(config["dim"], {"type": "channel_groups"}, mlp_ratio=config["mlp_ratio"], norm_eps=1e-6)
    weights = {key: golden_cases.tensor_for(key, shape).double() for key, shape in shapes.items()}
    module = module.double().eval()
    module.load_state_dict(ours(weights, part))
    x = golden_cases.images(case["input"]).double().requires_grad_()
    grid = x.unflatten(1, (config["H"], config["W"]))  # neither is square: column routes have true gradients
    y = (module(grid) if part == "layer" else add_branch(*module(grid))).flatten(1, 2)
    (y * golden_cases.images(case["cotangent"]).double()).sum().backward()
    torch.testing.assert_close(y, golden_cases.array(case["output"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, golden_cases.array(case["grad_input"]), rtol=1e-9, atol=1e-9)
    gradients = official_gradients(module, shapes, part)
    assert case["param_grads"]
    for key, expected in case["param_grads"].items():
        scale = expected["std"] or abs(expected["mean"])  # a single number does not vary
        error = golden_cases.sample_error({**expected, "std": scale}, gradients[key])
        assert error < 1e-5, key  # samples were stored in float32


@pytest.mark.parametrize("case", golden_cases.load("ops/group_scan")["cases"], ids=lambda case: f"{case['H']}x{case['W']}")
def test_routes_of_the_groups(case):
    (table,) = build_routes("cross").tables(case["H"], case["W"])
    assert torch.tensor(case["x"])[table.read].tolist() == case["routes"]
    y = torch.tensor(case["y"])
    back = [torch.zeros_like(y).scatter(0, write, y).tolist() for write in table.write]
    assert back == case["unscanned"]


def test_every_group_is_a_gated_mixer_of_its_own_direction():
    torch.manual_seed(0)
    scan = ChannelGroupsScan(24, state_dim=2, expand=2.0).double()
    n = torch.randn(2, 3, 5, 24, dtype=torch.float64)
    outputs = []
    for k, routes in enumerate(("raster", "column", "reversed", {"type": "reversed", "of": "column"})):
        mixer = MultiDirectionScan(6, expand=2.0, state_dim=2, routes=routes).double()
        inner = slice(12 * k, 12 * k + 12)
        weights = {f"core.{name}": value[k : k + 1] for name, value in scan.core.named_parameters()}
        weights |= {f"conv.{name}": value[inner] for name, value in scan.conv.named_parameters()}
        weights |= {f"out_norm.{name}": getattr(scan, f"out_norm_{name}")[k] for name in ("weight", "bias")}
        weights |= {f"{name}.weight": getattr(scan, f"{name}_weight")[k] for name in ("in_proj", "out_proj")}
        mixer.load_state_dict(weights)
        outputs.append(mixer(n[..., 6 * k : 6 * k + 6]))
    torch.testing.assert_close(scan.mix_groups(n), torch.cat(outputs, dim=-1))


def test_other_routes_make_other_numbers_of_groups():
    scan = build_scan({"type": "channel_groups", "routes": {"type": "bidirectional", "repeats": 1}}, 6)
    assert scan.groups == 2 and scan(torch.randn(1, 2, 3, 6)).shape == (1, 2, 3, 6)


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (18, {}, "dim must be a multiple of the 4 routes of Cross.*, got 18"),
        (16, dict(routes="cascade"), "is a cascade"),
        (16, dict(expand=0.1), r"expand \* dim / 4 and reduction must be at least 1, got 0.1 \* 4 and 16"),
        (16, dict(reduction=0), "reduction must be at least 1"),
    ],
)
def test_wrong_options(dim, options, message):
    with pytest.raises(ValueError, match=message):
        ChannelGroupsScan(dim, **options)


def test_initial_values():
    torch.manual_seed(0)
    model = vision_ssm.create_model("groupmamba_micro", dims=(64, 64, 64, 64), stem_dim=32)
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.skip_scale.tolist() == [1.0] and not mixer.affinity.reduce.bias.any()
    for weight in (mixer.in_proj_weight, mixer.out_proj_weight, mixer.proj.weight, model.head.label.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    for conv, fan_out in ((model.stem.convs[0].conv, 49 * 32), (mixer.conv, 9), (model.stages[1].downsample.conv, 576)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert conv.bias is None or not conv.bias.any()
    torch.testing.assert_close(mixer.core.A_log, torch.zeros(4, 16, 1))  # one state that decays with rate 1
    step = torch.nn.functional.softplus(mixer.core.dt_proj_bias)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01


def test_norms_stand_where_the_original_has_them():
    model = vision_ssm.create_model("groupmamba_micro")
    mixer = model.stages[0].blocks[0].mixer
    assert [stage.norm.eps for stage in model.stages[:3]] == [1e-6] * 3 and not hasattr(model.stages[3], "norm")
    assert model.norm.eps == model.class_block.norm1.eps == model.stages[0].blocks[0].norm2.eps == 1e-6
    assert mixer.norm.eps == model.stem.norm.eps == model.stages[1].downsample.norm.eps == 1e-5
    assert isinstance(model.stages[0].blocks[0].norm1, torch.nn.Identity)
    other = vision_ssm.create_model("groupmamba_micro", scan="multi_direction")  # does not normalise by itself
    assert isinstance(other.stages[0].blocks[0].norm1, torch.nn.LayerNorm)
    none = vision_ssm.create_model("groupmamba_micro", scan=False)
    assert none.class_block.mixer is None and none(torch.randn(1, 3, 32, 32))[0].shape == (1, 1000)


def test_dense_backbone_norms_the_last_map_alone():
    model = vision_ssm.create_model("groupmamba_micro", features_only=True)
    assert list(model.out_norms) == ["3"] and model.class_block is None
    classifier = vision_ssm.create_model("groupmamba_micro").eval()
    torch.nn.init.normal_(classifier.norm.weight)
    report = vision_ssm.weights.load_state_dict(model, classifier.state_dict())
    (extra,) = (names for rule, names in report.ignored.items() if rule == "classifier of a model without one")
    assert {name.split(".")[0] for name in extra} == {"head", "class_block"}
    x = torch.randn(1, 3, 40, 72)
    for i, (a, b) in enumerate(zip(model.eval()(x), classifier.forward_intermediates(x))):
        torch.testing.assert_close(a, b if i < 3 else classifier.norm(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    early = vision_ssm.create_model("groupmamba_micro", features_only=True, out_indices=(0, 2))
    assert not early.out_norms and vision_ssm.weights.load_state_dict(early, classifier.state_dict()).complete
    bare = vision_ssm.create_model("groupmamba_micro", features_only=True, out_norm=False)
    assert vision_ssm.weights.load_state_dict(bare, classifier.state_dict()).complete


def test_two_heads():
    model = vision_ssm.create_model("groupmamba_micro", num_classes=5)
    x = torch.randn(2, 3, 32, 48)
    label, teacher = model.eval().head.train()(model.forward_head(model.forward_features(x), pre_logits=True))
    torch.testing.assert_close(model.eval()(x), (label + teacher) / 2)
    assert isinstance(model.train()(x), tuple) and isinstance(model.get_classifier(), DistilledHead)
    single = vision_ssm.create_model("groupmamba_micro", num_classes=5, distilled=False)
    assert single(x).shape == (2, 5) and single.classifier_key == "head.weight"
    with pytest.raises(CheckpointError, match="head.teacher.weight"):
        vision_ssm.weights.load_state_dict(single, model.state_dict())


def official(name: str = "groupmamba/micro", without: tuple[str, ...] = ()) -> tuple[dict, dict]:
    case = golden_cases.load(name)
    weights = golden_cases.weights(case)
    return case["config"], {key: value for key, value in weights.items() if not key.startswith(without)}


def test_official_weights_without_heads():
    config, weights = official(without=("dist_head.",))
    model = vision_ssm.import_official("groupmamba", {**config, "distillation": False}, weights)
    assert isinstance(model.head, torch.nn.Linear)
    torch.testing.assert_close(model.head.weight, weights["head.weight"])
    with pytest.raises(CheckpointError, match="head.teacher"):
        vision_ssm.import_official("groupmamba", config, weights)
    config, weights = official(without=("dist_head.", "head."))
    bare = vision_ssm.import_official("groupmamba", config, weights)
    assert bare.num_classes == 0 and bare(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_official_weights_with_a_missing_group():
    config, weights = official(without=("block2.0.attn.mamba_g3.",))
    with pytest.raises(CheckpointError, match="mamba_g1"):
        vision_ssm.import_official("groupmamba", config, weights)


def test_decay_follows_the_originals_shapes():
    """1-D there: the skips and norms of single groups, which are 2-D in the stacked parameters."""
    exempt = vision_ssm.create_model("groupmamba_micro").no_weight_decay()
    mixer = {name.removeprefix("class_block.mixer.") for name in exempt if name.startswith("class_block.mixer.")}
    assert mixer == {"core.A_log", "core.D", "core.dt_proj_bias", "out_norm_weight", "out_norm_bias"}


def test_our_keys_are_kept_and_recognised():
    model = vision_ssm.create_model("groupmamba_micro")
    state = model.state_dict()
    assert GroupMamba.official_keys(state).keys() == state.keys() and GroupMamba.recognises(set(state))
    assert GroupMamba.recognises(set(official()[1]))
    assert not GroupMamba.recognises(set(vision_ssm.create_model("vmamba_micro").state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dim=[1]), "unknown hyperparameters of an original GroupMamba: embed_dim. Did you mean 'embed_dims'"),
        (dict(depths=None), "is described by depths as well"),
    ],
)
def test_wrong_official_config(change, message):
    config, weights = official()
    config = {key: value for key, value in {**config, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("groupmamba", config, weights)


def test_wrong_stages():
    with pytest.raises(ValueError, match="one entry per stage"):
        vision_ssm.create_model("groupmamba_micro", dims=(16, 32))


@pytest.mark.parametrize("residual", [False, True])
def test_conv_mlp(residual):
    mlp = ConvMlp(6, 10, 4, residual=residual).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    h = mlp.fc1(x)
    convolved = torch.nn.functional.conv2d(h.permute(0, 3, 1, 2), mlp.conv.weight, mlp.conv.bias, padding=1, groups=10)
    h = convolved.permute(0, 2, 3, 1) + (h if residual else 0)
    torch.testing.assert_close(mlp(x), mlp.fc2(torch.nn.functional.gelu(h)))

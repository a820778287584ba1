"""Adventurer: its mixer, the order of its tokens, its initial values, and what of an original it refuses."""

import golden_cases
import pytest
import torch
from torch import nn

import vision_ssm
from vision_ssm.backbones.adventurer import Adventurer
from vision_ssm.layers import resample_position_table
from vision_ssm.scans import build_scan
from vision_ssm.scans.sequence import TokenLayout

CASE = golden_cases.load("adventurer/adventurer_micro_64")


def test_golden_mixer():
    case = golden_cases.load("ops/adventurer_mixer")
    mixer = build_scan(dict(type="causal", head_dim=4, state_dim=4), 8).double()
    weights = {key: golden_cases.tensor_for(key, shape) for key, shape, _ in case["state_dict"]}
    mixer.load_state_dict({key.replace("conv1d.", "conv."): value for key, value in weights.items()})
    x = torch.tensor(case["x"], dtype=torch.float64, requires_grad=True)
    y = mixer.mix(x)
    (y * torch.tensor(case["grad_output"], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(y, torch.tensor(case["output"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, torch.tensor(case["grad_x"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


class Watched(nn.Module):
    """Stands in for the input projection and keeps what it is given."""

    def __init__(self, projection):
        super().__init__()
        self.projection = projection

    def forward(self, x):
        self.seen = x
        return self.projection(x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("heading", [False, True])
@pytest.mark.parametrize("class_tokens", ["none", "last", "middle"])
def test_order_of_tokens(reverse, heading, class_tokens):
    """Mean, patches (reversed or not), class tokens in place; outputs come back where their tokens were."""
    mixer = build_scan(dict(type="causal", reverse=reverse, heading=heading), 16)
    mixer.in_proj = Watched(mixer.in_proj)
    layout = TokenLayout(2, 2, class_tokens)
    x = torch.randn(1, 4 + len(layout.positions), 16)
    y = mixer.scan_tokens(x, layout)
    order = {"none": "0123", "last": "0123c", "middle": "01c23"}[class_tokens]
    patches = iter("3210" if reverse else "0123")
    walked = [order.index("c" if token == "c" else next(patches)) for token in order]
    expected = x[:, walked]
    if heading:
        expected = torch.cat([x.mean(1, keepdim=True), expected], dim=1)
    torch.testing.assert_close(mixer.in_proj.seen, expected)
    outputs = mixer.mix(expected)[:, int(heading) :]
    torch.testing.assert_close(y[:, walked], outputs)


def test_it_is_causal_but_for_the_heading():
    mixer = build_scan(dict(type="causal", heading=False), 16)
    x = torch.randn(1, 3, 4, 16)
    y = mixer(x)
    x[0, 1, 2] += 1
    changed = (mixer(x) - y).abs().amax(-1).flatten() > 0
    assert changed.tolist() == [False] * 6 + [True] * 6


def test_only_blocks_2_and_3_are_reversed():
    model = vision_ssm.create_model("adventurer_micro", depth=6)
    assert [block.mixer.reverse for block in model.stages] == [False, False, True, True, False, False]
    paper = vision_ssm.create_model("adventurer_micro", reversed_blocks=(1, 3))
    assert [block.mixer.reverse for block in paper.stages] == 2 * [False, True]
    other = vision_ssm.create_model("adventurer_micro", scan="multi_direction")
    assert other.class_tokens == "none" and not hasattr(other.stages[2].mixer, "reverse")


def test_drop_path_is_one_block_behind():
    model = vision_ssm.create_model("adventurer_micro", depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.stages]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])


def test_initial_values():
    torch.manual_seed(0)
    dim, depth = 256, 4
    model = vision_ssm.create_model("adventurer_tiny_patch16_224", depth=depth)
    mixer = model.stages[1].mixer
    assert mixer.heads == 8 and torch.equal(mixer.D, torch.ones(8))
    assert mixer.A_log.min() >= 0 and mixer.A_log.exp().max() <= 16
    steps = nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01
    bound = (2 * dim) ** -0.5 / depth**0.5  # Kaiming-uniform with a = sqrt(5), over the root of the depth
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert 0.95 * dim**-0.5 < mixer.in_proj.weight.abs().max() <= dim**-0.5
    assert model.stem.conv.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token.tokens.std().item() == pytest.approx(0.02, rel=0.2)
    biases = {key for key, value in model.named_parameters() if key.endswith(".bias") and not value.any()}
    assert {"head.bias", "stem.conv.bias", "stages.0.mlp.fc1.bias", "stages.0.mlp.fc2.bias"} <= biases
    model.reset_classifier(5)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_last_row_of_the_positions_is_the_class_tokens():
    weights = golden_cases.weights(CASE)
    converted = Adventurer.official_keys(weights)
    table = converted["pos_embed.table"]
    assert table.shape == (1, 64, 4, 4)
    assert torch.equal(table.flatten(2).mT, weights["pos_embed"][:, :16])
    assert torch.equal(converted["cls_token.positions"], weights["pos_embed"][:, 16:])
    larger = vision_ssm.import_official("adventurer", {**CASE["config"], "img_size": 96}, weights)
    assert torch.equal(larger.pos_embed.table, resample_position_table(table, 6, 6))
    assert torch.equal(larger.cls_token.positions, weights["pos_embed"][:, 16:])


def test_gates_and_values_share_a_layer():
    weights = golden_cases.weights(CASE)
    model = vision_ssm.import_official("adventurer", CASE["config"], weights)
    x = torch.randn(3, 64)
    of = {name: (weights[f"layers.0.mlp.{name}.weight"], weights[f"layers.0.mlp.{name}.bias"]) for name in ("w1", "w2", "w3")}
    linear = nn.functional.linear
    expected = linear(nn.functional.silu(linear(x, *of["w1"])) * linear(x, *of["w2"]), *of["w3"])
    torch.testing.assert_close(model.stages[0].mlp(x), expected)


def test_original_without_a_classifier():
    weights = {key: value for key, value in golden_cases.weights(CASE).items() if not key.startswith("head.")}
    model = vision_ssm.import_official("adventurer", CASE["config"], weights)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 64)


def test_original_whose_images_do_not_fill_the_patches():
    """Its convolution leaves out what is behind the last whole patch."""
    weights = golden_cases.weights(CASE)
    model = vision_ssm.import_official("adventurer", {**CASE["config"], "img_size": 72}, weights)
    assert torch.equal(model.pos_embed.table, Adventurer.official_keys(weights)["pos_embed.table"])
    x = torch.randn(1, 3, 72, 72)
    torch.testing.assert_close(model(x), model(x[:, :, :64, :64]))


def test_original_with_another_epsilon():
    """Of the norms between the blocks; the mixer's keeps its own."""
    model = vision_ssm.import_official("adventurer", {**CASE["config"], "norm_epsilon": 1e-6}, golden_cases.weights(CASE))
    block = model.stages[1]
    assert block.norm1.eps == block.norm2.eps == model.norm.eps == 1e-6 and block.mixer.norm.eps == 1e-5


@pytest.mark.parametrize(("dim", "hidden"), [(64, 160), (224, 61)])
def test_hidden_width_of_an_original(dim, hidden):
    """61 / 224 * 224 is less than 61 in float64."""
    config = dict(embed_dim=dim, depth=1, mlp_hidden=hidden, headdim=32, img_size=32)
    options = Adventurer.from_official_config(config, {"head.weight"})
    assert Adventurer(**options).stages[0].mlp.fc2.in_features == hidden


def test_recognises_its_own_alone():
    for family in ("vim", "lbvim", "localmamba", "plainmamba", "vssd"):
        for name in golden_cases.names(family):
            assert not Adventurer.recognises(set(golden_cases.load(name)["state_dict"])), name
    assert Adventurer.recognises(set(CASE["state_dict"]))
    assert Adventurer.recognises(set(vision_ssm.create_model("adventurer_micro", features_only=True).state_dict()))
    assert not Adventurer.recognises(set(vision_ssm.create_model("vmamba_micro").state_dict()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(ngroups=2), "has one group of B and C, got ngroups=2"),
        (dict(emb_dim=64), "unknown hyperparameters of an original Adventurer: emb_dim. Did you mean 'embed_dim'"),
    ],
)
def test_originals_that_do_not_exist(config, message):
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("adventurer", {**CASE["config"], **config}, golden_cases.weights(CASE))


def test_positions_of_no_square_grid():
    weights = golden_cases.weights(CASE)
    weights["pos_embed"] = weights["pos_embed"][:, :16]
    with pytest.raises(ValueError, match="15 patches, which are no square grid"):
        vision_ssm.import_official("adventurer", CASE["config"], weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=5), "head_dim is 'auto' or divides the inner width 32, got 5"),
        (dict(head_dim="largest"), "head_dim is 'auto' or divides"),
        (dict(expand=0), r"expand \* dim must be at least 1, got 0 \* 16"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_scan(dict(type="causal", **options), 16)

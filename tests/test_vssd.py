"""Non-causal SSD as a strategy, attention beside it, and VSSD, which is built of the two."""

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm.backbones.vssd import VSSD
from vision_ssm.ops import noncausal_ssd
from vision_ssm.ops.reference import noncausal_ssd_reference
from vision_ssm.scans import build_scan
from vision_ssm.scans.sequence import TokenLayout

CASES = golden_cases.load("ops/vssd_noncausal_ssd")["cases"]


@pytest.mark.parametrize("operator", [noncausal_ssd, noncausal_ssd_reference])
@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_golden_operator(case, operator):
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    rate = -leaves["A_log"].exp() if case["positive_dA"] else leaves["A_log"].exp()
    b, c = (leaves[name].unflatten(2, (case["ngroups"], -1)) for name in "BC")
    y = operator(leaves["x"], leaves["dt_raw"], rate, b, c, D=leaves["D"], dt_softplus=True)
    y.backward(torch.tensor(case["grad_output"]["y"], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor(case["outputs"]["y"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert set(case["grad_inputs"]) == set(leaves)
    for name, expected in case["grad_inputs"].items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(leaves[name].grad, expected, rtol=1e-9, atol=1e-9, msg=name)


def mixer(**options):
    return build_scan(dict(type="noncausal_ssd", state_dim=3, **options), 16).double()


def mixed(strategy, seed=1):
    """Inputs of `mix`: x, dt, b, c for a sequence of 6 tokens."""
    random = torch.Generator().manual_seed(seed)
    sizes = (strategy.heads, 4), (strategy.heads,), (strategy.groups, 3), (strategy.groups, 3)
    return [torch.randn(1, 6, *size, dtype=torch.float64, generator=random) for size in sizes]


def influence(strategy):
    """Which token reaches which, head by head: (heads, from, to)."""
    inputs = mixed(strategy)
    y = strategy.mix(*inputs)
    reached = []
    for token in range(6):
        changed = inputs[0].clone()
        changed[:, token] += 1
        reached.append((strategy.mix(changed, *inputs[1:]) - y).abs().sum(-1)[0] > 1e-12)  # (L, heads)
    return torch.stack(reached).permute(2, 0, 1)


def test_what_a_token_sees():
    forwards = torch.ones(6, 6).triu().bool()
    assert influence(mixer(heads=2)).all()
    assert torch.equal(influence(mixer(heads=2, order="raster")), forwards.expand(2, -1, -1))
    both = influence(mixer(heads=4, groups=2, order="bidirectional"))
    assert torch.equal(both, torch.stack([forwards, forwards, forwards.T, forwards.T]))


@pytest.mark.parametrize("order,second", [("none", [1, 3]), ("raster", [2, 3]), ("bidirectional", [2, 3])])
def test_which_heads_share_a_group(order, second):
    """Non-causal heads take turns between groups; in Mamba-2 neighbouring heads share one."""
    strategy = mixer(heads=4, groups=2, order=order)
    x, dt, b, c = mixed(strategy)
    changed = b.clone()
    changed[:, :, 1] += 1
    differs = (strategy.mix(x, dt, changed, c) - strategy.mix(x, dt, b, c)).abs().sum((0, 1, 3)) > 1e-12
    assert differs.nonzero().flatten().tolist() == second


def test_bidirectional_halves_are_two_scans():
    strategy = mixer(heads=4, groups=2, order="bidirectional")
    inputs = mixed(strategy)
    y = strategy.mix(*inputs)
    one_way = mixer(heads=4, groups=2, order="raster")
    one_way.load_state_dict(strategy.state_dict())
    torch.testing.assert_close(y[:, :, :2], one_way.mix(*inputs)[:, :, :2])
    turned = one_way.mix(*(part.flip(1) for part in inputs)).flip(1)
    torch.testing.assert_close(y[:, :, 2:], turned[:, :, 2:])


def test_sign_of_the_weights():
    positive, negative = mixer(heads=2), mixer(heads=2, positive_weights=False)
    negative.load_state_dict(positive.state_dict())
    inputs = mixed(positive)
    skip = positive.D[:, None] * inputs[0]
    torch.testing.assert_close(positive.mix(*inputs) - skip, skip - negative.mix(*inputs))


def test_groups_and_heads_by_name():
    strategy = build_scan(dict(type="noncausal_ssd", groups="heads"), 48)
    assert (strategy.heads, strategy.groups) == (3, 3)  # 96 channels, of which a head may take 32
    assert build_scan("noncausal_ssd", 64).heads == 2


def test_initial_values():
    strategy = build_scan(dict(type="noncausal_ssd", heads=32), 64)
    steps = F.softplus(strategy.dt_bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 0.1 * 1.01
    assert 1 <= strategy.A_log.exp().min() and strategy.A_log.exp().max() <= 16.001
    assert torch.equal(strategy.D, torch.ones(32))
    model = vision_ssm.create_model("vssd_micro")
    weight = model.stages[0].blocks[0].mixer.in_proj.weight
    assert 0.018 < weight.std() < 0.022 and not model.head.bias.any()
    assert model.stages[0].blocks[0].conv1.weight.abs().max() <= 1 / 3  # the framework's own: sqrt(1 / 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["none", "raster"])
def test_half_precision_stays_close_and_finite(dtype, order):
    strategy = build_scan(dict(type="noncausal_ssd", order=order), 16)
    x = torch.randn(1, 20, 20, 16)
    exact = strategy(x)
    with torch.autocast("cpu", dtype=dtype):
        close, large = strategy(x), strategy(100 * x)
    assert torch.isfinite(large).all()
    assert (close.float() - exact).norm() / exact.norm() < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(order="rastr"), "unknown order 'rastr'. Did you mean 'raster'"),
        (dict(heads=3), "heads is 'auto' or divides the inner width, got 3 for 32 channels"),
        (dict(heads=4, groups=3), "groups is 'heads' or divides the heads, got 3 for 4 heads"),
        (dict(order="bidirectional"), "half of the groups, got groups=1"),
        (dict(expand=0), r"expand \* dim must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_scan(dict(type="noncausal_ssd", **options), 16)


def test_attention_is_softmax_attention():
    strategy = build_scan(dict(type="attention", heads=2), 8).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    q, k, v = strategy.attention.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        share = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1)
        heads.append(share @ v[..., part])
    want = strategy.attention.proj(torch.cat(heads, dim=-1)).view_as(x)
    torch.testing.assert_close(strategy(x), want)
    tokens = torch.randn(2, 16, 8, dtype=torch.float64)  # 3 x 5 patches and a class token
    assert strategy.scan_tokens(tokens, TokenLayout(3, 5, "middle")).shape == tokens.shape
    assert build_scan("attention", 48).attention.num_heads == 3
    with pytest.raises(ValueError, match="heads is 'auto' or divides the width, got 3 for 8 channels"):
        build_scan(dict(type="attention", heads=3), 8)


def test_scan_replaces_ssd_alone():
    def mixers(**options):
        stages = vision_ssm.create_model("vssd_micro", **options).stages
        return [type(stage.blocks[0].mixer).__name__ for stage in stages]

    assert mixers() == ["NonCausalSSD"] * 3 + ["AttentionScan"]
    assert mixers(scan="multi_direction") == ["MultiDirectionScan"] * 3 + ["AttentionScan"]
    assert mixers(scan=False) == ["NoneType"] * 3 + ["AttentionScan"]
    assert mixers(mixers=("attention", "ssd", "ssd", "ssd")) == ["AttentionScan"] + ["NonCausalSSD"] * 3
    model = vision_ssm.create_model("vssd_micro", scan=dict(groups="heads", order="raster"))
    assert [stage.blocks[0].mixer.groups for stage in model.stages[:3]] == [1, 2, 4]
    assert {stage.blocks[0].mixer.state_dim for stage in model.stages[:3]} == {8}


def test_weights_of_both_trainings_are_known():
    for size in ("tiny", "small", "base"):
        published = VSSD.published[f"vssd_{size}"]
        (mesa,) = published["also"]
        assert mesa["url"].endswith(f"/vssd_{size}_e300_with_mesa.pth") and mesa["top1_reported"] > published["top1_reported"]
    assert "also" not in VSSD.published["vssd_micro_d48"]


def test_drop_path_rises_over_all_blocks():
    model = vision_ssm.create_model("vssd_micro", drop_path_rate=0.3)
    assert [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("size,cells", [((65, 98), (17, 25)), ((32, 33), (8, 9))])
def test_patch_stem_keeps_every_pixel(size, cells):
    model = vision_ssm.create_model("vssd_micro", stem="patch", downsample="conv", num_classes=2).eval()
    x = torch.randn(1, 3, *size, requires_grad=True)
    assert model.forward_intermediates(x, (0,))[0].shape[2:] == cells
    model(x).sum().backward()
    assert x.grad[..., -1, -1].abs().sum() > 0
    other = vision_ssm.create_model("vssd_micro", stem="patch", downsample="conv", num_classes=2)
    assert vision_ssm.weights.load_state_dict(other, model.state_dict()).complete


def test_only_its_own_keys_are_recognised():
    for family in sorted(path.name for path in golden_cases.ROOT.iterdir() if path.name != "ops"):
        for name in golden_cases.names(family):
            assert VSSD.recognises(set(golden_cases.load(name)["state_dict"])) == (family == "vssd"), name
    for name in vision_ssm.list_models("*_micro"):
        assert VSSD.recognises(set(vision_ssm.create_model(name).state_dict())) == (name == "vssd_micro"), name


def test_import_of_a_dense_backbone_without_norms():
    case = golden_cases.load("vssd/vssd_mini_simple_64x96")
    weights = golden_cases.weights(case)
    dense = {key: value for key, value in weights.items() if not key.startswith(("norm.", "head.", "layers.3."))}
    model = vision_ssm.import_official("vssd", {**case["config"], "out_indices": (0, 2)}, dense)
    classifier = vision_ssm.import_official("vssd", case["config"], weights)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, stages = model(x), classifier.forward_intermediates(x)
    for i, feature in zip((0, 2), maps, strict=True):
        torch.testing.assert_close(feature, stages[i])


@pytest.mark.parametrize(
    "config,expected",
    [
        (dict(ssd_ngroups=-1), dict(groups="heads", order="none")),
        (dict(linear_attn_duality=False, bidirection=True, ssd_ngroups=2), dict(groups=2, order="bidirectional")),
        (dict(bidirection=True), dict(order="none")),  # read by the causal form alone
        (dict(ssd_positve_dA=False, ssd_expand=3), dict(positive_weights=False, expand=2)),
        (dict(pretrained="weights.pth", key="model_ema"), dict(groups=1)),  # which file the dense original starts from
    ],
)
def test_official_switches(config, expected):
    scan = VSSD.from_official_config(config, set())["scan"]
    assert {key: scan[key] for key in expected} == expected
    build_scan(scan, 64)


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(embed_dims=32), "unknown hyperparameters of an original VSSD: embed_dims. Did you mean 'embed_dim'"),
        (dict(attn_types=["mamba2", "mamba"]), "unknown attn_types entry 'mamba' of an original VSSD. Did you mean 'mamba2'"),
        (dict(patch_size=8), "patch_size of an original VSSD is 4, got 8"),
        (dict(conv_init=0.1), "conv_init=0.1 never worked in the original"),
        (dict(learnable_init_states=True), "no published model learns initial states"),
    ],
)
def test_wrong_official_configs(config, message):
    with pytest.raises(ValueError, match=message):
        VSSD.from_official_config(config, set())


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(stem="residal"), "unknown stem 'residal'. Did you mean 'residual'"),
        (dict(downsample="inverse"), "unknown downsample 'inverse'. Did you mean 'inverted'"),
        (dict(mixers=("ssd", "ssd", "ssd", "attn")), "unknown mixer 'attn'"),
        (dict(heads=(1, 2)), "one entry per stage"),
    ],
)
def test_wrong_models(options, message):
    with pytest.raises(ValueError, match=message):
        vision_ssm.create_model("vssd_micro", **options)


def test_originals_without_a_classifier_and_of_fewer_stages():
    case = golden_cases.load("vssd/vssd_mini_simple_64x96")
    weights = golden_cases.weights(case)
    image = golden_cases.images(case["input"])
    whole = vision_ssm.import_official("vssd", case["config"], weights)
    headless = {key: value for key, value in weights.items() if not key.startswith("head.")}
    model = vision_ssm.import_official("vssd", {**case["config"], "num_classes": 0, "ape": False}, headless)
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(image), pre_logits=True)
        torch.testing.assert_close(model(image), expected)
    given = VSSD.from_official_config(dict(depths=[1, 1, 1]), set())
    assert (given["heads"], given["mixers"]) == ([2, 4, 8], ["ssd"] * 3)


@pytest.mark.parametrize("name", ["vssd_micro", "groupmamba_micro"])
def test_no_images(name):
    model = vision_ssm.create_model(name, num_classes=3).eval()
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 3)

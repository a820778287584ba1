"""LBVim: the mixer, alternating directions, the attention head, dense maps, conversion of weights."""

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm import CheckpointError, create_model, import_official
from vision_ssm.analysis import count_macs
from vision_ssm.backbones.lbvim import LBVim
from vision_ssm.layers import AttentionHead
from vision_ssm.ops import local_selective_scan
from vision_ssm.registry import BACKBONES
from vision_ssm.scans import build_scan
from vision_ssm.scans.sequence import TokenLayout
from vision_ssm.weights import load_state_dict

CASE = golden_cases.load("lbvim/lbvim_micro_96x160")
DENSE = golden_cases.load("lbvim/lbvim_micro_dense_160x256")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_mixer(window, reverse):
    """The strategy against the operator on (B, D, L) sequences; windows begin where the walk begins."""
    mixer = build_scan(dict(type="local_bidirectional", window=window, reverse=reverse, state_dim=3), 16).double()
    u = torch.randn(2, 10, 16).double()
    x, z = mixer.in_proj(u.flip(1) if reverse else u).mT.chunk(2, dim=1)  # each (B, D, L)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), mixer.conv.weight, mixer.conv.bias, groups=32))
    core = mixer.core
    low_rank, b, c = torch.einsum("pd,bdl->bpl", core.x_proj_weight[0], x).split([1, 3, 3], dim=1)
    step = torch.einsum("dr,brl->bdl", core.dt_proj_weight[0], low_rank)
    decay = -core.A_log[0].exp()
    y = local_selective_scan(x, step, decay, b, c, core.D[0], z, core.dt_proj_bias[0], True, 4 if window is None else window)
    want = mixer.out_proj(y.mT)
    got = mixer.scan_tokens(u, TokenLayout(2, 5))
    torch.testing.assert_close(got, want.flip(1) if reverse else want)
    torch.testing.assert_close(mixer(u.unflatten(1, (2, 5))).flatten(1, 2), got)


def test_every_other_block_walks_from_the_end():
    """As if both streams were reversed behind every block."""
    model = create_model("lbvim_micro").double().eval()
    same = create_model("lbvim_micro", alternate=False).double().eval()
    same.load_state_dict(model.state_dict())
    assert [block.mixer.core.reverse for block in model.stages] == [False, True, False, True]
    assert not any(block.mixer.core.reverse for block in same.stages)
    stream, h = None, torch.randn(1, 3, 5, 32).double()
    got, branch = h, None
    with torch.no_grad():
        for ours, theirs in zip(model.stages, same.stages):
            got, branch = ours(got, branch)
            stream = h if stream is None else stream + h
            h = theirs.mixer(theirs.norm1(stream))
            stream, h = stream.flip(1, 2), h.flip(1, 2)
    torch.testing.assert_close(got, stream)  # an even number of blocks: both are in raster order
    torch.testing.assert_close(branch[0], h)


def test_options_of_blocks_are_for_the_own_strategy_alone():
    model = create_model("lbvim_micro", scan="multi_direction")
    assert all(block.mixer.core.routes.num_routes == 4 for block in model.stages)
    fixed = create_model("lbvim_micro", scan=dict(window=5))
    assert [(block.mixer.core.window, block.mixer.core.state_dim) for block in fixed.stages] == [(5, 4)] * 4


def test_attention_head():
    head = AttentionHead(12, 5, 3).double()
    tokens = torch.randn(2, 7, 12).double()
    keys, values = head.kv(tokens).chunk(2, dim=-1)
    parts = []
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        weights = (keys[..., part] @ head.latent[0, 0, part] / 2).softmax(1)  # over the root of 4 channels
        parts.append((weights[..., None] * values[..., part]).sum(1))
    want = head.norm(torch.cat(parts, dim=-1))
    torch.testing.assert_close(head.pool(tokens), want)
    torch.testing.assert_close(head(head.pool(tokens)), head.fc(want))
    assert head.latent.abs().max() <= 2 * 12**-0.5 and not head.kv.bias.any()
    with pytest.raises(ValueError, match="5 heads for 12 channels"):
        AttentionHead(12, 3, 5)


def test_attention_head_in_the_model():
    model = create_model("lbvim_micro", attention_heads=4, num_classes=6).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, model.head.pool(features.flatten(2).mT))
        torch.testing.assert_close(model(x), model.head.fc(pooled))
    other = create_model("lbvim_micro", attention_heads=4, num_classes=9)
    report = load_state_dict(other, model.state_dict(), reset_head=True)
    assert report.ignored == {"classifier of another size, re-initialised": ["head.fc.weight", "head.fc.bias"]}
    assert torch.equal(other.head.latent, model.head.latent)
    dense = create_model("lbvim_micro", features_only=True)
    assert load_state_dict(dense, model.state_dict()).complete
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(2)
    assert isinstance(model.head, AttentionHead) and model(x).shape == (2, 2)
    assert model.classifier_key in model.state_dict()


def importing(case, changes=(), renamed=lambda weights: weights):
    return import_official("lbvim", {**case["config"], **dict(changes)}, renamed(golden_cases.weights(case)))


def with_projections(weights):
    """Output norms numbered 0 and 1, behind projections to 24 channels."""
    kept = {key: value for key, value in weights.items() if not key.startswith("outnorm_")}
    for i in range(2):
        kept |= {f"out_map_{i}.weight": torch.randn(24, 48), f"out_map_{i}.bias": torch.full((24,), float(i))}
        kept |= {f"outnorm_{i}.weight": torch.ones(24), f"outnorm_{i}.bias": torch.zeros(24)}
    return kept


@pytest.mark.parametrize("numbers", [(0, 1), (1, 3)])
def test_dense_maps_with_projections(numbers):
    """Numbers of output norms count them, or are those of their blocks."""

    def renamed(weights):
        weights = with_projections(weights)
        places = {f"_{i}.": f"_{number}." for i, number in enumerate(numbers)}
        return {
            next((key.replace(old, new) for old, new in places.items() if key.startswith("out") and old in key), key): value
            for key, value in weights.items()
        }

    model = importing(DENSE, dict(out_indices=[1, 3], out_dim=24), renamed)
    assert [info["num_chs"] for info in model.out_info] == [24, 24]
    assert list(model.out_norms) == ["1", "3"] and model.out_norms["3"][0].bias[0].item() == 1
    raw = importing(DENSE)
    x = golden_cases.images(DENSE["input"])
    with torch.no_grad():
        got = model(x)
        maps, _ = raw._walk(x, (1, 3))
        want = [model.out_norms[key](maps[int(key)]).permute(0, 3, 1, 2) for key in ("1", "3")]
    torch.testing.assert_close(got, want)


def test_windows():
    """A fixed window, the published rule, and no look ahead at all."""
    assert importing(CASE).stages[0].mixer.core.window is None
    assert importing(CASE, dict(local_window=8)).stages[0].mixer.core.window == 8
    assert importing(CASE, dict(lbm=False)).stages[0].mixer.core.window == 1
    x = golden_cases.images(CASE["input"])
    with torch.no_grad():  # 60 cells: the rule is 4
        rule, four, eight = (importing(CASE, dict(local_window=window))(x) for window in (None, 4, 8))
    assert torch.equal(rule, four) and not torch.allclose(rule, eight, atol=1e-3)


def test_class_token():
    weights = golden_cases.weights(CASE)
    token = torch.randn(1, 1, 48)
    weights |= {"cls_token": token, "pos_embed": torch.cat([weights["pos_embed"], token], dim=1)}
    config = {**CASE["config"], "if_cls_token": True, "use_middle_cls_token": True}
    model = import_official("lbvim", config, weights)
    assert model.class_tokens == "middle" and torch.equal(model.cls_token.positions[0, 0], weights["pos_embed"][0, 30])
    assert model(torch.randn(1, 3, 96, 160)).shape == (1, 1000)


def test_two_class_tokens_side_by_side():
    weights = golden_cases.weights(CASE)
    tokens = {f"cls_token_{end}": torch.randn(1, 1, 48) for end in ("head", "tail")}
    weights |= {**tokens, "pos_embed": torch.randn(1, 62, 48), "head.weight": torch.randn(1000, 96)}
    config = {**CASE["config"], "if_cls_token": True, "use_double_cls_token": True}
    model = import_official("lbvim", config, weights)
    features = torch.randn(2, 62, 48)
    # three blocks, behind each of which the original reverses the sequence: it reads the places of a reversed one
    want = F.linear(torch.cat([features[:, -1], features[:, 0]], dim=1), weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(model.forward_head(features), want)
    assert model(torch.randn(1, 3, 96, 160)).shape == (1, 1000)
    even = vision_ssm.create_model("lbvim_micro", class_tokens="first", num_classes=3)
    features = torch.randn(2, 17, 32)
    torch.testing.assert_close(even.pool(features), features[:, 0])


def with_both_directions(weights, blocks):
    pairs = {"A_b_log": "A_log", "D_b": "D"}
    pairs |= {f"{layer}_b.{leaf}": f"{layer}.{leaf}" for layer in ("conv1d", "dt_proj") for leaf in ("weight", "bias")}
    pairs["x_proj_b.weight"] = "x_proj.weight"
    names = {f"layers.{i}.mixer.{new}": weights[f"layers.{i}.mixer.{old}"].shape for i in blocks for new, old in pairs.items()}
    return weights | {name: golden_cases.tensor_for(name, shape) for name, shape in names.items()}


@pytest.mark.parametrize(
    "change,first",
    [(dict(last_n_layer_vim=2), 1), (dict(bimamba_type="v2"), 0), (dict(last_n_layer_vim=1, if_divide_out=False), 2)],
)
def test_blocks_of_both_directions(change, first):
    """One direction looks ahead in windows, the other, with parameters of its own, is a plain scan."""
    model = importing(CASE, change, lambda weights: with_both_directions(weights, range(first, 3))).double()
    assert [block.mixer.other_core is not None for block in model.stages] == [i >= first for i in range(3)]
    assert LBVim.recognises(set(model.state_dict()))
    weights, mixer = with_both_directions(golden_cases.weights(CASE), range(first, 3)), model.stages[2].mixer
    u = torch.randn(1, 10, 48).double()
    of = {key.removeprefix("layers.2.mixer."): w.double() for key, w in weights.items() if key.startswith("layers.2.mixer.")}
    x, z = (u @ of["in_proj.weight"].T).mT.chunk(2, dim=1)  # each (B, D, L)
    y = 0
    for end, flipped, window in (("", x, 4), ("_b", x.flip(2), 1)):
        v = F.silu(F.conv1d(F.pad(flipped, (3, 0)), of[f"conv1d{end}.weight"], of[f"conv1d{end}.bias"], groups=96))
        low_rank, b, c = torch.einsum("pd,bdl->bpl", of[f"x_proj{end}.weight"], v).split([3, 16, 16], dim=1)
        step = torch.einsum("dr,brl->bdl", of[f"dt_proj{end}.weight"], low_rank)
        decay = -of["A_b_log" if end else "A_log"].exp()
        part = local_selective_scan(v, step, decay, b, c, of[f"D{end}"], None, of[f"dt_proj{end}.bias"], True, window)
        y = y + (part.flip(2) if end else part)
    want = ((y if "if_divide_out" in change else y / 2) * F.silu(z)).mT @ of["out_proj.weight"].T
    torch.testing.assert_close(mixer.scan_tokens(u, TokenLayout(2, 5)), want)


@pytest.mark.parametrize("class_tokens", ["none", "first"])
def test_rotary_positions_count_along_the_walk(class_tokens):
    """The original reverses the tokens and turns them by a table that it does not reverse."""
    model = create_model("lbvim_micro", rotary="branch", class_tokens=class_tokens).double().eval()
    x, layout, size = model.embed(torch.randn(1, 3, 64, 96).double())
    tokens, layout_of_all = x.reshape(1, -1, 32), layout or TokenLayout(*size)

    def turn(tokens):
        patches, others = layout_of_all.split(tokens)
        return layout_of_all.join(model.rotary(patches.unflatten(1, size)).flatten(1, 2), others)

    even, odd = (model.turn(i, x, layout).reshape(tokens.shape) for i in (0, 1))
    torch.testing.assert_close(even, turn(tokens))
    torch.testing.assert_close(odd, turn(tokens.flip(1)).flip(1))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(embed_dims=48), "unknown hyperparameters of an original LBVim: embed_dims. Did you mean 'embed_dim'"),
        (dict(bimamba_type="v1"), "bimamba_type of an original LBVim is 'none' or 'v2', got 'v1'"),
        (dict(if_bidirectional=True), "original LBVims have if_bidirectional=False, all that are registered; got True"),
        (dict(last_n_layer_vim=4), "full_blocks must be a part of the 3 blocks, got 4"),
        (dict(head_type="mlp"), "head_type of an original LBVim is None or 'att_qkv"),
        (dict(local_window={"else": 4}), "local_window is a number, None or the published rule"),
    ],
)
def test_wrong_hyperparameters(change, message):
    with pytest.raises(ValueError, match=message):
        importing(CASE, change)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(scan=dict(window=0)), "window is a positive whole number or None, got 0"),
        (dict(scan=dict(expand=0.0)), r"expand \* dim must be at least 1"),
        (dict(pairs=True), "side by side are Vim's"),
        (dict(attention_heads=5), "5 heads for 32 channels"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("lbvim_micro", **options)


def test_initial_values():
    model = create_model("lbvim_micro", dim=64, depth=8)
    core = model.stages[1].mixer.core
    steps = F.softplus(core.dt_proj_bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 0.1 * 1.01
    torch.testing.assert_close(core.A_log.exp(), torch.arange(1.0, 5).expand(1, 128, 4))
    assert 0.8 < model.stages[1].mixer.out_proj.weight.abs().max() * (128 * 8) ** 0.5 <= 1


def test_recognises_its_own_alone():
    for family in golden_cases.ROOT.iterdir():
        for name in golden_cases.names(family.name) if family.name != "ops" else ():
            expected = family.name == "lbvim"
            assert LBVim.recognises(set(golden_cases.load(name)["state_dict"])) is expected, name
    for cls in BACKBONES.module_dict.values():
        for name in cls.variants:
            if name.endswith("_micro"):
                assert LBVim.recognises(set(create_model(name).state_dict())) is (cls is LBVim), name


def test_macs_count_both_scans():
    """Per step and channel: the look ahead costs as much as a scan without skip connection."""
    narrow, plain = (count_macs(lambda window=window: create_model("lbvim_micro", scan=dict(window=window)), 64) for window in (4, 1))
    assert narrow - plain == 4 * 16 * 64 * 9 * 4  # blocks, steps, channels, operations, states
    one_way = dict(directions="forward", average=False)
    vim = count_macs(lambda: create_model("vim_micro", scan=one_way, class_tokens="none"), 64)
    assert plain == vim


def test_names():
    assert vision_ssm.list_models("lbvim_*") == ["lbvim_300", "lbvim_528", "lbvim_micro", "lbvim_small", "lbvim_tiny"]
    with pytest.raises(ValueError, match="no official weights are published"):
        create_model("lbvim_tiny", pretrained=True)


def test_layer_norms_begin_with_the_weights_of_rms_norms():
    """As the originals' segmentation does."""
    given = vision_ssm.create_model("lbvim_micro").state_dict()
    model = vision_ssm.create_model("lbvim_micro", features_only=True, norm="layer")
    report = load_state_dict(model, given)
    rule = "biases of layer norms, which RMS norms do not have, as they were"
    assert report.complete and report.ignored[rule] == [f"stages.{i}.norm1.bias" for i in range(4)]
    torch.testing.assert_close(model.stages[1].norm1.weight, given["stages.1.norm1.weight"])
    partly = {**model.state_dict()}
    del partly["stages.2.norm1.bias"]
    with pytest.raises(CheckpointError, match="missing from the file: stages.2.norm1.bias"):
        load_state_dict(model, partly)

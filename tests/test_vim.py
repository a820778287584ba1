"""Vim: the mixer against its golden case, forms of the backbone, conversion of weights, initial values."""

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm import CheckpointError, create_model, import_official
from vision_ssm.backbones.vim import PairBlock, Vim, stack_directions
from vision_ssm.registry import BACKBONES
from vision_ssm.scans import build_scan
from vision_ssm.scans.sequence import TokenLayout
from vision_ssm.weights import load_state_dict

MIXER = golden_cases.load("ops/vim_mixer")
CASE = golden_cases.load("vim/vim_micro_headcls")
DENSE = golden_cases.load("vim/vim_seg_micro_96")
SIZES = dict(state_dim=3, dt_rank=2)


def mixer_weights():
    return {key: golden_cases.tensor_for(key, shape).double() for key, shape, _ in MIXER["state_dict"]}


def under_our_names(weights):
    stacked = stack_directions({f"stages.0.mixer.{key}": value for key, value in weights.items()})
    return {key.removeprefix("stages.0.mixer."): value for key, value in stacked.items()}


def test_golden_mixer():
    mixer = build_scan(dict(type="bidirectional", average=True, **SIZES), 4).double()
    mixer.load_state_dict(under_our_names(mixer_weights()))
    x = torch.tensor(MIXER["x"]).double().requires_grad_()
    y = mixer.scan_tokens(x, TokenLayout(1, x.shape[1]))
    (y * torch.tensor(MIXER["grad_output"]).double()).sum().backward()
    torch.testing.assert_close(y, torch.tensor(MIXER["output"]).double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad, torch.tensor(MIXER["grad_x"]).double(), rtol=1e-6, atol=1e-7)


def convolve(weights, x, suffix=""):
    """Causal convolution of (B, D, T) and SiLU."""
    kernel, bias = weights[f"conv1d{suffix}.weight"], weights[f"conv1d{suffix}.bias"]
    return F.silu(F.conv1d(F.pad(x, (3, 0)), kernel, bias, groups=x.shape[1]))


def scan(weights, x, decay, suffix=""):
    """Mamba's scan of a convolved (B, D, T) sequence, step by step."""
    low_rank, b, c = torch.einsum("pd,bdt->bpt", weights[f"x_proj{suffix}.weight"], x).split([2, 3, 3], dim=1)
    bias = weights[f"dt_proj{suffix}.bias"][:, None]
    step = F.softplus(torch.einsum("dr,brt->bdt", weights[f"dt_proj{suffix}.weight"], low_rank) + bias)
    state, outputs = x.new_zeros(*x.shape[:2], 3), []
    for t in range(x.shape[2]):
        d = step[:, :, t, None]
        state = torch.exp(-d * weights[decay].exp()) * state + d * b[:, None, :, t] * x[:, :, t, None]
        outputs.append((state * c[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1) + weights[f"D{suffix}"][:, None] * x


@pytest.mark.parametrize("directions", ["both", "shared", "forward", "backward"])
def test_directions(directions):
    """Every form of the mixer against a plain loop; only the first is published."""
    weights = mixer_weights()
    behind = ("A_b_log", "D_b", "conv1d_b", "x_proj_b", "dt_proj_b")
    if directions != "both":
        kept = ("A_b_log",) if directions == "shared" else ()
        weights = {key: value for key, value in weights.items() if key in kept or not key.startswith(behind)}
    mixer = build_scan(dict(type="bidirectional", directions=directions, **SIZES), 4).double()
    mixer.load_state_dict(under_our_names(weights))
    u = torch.randn(2, 6, 4).double()
    x, z = (u @ weights["in_proj.weight"].T).mT.chunk(2, dim=1)  # each (B, D, T)
    if directions == "backward":
        y = scan(weights, convolve(weights, x.flip(2)), "A_log").flip(2)
    else:
        y = scan(weights, convolve(weights, x), "A_log")
    if directions == "both":
        y = y + scan(weights, convolve(weights, x.flip(2), "_b"), "A_b_log", "_b").flip(2)
    elif directions == "shared":  # what was convolved forwards is scanned backwards
        y = y + scan(weights, convolve(weights, x).flip(2), "A_b_log").flip(2)
    want = (y * F.silu(z)).mT @ weights["out_proj.weight"].T
    torch.testing.assert_close(mixer.scan_tokens(u, TokenLayout(2, 3)), want)
    torch.testing.assert_close(mixer(u.unflatten(1, (2, 3))), want.unflatten(1, (2, 3)))


def test_layer_scale_is_a_factor_of_the_output():
    plain = build_scan("bidirectional", 16)
    scaled = build_scan(dict(type="bidirectional", layer_scale=0.25), 16)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 2, 3, 16)
    torch.testing.assert_close(scaled(x), plain(x) / 4)


def test_middle_class_token_of_a_grid_of_3_x_4():
    layout = TokenLayout(3, 4, "middle")
    tokens = layout.join(torch.arange(12.0).view(1, 12, 1), torch.full((1, 1, 1), -1.0)).flatten().tolist()
    assert layout.positions == (6,) and tokens == [0, 1, 2, 3, 4, 5, -1, 6, 7, 8, 9, 10, 11]


def test_pairs_add_both_streams_and_both_outputs():
    model = create_model("vim_micro", pairs=True, class_tokens="none").double().eval()
    assert len(model.stages) == 2 and all(isinstance(block, PairBlock) for block in model.stages)
    assert [repr(block.second.mixer.core.routes) for block in model.stages] == ["Reversed(of=Raster())"] * 2
    x = torch.randn(1, 2, 3, 32).double()
    stream, branch = x, 0
    for pair in model.stages:
        stream = stream + branch
        branch = pair.first.mixer(pair.first.norm1(stream)) + pair.second.mixer(pair.second.norm1(stream))
        stream = 2 * stream
    got, entering = x, None
    for i in range(2):
        got, entering = model.run_block(i, got, entering, None)
    torch.testing.assert_close(got, stream)
    torch.testing.assert_close(entering[0], branch)


@pytest.mark.parametrize("rotary", ["branch", "stream"])
@pytest.mark.parametrize("class_tokens", ["none", "first"])
def test_rotary_positions_turn_what_enters_a_block(rotary, class_tokens):
    model = create_model("vim_micro", rotary=rotary, class_tokens=class_tokens).double().eval()
    x, layout, size = model.embed(torch.randn(1, 3, 64, 96).double())
    layout = layout or TokenLayout(*size)
    with torch.no_grad():
        got, entering = x, None
        for i in range(2):
            got, entering = model.run_block(i, got, entering, layout if class_tokens == "first" else None)

        def turn(tokens):
            patches, others = layout.split(tokens)
            return layout.join(model.rotary(patches.unflatten(1, size)).flatten(1, 2), others)

        stream, branch = turn(x.reshape(1, -1, 32)), 0
        for i in range(2):
            if i:
                stream = (turn(stream) if rotary == "stream" else stream) + turn(branch)
            branch = model.stages[i].mixer.scan_tokens(model.stages[i].norm1(stream), layout)
    torch.testing.assert_close(got.reshape(stream.shape), stream)
    torch.testing.assert_close(entering[0].reshape(branch.shape), branch)


def test_initial_values():
    torch.manual_seed(0)
    model = create_model("vim_micro", dim=64, depth=8, num_classes=500)
    mixer = model.stages[3].mixer
    steps = F.softplus(mixer.core.dt_proj_bias)
    assert 1e-3 * 0.99 <= steps[0].min() and steps[0].max() <= 0.1 * 1.01
    assert not mixer.core.dt_proj_bias[1].any(), "the original zeroes the biases of the second direction"
    torch.testing.assert_close(mixer.core.A_log.exp(), torch.arange(1.0, 5).expand(2, 128, 4))
    assert torch.equal(mixer.core.D, torch.ones(2, 128))
    assert 0.8 * 64**-0.5 < mixer.in_proj.weight.abs().max() <= 64**-0.5  # PyTorch's own
    assert 0.8 < mixer.out_proj.weight.abs().max() * (128 * 8) ** 0.5 <= 1  # divided by the root of the depth
    assert 0.015 < model.head.weight.std() < 0.025 and not model.head.bias.any() and not model.stem.conv.bias.any()
    assert 0.8 < model.stem.conv.weight.std() * (3 * 16 * 16) ** 0.5 < 1.2
    model.reset_classifier(300)
    assert 0.015 < model.head.weight.std() < 0.025 and not model.head.bias.any()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in create_model("vim_small", num_classes=0).stages]
    assert rates == pytest.approx([0.05 * i / 23 for i in range(24)])


def importing(case, changes=(), renamed=lambda weights: weights):
    return import_official("vim", {**case["config"], **dict(changes)}, renamed(golden_cases.weights(case)))


def test_class_tokens_of_a_file_keep_their_rows():
    """The first row of positions belongs to a first token, that in the middle to one in the middle."""
    weights = golden_cases.weights(CASE)
    first, middle = (importing(CASE, dict(use_middle_cls_token=middle)) for middle in (False, True))
    rows = weights["pos_embed"][0]
    assert torch.equal(first.cls_token.positions[0, 0], rows[0])
    assert torch.equal(first.pos_embed.table[0, :, 0, 0], rows[1])
    assert torch.equal(middle.cls_token.positions[0, 0], rows[12])
    assert torch.equal(middle.pos_embed.table[0].flatten(1).T, torch.cat([rows[:12], rows[13:]]))
    assert middle.pos_embed.table.shape == (1, 48, 4, 6)


def test_two_class_tokens():
    def renamed(weights):
        token = weights.pop("cls_token")
        rows = torch.cat([weights["pos_embed"], 2 * token], dim=1)
        return {**weights, "cls_token_head": token, "cls_token_tail": -token, "pos_embed": rows}

    model = importing(CASE, dict(use_double_cls_token=True), renamed)
    token = golden_cases.weights(CASE)["cls_token"]
    assert torch.equal(model.cls_token.tokens, torch.cat([token, -token], dim=1))
    assert torch.equal(model.cls_token.positions[:, 1:], 2 * token)
    features = torch.randn(2, 26, 48)
    torch.testing.assert_close(model.pool(features), (features[:, 0] + features[:, -1]) / 2)


def official_of(model):
    """A state dict of ours under the original's names, of a model with a class token in the middle."""
    names = {"core.A_log": ("A_log", "A_b_log"), "core.D": ("D", "D_b")}
    names |= {"core.x_proj_weight": ("x_proj.weight", "x_proj_b.weight")}
    names |= {f"core.dt_proj_{leaf}": (f"dt_proj.{leaf}", f"dt_proj_b.{leaf}") for leaf in ("weight", "bias")}
    official, ours = {}, model.state_dict()
    for key, value in ours.items():
        prefix, _, leaf = key.partition(".mixer.")
        if leaf in names:
            for name, part in zip(names[leaf], value):
                official[f"{prefix.replace('stages', 'layers')}.mixer.{name}"] = part
            continue
        key = key.replace("stages.", "layers.").replace("stem.conv.", "patch_embed.proj.").replace("norm1", "norm")
        key = key.replace("convs.0", "conv1d").replace("convs.1", "conv1d_b").replace("cls_token.tokens", "cls_token")
        official["norm_f.weight" if key == "norm.weight" else key] = value
    patches = official.pop("pos_embed.table").flatten(2).mT
    layout = TokenLayout(1, patches.shape[1], "middle")
    official["pos_embed"] = layout.join(patches, official.pop("cls_token.positions"))
    return official


def test_positions_of_another_grid_are_resampled_without_their_class_token():
    """The file of a stride of 16 starts the fine-tuning of a stride of 8."""
    coarse, fine = (create_model("vim_micro", stride=stride, num_classes=5) for stride in (16, 8))
    official = official_of(coarse)
    assert official["pos_embed"].shape == (1, 17, 32)
    report = load_state_dict(fine, official)
    assert report.complete and fine.pos_embed.table.shape == (1, 32, 7, 7)
    assert torch.equal(fine.cls_token.positions, coarse.cls_token.positions)
    dense = create_model("vim_micro", features_only=True, class_tokens="none", pyramid=True)
    ignored = load_state_dict(dense, official, strict=False).ignored
    assert ignored["class tokens of a model without them"] == ["cls_token.tokens", "cls_token.positions"]
    assert torch.equal(dense.pos_embed.table, coarse.pos_embed.table)


def test_positions_that_fit_no_grid():
    weights = golden_cases.weights(CASE)
    with pytest.raises(ValueError, match="pos_embed has 24 rows for patches: neither this model's grid nor a square"):
        import_official("vim", {**CASE["config"], "img_size": 96}, weights)


def test_pairs_of_bidirectional_mixers():
    """The second block of a pair sees the sequence, class token included, from its end."""
    model = importing(CASE, dict(if_bidirectional=True, use_middle_cls_token=False)).double()
    plain = importing(CASE).double()
    x = torch.randn(1, 25, 48).double()
    stream, (branch, _) = model.run_block(0, x, None, TokenLayout(4, 6, "first"))
    first, second = (
        block.mixer.scan_tokens(block.norm1(tokens), TokenLayout(1, 25))
        for block, tokens in zip(plain.stages, (x, x.flip(1)))
    )
    torch.testing.assert_close(stream, 2 * x)
    torch.testing.assert_close(branch, first + second.flip(1))


def test_class_tokens_without_positions():
    def renamed(weights):
        return {key: value for key, value in weights.items() if key != "pos_embed"}

    model = importing(CASE, dict(if_abs_pos_embed=False), renamed)
    assert model.pos_embed is None and model.cls_token.positions is None
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert torch.equal(model.cls_token.tokens, golden_cases.weights(CASE)["cls_token"])
    assert torch.isfinite(model(golden_cases.images(CASE["input"]))).all()


def test_names_of_the_original_that_change_nothing():
    names = dict(channels=3, ft_seq_len=None, if_devide_out=False, drop_rate=0.1, use_checkpoint=True)
    assert importing(CASE, names).stages[0].mixer.average is CASE["config"]["if_divide_out"]
    assert importing(CASE, dict(channels=1), lambda w: w | {"patch_embed.proj.weight": torch.randn(48, 1, 16, 16)}).in_chans == 1


def test_forms_of_the_mixer_that_were_never_published():
    """Shared parameters (v1), one direction, pairs, layer scale: their weights are converted and used."""
    behind = (".D_b", ".conv1d_b", ".x_proj_b", ".dt_proj_b")

    def without(parts):
        return lambda weights: {key: value for key, value in weights.items() if not any(p in key for p in parts)}

    shared = importing(CASE, dict(bimamba_type="v1"), without(behind))
    assert shared.stages[0].mixer.core.A_log.shape == (2, 96, 16) and shared.stages[0].mixer.core.D.shape == (1, 96)
    single = importing(CASE, dict(bimamba_type="none"), without((*behind, "A_b_log")))
    pairs = importing(CASE, dict(bimamba_type="none", if_bidirectional=True), without((*behind, "A_b_log")))
    assert torch.equal(single.stages[1].norm1.weight, pairs.stages[0].second.norm1.weight)

    def with_scales(weights):
        return weights | {f"layers.{i}.mixer.gamma": torch.full((48,), 0.5) for i in range(2)}

    scaled = importing(CASE, dict(init_layer_scale=0.1), with_scales)
    assert torch.equal(scaled.stages[1].mixer.layer_scale, torch.full((48,), 0.5))
    with torch.no_grad():
        logits = [m(golden_cases.images(CASE["input"])) for m in (importing(CASE), shared, single, pairs, scaled)]
    assert all(torch.isfinite(x).all() for x in logits)
    assert all((a - b).std() > 0.1 for i, a in enumerate(logits) for b in logits[:i])


def test_rotary_positions_of_the_original_skip_the_first_token():
    """Even if the class token stands in the middle."""
    model = importing(CASE, dict(if_rope=True, use_middle_cls_token=True))
    x = torch.randn(1, 25, 48)
    turned = model.turn(0, x, TokenLayout(4, 6, "middle"))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned[:, 1:], model.rotary(x[:, 1:].unflatten(1, (4, 6))).flatten(1, 2))
    with pytest.raises(ValueError, match="for one class token at most, not for two"):
        importing(
            CASE,
            dict(if_rope=True, use_double_cls_token=True),
            lambda weights: weights | {f"cls_token_{end}": torch.zeros(1, 1, 48) for end in ("head", "tail")},
        )


def test_rotary_tables_of_a_file_are_computed():
    def with_tables(weights):
        return weights | {f"rope.freqs_{name}": torch.zeros(24, 48) for name in ("cos", "sin")}

    model = importing(CASE, dict(if_rope=True, if_rope_residual=True), with_tables)
    assert model.rotary.cos.shape == (1, 4, 6, 48) and model.turns_stream
    assert not any("rotary" in key for key in model.state_dict())


def dense_weights(weights):
    return {key: value for key, value in weights.items() if not key.startswith("fpn")}


@pytest.mark.parametrize("end", ["none", "add", "add & norm"])
def test_backbone_for_detection(end):
    """One map: what the last block gives, its sum with the stream, or that normalised."""
    changes = dict(out_indices=None, last_layer_process=end)
    model = importing(DENSE, changes, dense_weights)
    plain = importing(DENSE, dict(last_layer_process="none"), dense_weights)
    x = golden_cases.images(DENSE["input"])
    with torch.no_grad():
        (got,) = model(x)
        stream, branch, _ = plain._walk(x, ())[1]
        want = branch[0] if end == "none" else stream + branch[0]
        if end == "add & norm":
            norm = vision_ssm.layers.get_norm("rms", 48)
            norm.weight.copy_(golden_cases.weights(DENSE)["norm_f.weight"])
            want = norm(want)
    torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


@pytest.mark.parametrize("end", ["none", "add", "add & norm"])
def test_residual_stream_as_features(end):
    """The last block's map is what the original makes of the last mixer's output, as for detection."""
    changes = dict(out_indices=[0, 1, 2, 3], use_residual_as_feature=True, last_layer_process=end)
    model = importing(DENSE, changes, dense_weights)
    (last,) = importing(DENSE, dict(out_indices=None, last_layer_process=end), dense_weights)(x := torch.randn(1, 3, 96, 96))
    maps = model(x)
    torch.testing.assert_close(maps[3], last)
    stream, *branches = importing(DENSE, (), dense_weights)._walk(x, (0, 1, 2))[0].values()
    stream = model.embed(x)[0] + stream
    for i in range(3):
        torch.testing.assert_close(maps[i], stream.permute(0, 3, 1, 2))
        stream = stream + branches[i] if i < 2 else None
    assert end == "add & norm" or not model.norm.weight.requires_grad, "in the state dict, but not used"


def test_pyramid_of_the_original_drops_the_last_row_of_odd_maps():
    weights = golden_cases.weights(DENSE)
    weights["pos_embed"] = golden_cases.tensor_for("pos_embed", [1, 25, 48])
    model = import_official("vim", {**DENSE["config"], "img_size": 80}, weights)
    assert [m.shape[2] for m in model(torch.randn(1, 3, 80, 80))] == [20, 10, 5, 2]
    ours = create_model("vim_micro", features_only=True, pyramid=True, class_tokens="none")
    assert [m.shape[2] for m in ours(torch.randn(1, 3, 80, 80))] == [20, 10, 5, 3]


def test_dense_backbone_whose_class_token_was_dropped():
    """By default the original has a class token, which its dense backbones delete."""
    config = {key: value for key, value in DENSE["config"].items() if key != "if_cls_token"}
    model, want = (import_official("vim", c, golden_cases.weights(DENSE)) for c in (config, DENSE["config"]))
    x = golden_cases.images(DENSE["input"])
    torch.testing.assert_close(model(x), want(x))


@pytest.mark.parametrize(
    "case,change,message",
    [
        (CASE, dict(embed_dims=48), "unknown hyperparameters of an original Vim: embed_dims. Did you mean 'embed_dim'"),
        (CASE, dict(bimamba_type="v3"), "unknown bimamba_type 'v3' of an original Vim. Did you mean"),
        (CASE, dict(bimamba_type="none"), "bimamba_type 'none' of an original Vim does not fit its weights"),
        (CASE, dict(if_rope=True, pt_hw_seq_len=16), "rotary positions span 14 patches, got pt_hw_seq_len=16"),
        (CASE, dict(if_cls_token=False, final_pool_type="max"), "takes the mean, got final_pool_type='max'"),
        (DENSE, dict(last_layer_process="norm"), "last_layer_process is 'none', 'add' or 'add & norm', got 'norm'"),
        (DENSE, dict(use_residual_as_feature=True, out_indices=[0], if_rope=True), "behind the next block's rotary"),
        (DENSE, dict(if_bidirectional=True), "has no dense backbone"),
    ],
)
def test_wrong_hyperparameters(case, change, message):
    with pytest.raises(ValueError, match=message):
        importing(case, change)


def test_weights_of_another_shape():
    with pytest.raises(CheckpointError, match="the given vim state dict does not fit"):
        importing(CASE, dict(d_state=8))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(rotary="both"), "unknown rotary 'both'"),
        (dict(last_source="blocks"), "unknown last_source 'blocks'"),
        (dict(final_norm="keep"), "final_norm='keep' needs features_only=True"),
        (dict(pairs=True, depth=3), "pairs need an even number of blocks, got depth=3"),
        (dict(features_only=True, out_indices=(0,), final_norm="apply"), "needs the last block's map"),
        (dict(scan=dict(directions="left")), "unknown directions 'left'"),
        (dict(scan=dict(directions="forward")), "average is the mean of two directions"),
        (dict(rotary="branch", dim=34), "divisible by 4"),
        (dict(scan=dict(expand=0.0)), r"expand \* dim must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("vim_micro", **options)


def test_recognises_its_own_alone():
    for family in golden_cases.ROOT.iterdir():
        for name in golden_cases.names(family.name) if family.name not in ("ops", "vim") else ():
            assert not Vim.recognises(set(golden_cases.load(name)["state_dict"])), name
    assert all(Vim.recognises(set(golden_cases.load(name)["state_dict"])) for name in golden_cases.names("vim"))
    for cls in BACKBONES.module_dict.values():
        for name in cls.variants:
            if name.endswith("_micro"):
                assert Vim.recognises(set(create_model(name).state_dict())) is (cls is Vim), name
    assert Vim.recognises(set(create_model("vim_micro", pairs=True).state_dict()))


def test_own_weights_with_another_scan_load():
    model, other = (create_model("vim_micro", scan="multi_direction") for _ in range(2))
    assert model.class_tokens == "none", "no place for a class token in a scan of maps"
    assert load_state_dict(other, model.state_dict()).complete
    assert torch.equal(other.stages[0].mixer.in_proj.weight, model.stages[0].mixer.in_proj.weight)


@pytest.mark.parametrize("ema", [True, False])
def test_weights_whose_accuracy_is_published(ema, tmp_path, monkeypatch):
    """Vim's is that of the weights as trained, which lie beside averaged ones."""
    assert not any(published["ema"] for published in Vim.published.values())
    monkeypatch.setitem(Vim.published, "vim_micro", {"ema": ema})
    model, averaged = (create_model("vim_micro", num_classes=3) for _ in range(2))
    torch.save({"model": model.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "file.pth")
    loaded = create_model("vim_micro", num_classes=3, pretrained=tmp_path / "file.pth")
    assert torch.equal(loaded.head.weight, (averaged if ema else model).head.weight)


def test_class_tokens_of_a_classifier_are_not_dropped():
    official = official_of(create_model("vim_micro", num_classes=5))
    with pytest.raises(CheckpointError, match="not in the model: cls_token.tokens, cls_token.positions"):
        load_state_dict(create_model("vim_micro", num_classes=5, class_tokens="none"), official)


def test_a_square_table_of_a_published_file_is_resampled_to_as_many_cells():
    square, wide = create_model("vim_micro", num_classes=5), create_model("vim_micro", num_classes=5, img_size=(32, 128))
    report = load_state_dict(wide, official_of(square))
    assert "resampled, which img_size=... avoids: pos_embed.table from 4 x 4 to 2 x 8" in str(report)
    expected = torch.nn.functional.interpolate(square.pos_embed.table, size=(2, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(wide.pos_embed.table, expected)

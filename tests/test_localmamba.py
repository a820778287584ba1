"""LocalMamba: walks and their inverses, both mixers against the written-out mathematics, rotary tables, weights."""

import re

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.backbones.localmamba import official_directions
from vision_ssm.backbones.localvim import LocalVim
from vision_ssm.backbones.localvmamba import LocalVMamba
from vision_ssm.layers import ChannelGate, RotaryTable
from vision_ssm.ops.reference import selective_scan_reference
from vision_ssm.registry import BACKBONES
from vision_ssm.scans import build_scan
from vision_ssm.scans.sequence import TokenLayout
from vision_ssm.scans.windowed import SEARCHED, DirectionRoutes

ORDERS = golden_cases.load("ops/localmamba_scan_order")["cases"]
MICRO = golden_cases.load("localmamba/localvim_micro_224")


def inverse_of(table, cells: int) -> list[int]:
    """The step whose output lies in each cell."""
    steps = torch.arange(table.write.shape[1])
    return steps.new_empty(cells + 1).scatter(0, table.write[0], steps)[:cells].tolist()


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case['direction']}-{case['H']}x{case['W']}")
def test_golden_walks(case):
    height, width, directions = case["H"], case["W"], official_directions([case["direction"]])
    cells = height * width
    for inverse, expected in (("exact", "inverse"), ("official", "official_reverse")):
        table = DirectionRoutes(directions, inverse).tables(height, width)[0]
        assert [-1 if cell == cells else cell for cell in table.read[0].tolist()] == case["scan"]
        assert inverse_of(table, cells) == case[expected]


def test_windows_of_2_on_3x4():
    reads = DirectionRoutes(("window2", "window2_reversed", "column")).tables(3, 4)[0].read.tolist()
    assert reads[0] == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 12, 10, 11, 12, 12]  # 12: zeros
    assert reads[1] == [12, 12, 11, 10, 12, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0]
    assert reads[2] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11] + [12] * 4  # filled up to the longest


def test_class_tokens_keep_their_place_in_every_walk():
    routes = DirectionRoutes(("raster_reversed", "window2"), class_tokens="middle")
    reads = routes.tables(3, 3)[0].read.tolist()  # 9: the token, 10: zeros
    assert reads[0] == [8, 7, 6, 5, 9, 4, 3, 2, 1, 0] + [10] * 7
    assert reads[1] == [0, 1, 3, 4, 2, 10, 5, 10, 9, 6, 7, 10, 10, 8, 10, 10, 10]
    double = DirectionRoutes(("column",), class_tokens="double").tables(2, 2)[0]
    assert double.read.tolist() == double.write.tolist() == [[4, 0, 2, 1, 3, 5]]
    assert (
        repr(routes)
        == "DirectionRoutes(directions=('raster_reversed', 'window2'), inverse='exact', class_tokens='middle')"
    )


def written_out(mixer, x, height, width, class_tokens="none"):
    """A mixer as the paper writes it, direction by direction; x: (B, T, C)."""
    core, sequential = mixer.core, hasattr(mixer.conv, "kernel_size") and mixer.conv.weight.ndim == 3
    inner, layout = core.dim, TokenLayout(height, width, class_tokens)
    values, z = mixer.in_proj(x).chunk(2, dim=-1)
    if not sequential:
        maps = values.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        maps = F.silu(F.conv2d(maps, mixer.conv.weight, mixer.conv.bias, padding=1, groups=inner))
        values = maps.flatten(2).mT
    patches, tokens = layout.split(values)
    gates, token_gates = layout.split(z)
    outputs = []
    for k, direction in enumerate(core.routes.directions):
        table = DirectionRoutes((direction,), core.routes.inverse).tables(height, width)[0]
        zeros = torch.zeros_like(patches[:, :1])
        walked = TokenLayout(1, table.read.shape[1], class_tokens)
        s = walked.join(torch.cat([patches, zeros], dim=1)[:, table.read[0]], tokens)
        g = walked.join(torch.cat([gates, zeros], dim=1)[:, table.read[0]], token_gates)
        if sequential:
            weight, bias = mixer.conv.weight.unflatten(0, (-1, inner))[k], mixer.conv.bias.unflatten(0, (-1, inner))[k]
            s = F.silu(F.conv1d(F.pad(s.mT, (3, 0)), weight, bias, groups=inner)).mT
        low, b, c = (s @ core.x_proj_weight[k].T).split([core.dt_rank, core.state_dim, core.state_dim], dim=-1)
        delta, decay = (low @ core.dt_proj_weight[k].T).mT, -core.A_log[k].exp()
        bias = core.dt_proj_bias[k]
        y = selective_scan_reference(s.mT, delta, decay, b.mT, c.mT, core.D[k], delta_bias=bias, delta_softplus=True).mT
        y, y_tokens = walked.split(y * F.silu(g) if sequential else y)
        back = torch.zeros_like(torch.cat([patches, zeros], dim=1)).index_copy(1, table.write[0], y)[
            :, : height * width
        ]
        y = layout.join(back, y_tokens)
        gate = core.gate
        pooled = F.layer_norm(y, (inner,), gate.norm.weight, gate.norm.bias).mean(1, keepdim=True)
        y = y * torch.sigmoid(gate.expand(F.gelu(gate.reduce(pooled))))
        if core.direction_weights is not None:
            y = F.layer_norm(y, (inner,)) * core.direction_weights.softmax(0)[k]
        outputs.append(y)
    y = sum(outputs)
    if not sequential:
        y = F.layer_norm(y, (inner,), mixer.out_norm.weight, mixer.out_norm.bias) * F.silu(z)
    return mixer.out_proj(y)


CASES = [
    ("windowed", (5, 7), {}),
    ("windowed", (4, 6), dict(directions=("column", "column_reversed", "raster"), inverse="official")),
    ("windowed", (3, 4), dict(directions=None)),
    ("windowed_sequence", (5, 7), {}),
    (
        "windowed_sequence",
        (4, 6),
        dict(directions=("column", "window3_reversed", "column_reversed"), inverse="official"),
    ),
    ("windowed_sequence", (2, 4), dict(directions=("column", "raster"), inverse="official")),
    ("windowed_sequence", (3, 4), dict(directions=None)),
    ("windowed_sequence", (3, 5), dict(directions=("window2", "column_reversed", "window7"), class_tokens="middle")),
    ("windowed_sequence", (3, 4), dict(directions=("raster_reversed", "window2"), class_tokens="double")),
]


@pytest.mark.parametrize("name,size,options", CASES)
def test_mixers_as_they_are_written(name, size, options):
    torch.manual_seed(0)
    class_tokens = options.get("class_tokens", "none")
    mixer = build_scan(
        dict(type=name, state_dim=3, **{k: v for k, v in options.items() if k != "class_tokens"}), 16
    ).double()
    layout = TokenLayout(*size, class_tokens)
    x = torch.randn(2, size[0] * size[1] + len(layout.positions), 16, dtype=torch.float64, requires_grad=True)
    parameters = list(mixer.parameters())
    y = mixer.scan_tokens(x, layout) if name == "windowed_sequence" else mixer(x.unflatten(1, size)).flatten(1, 2)
    expected = written_out(mixer, x, *size, class_tokens)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(y)
    grads = [torch.autograd.grad(output, [x, *parameters], cotangent) for output in (y, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["windowed", "windowed_sequence"])
def test_the_official_inverse_differs_on_maps_that_are_not_square(name):
    torch.manual_seed(0)
    exact, official = (
        build_scan(dict(type=name, directions=("column", "raster"), inverse=inverse), 16)
        for inverse in ("exact", "official")
    )
    official.load_state_dict(exact.state_dict())
    square, wide = torch.randn(1, 4, 4, 16), torch.randn(1, 3, 4, 16)
    torch.testing.assert_close(exact(square), official(square))
    assert not torch.allclose(exact(wide), official(wide), rtol=1e-2)


def test_a_search_covers_all_directions():
    mixer = build_scan(dict(type="windowed", directions=None), 16)
    assert mixer.core.routes.directions == SEARCHED and mixer.core.direction_weights.shape == (8,)
    assert mixer.core.direction_weights.abs().max() < 0.01
    assert build_scan("windowed", 16).core.direction_weights is None


def test_channel_gate_scales_each_direction_on_its_own():
    gate, x = ChannelGate(16), torch.randn(2, 5, 3, 16)
    together = gate(x)
    for k in range(3):
        torch.testing.assert_close(together[:, :, k], gate(x[:, :, k]))
    assert ((together / x > 0) & (together / x < 1)).all() and gate.reduce.out_features == 2


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(directions=("raster", "colum")), "unknown direction 'colum'. Did you mean 'column'"),
        (dict(directions=("window0",)), "unknown direction 'window0'"),
        (dict(directions="raster"), r"directions takes a sequence of .*got 'raster'"),
        (dict(directions=()), "directions is a list of one or more names"),
        (dict(inverse="transposed"), "inverse is 'exact' or 'official', got 'transposed'"),
        (dict(expand=0.0), r"expand \* dim must be at least 1"),
        (dict(type="windowed", conv_kernel=4), "conv_kernel must be odd"),
    ],
)
def test_wrong_options(options, message):
    for name in {options.get("type", "windowed"), options.get("type", "windowed_sequence")}:
        with pytest.raises((TypeError, ValueError), match=message):
            build_scan({"type": name, **options}, 16)


def test_rotary_table_of_2x2_cells():
    table = RotaryTable(8, 2, 2)
    angles = torch.zeros(2, 2, 8)
    angles[0, 1, 4:] = angles[1, 1, 4:] = angles[1, 0, :4] = angles[1, 1, :4] = torch.tensor([7, 7, 0.07, 0.07])
    torch.testing.assert_close(table.cos[0], angles.cos())
    torch.testing.assert_close(table.sin[0], angles.sin())
    x = torch.randn(3, 2, 2, 8)
    turned = table(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    a, s = angles[1, 0, 0].cos(), angles[1, 0, 0].sin()
    torch.testing.assert_close(turned[:, 1, 0, 0], a * x[:, 1, 0, 0] - s * x[:, 1, 0, 1])
    torch.testing.assert_close(turned[:, 1, 0, 1], a * x[:, 1, 0, 1] + s * x[:, 1, 0, 0])
    assert not table.state_dict() and table(torch.randn(1, 3, 5, 8)).shape == (1, 3, 5, 8)


def test_rotary_table_of_the_original():
    """Samples of the buffers of the original's model with 224 x 224 pixels and 48 channels."""
    table = RotaryTable(48, 14, 14)
    flat = table.cos.flatten(), table.sin.flatten()
    places = torch.linspace(0, 196 * 48 - 1, 64).round().long()[[5, 9, 18, 63]]
    expected = [0.8941984176635742, -0.416146844625473, -0.6536436080932617, 0.9999960660934448]
    torch.testing.assert_close(flat[0][places], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    expected = [0.4476708471775055, 0.9092974066734314, -0.756802499294281, 0.002800760790705681]
    torch.testing.assert_close(flat[1][places], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        RotaryTable(6, 2, 2)


def test_initial_values():
    torch.manual_seed(0)
    model = vision_ssm.create_model("localvim_micro", class_tokens="middle", rotary=False)
    for block in model.stages:
        core = block.mixer.core
        assert not core.dt_proj_bias.any() and core.x_proj_weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.allclose(core.A_log.exp(), torch.arange(1, 17.0)) and (core.D == 1).all()
        assert block.mixer.out_proj.weight.abs().max() <= (1 / (64 * 3)) ** 0.5
    assert not model.cls_token.tokens.any() and model.cls_token.positions.any()
    core = vision_ssm.create_model("localvmamba_micro").stages[0].blocks[0].mixer.core
    steps = F.softplus(core.dt_proj_bias)
    assert 0.99e-3 <= steps.min() and steps.max() <= 0.101


def test_published_directions_are_those_of_the_original():
    for name, settings in {**LocalVim.variants, **LocalVMamba.variants}.items():
        official = {"localvim_small_searched": "localvim_tiny"}.get(name, name)
        if official in ("localvim_tiny", "localvim_tiny_middle_cls_token", "localvmamba_tiny"):
            config = golden_cases.load(f"localmamba/{official}_224")["config"]
            assert settings["directions"] == official_directions(config["directions"])
    assert len(LocalVMamba.variants["localvmamba_small"]["directions"]) == 2 + 2 + 27 + 2


def test_directions_of_blocks():
    model = vision_ssm.create_model("localvim_micro", scan=dict(state_dim=4))
    chosen = [block.mixer.core.routes.directions for block in model.stages]
    assert chosen == list(LocalVim.variants["localvim_micro"]["directions"])
    assert model.stages[0].mixer.core.state_dim == 4
    one = vision_ssm.create_model("localvmamba_micro", scan=dict(directions=("raster", "column")))
    assert {block.mixer.core.routes.directions for stage in one.stages for block in stage.blocks} == {
        ("raster", "column")
    }
    search = vision_ssm.create_model("localvim_micro", directions=None, num_classes=2)
    assert all(block.mixer.core.direction_weights is not None for block in search.stages)
    other = vision_ssm.create_model("localvim_micro", scan="windowed")
    assert other.stages[1].mixer.core.routes.directions == LocalVim.variants["localvim_micro"]["directions"][1]
    with pytest.raises(ValueError, match="directions are given for 3 blocks, but the model has 2"):
        vision_ssm.create_model("localvim_micro", depth=2)
    with pytest.raises(ValueError, match="rotary needs class_tokens='none'"):
        vision_ssm.create_model("localvim_micro", class_tokens="middle")
    with pytest.raises(ValueError, match="one entry per stage"):
        vision_ssm.create_model("localvmamba_micro", dims=(16, 32))


def test_rotation_of_the_stream_or_of_what_is_added():
    torch.manual_seed(0)
    settings = dict(num_classes=0, drop_path_rate=0.0)
    models = [vision_ssm.create_model("localvim_micro", rotary_stream=stream, **settings) for stream in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 3, 64, 64)
    first, second = (model.eval().forward_intermediates(x, (0, 1)) for model in models)
    torch.testing.assert_close(first[0], second[0])  # tokens are turned in front of the first block either way
    assert not torch.allclose(first[1], second[1], rtol=1e-2)


def dense_weights(case, numbers):
    """State dict of the original's dense wrapper with the weights of a classifier."""
    kept = {k: v for k, v in golden_cases.weights(case).items() if not k.startswith(("head.", "norm_f."))}
    for number in numbers:
        kept[f"outnorm_{number}.weight"] = golden_cases.tensor_for(f"outnorm_{number}.weight", [48])
        kept[f"outnorm_{number}.bias"] = golden_cases.tensor_for(f"outnorm_{number}.bias", [48])
    return kept


@pytest.mark.parametrize("numbers", [(0, 1), (1, 2)], ids=["counted", "blocks"])
def test_dense_localvim(numbers):
    """Maps are the outputs of the mixers, each through a norm that is numbered by place or by block."""
    weights = dense_weights(MICRO, numbers)
    model = vision_ssm.import_official("localmamba", {**MICRO["config"], "out_indices": [1, 2]}, weights)
    classifier = vision_ssm.import_official("localmamba", MICRO["config"], golden_cases.weights(MICRO))
    outputs = []
    for block in classifier.stages:
        block.mixer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = torch.randn(1, 3, 96, 90)
    with torch.no_grad():
        classifier(x)
        maps = model(x)
    assert [m.shape for m in maps] == [(1, 48, 6, 6)] * 2
    for number, found, raw in zip(numbers, maps, outputs[1:]):
        expected = F.layer_norm(raw, (48,), weights[f"outnorm_{number}.weight"], weights[f"outnorm_{number}.bias"])
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2))


def test_rotary_buffers_are_dropped_if_they_have_the_shape_of_the_table():
    weights = golden_cases.weights(MICRO)
    table = RotaryTable(48, 14, 14)
    buffers = {"rope.freqs_cos": table.cos.view(196, 48), "rope.freqs_sin": table.sin.view(196, 48)}
    config = {key: value for key, value in MICRO["config"].items() if key != "if_rope"}
    assert vision_ssm.import_official("localmamba", config, {**weights, **buffers}).rotary is not None
    with pytest.raises(CheckpointError, match="not in the model: rope.freqs_cos, rope.freqs_sin"):
        vision_ssm.import_official("localmamba", config, {**weights, **{k: v[:9] for k, v in buffers.items()}})


def test_hyperparameters_that_are_left_out_or_change_nothing():
    names = dict(bimamba_type="v2", drop_rate=0.1, pt_hw_seq_len=14)
    assert vision_ssm.import_official("localmamba", MICRO["config"] | names, golden_cases.weights(MICRO)).rotary is not None
    case = golden_cases.load("localmamba/localvim_micro_midcls")
    kept = {key: value for key, value in case["config"].items() if "cls_token" not in key and "rope" not in key}
    model = vision_ssm.import_official("localmamba", kept, golden_cases.weights(case))
    assert model.class_tokens == "middle" and model.rotary is None
    dense = dense_weights(MICRO, (0,))  # nothing is pooled
    config = MICRO["config"] | {"out_indices": [2], "final_pool_type": "none"}
    assert vision_ssm.import_official("localmamba", config, dense).out_indices == [2]
    case = golden_cases.load("localmamba/localvmamba_micro_96x96")
    names = dict(dims=24, mlp_ratio=0.0, ssm_act_layer="silu", ssm_drop_rate=0.0, patch_norm=True)
    model = vision_ssm.import_official("localmamba", case["config"] | names, golden_cases.weights(case))
    assert model.num_features == 192
    with pytest.raises(ValueError, match="ssm_act_layer of an original LocalVMamba is 'silu', got 'gelu'"):
        vision_ssm.import_official("localmamba", case["config"] | {"ssm_act_layer": "gelu"}, golden_cases.weights(case))


def test_class_token_without_positions():
    case = golden_cases.load("localmamba/localvim_micro_midcls")
    weights = {key: value for key, value in golden_cases.weights(case).items() if key != "pos_embed"}
    model = vision_ssm.import_official("localmamba", case["config"], weights)
    assert model.pos_embed is None and model.cls_token.positions is None


def test_positions_of_images_that_are_not_square():
    weights = golden_cases.weights(MICRO)
    weights["pos_embed"] = golden_cases.tensor_for("pos_embed", [1, 6 * 10, 48])
    model = vision_ssm.import_official("localmamba", {**MICRO["config"], "img_size": (96, 160)}, weights)
    torch.testing.assert_close(model.pos_embed.table[0, :, 4, 7], weights["pos_embed"][0, 4 * 10 + 7])


@pytest.mark.parametrize("name,gate", [("localvim_micro_224", "mixer."), ("localvmamba_micro_96x96", "op.")])
def test_weights_of_a_search(name, gate):
    case = golden_cases.load(f"localmamba/{name}")
    shapes = dict(case["state_dict"])
    for key, shape in case["state_dict"].items():
        block = re.match(rf"(.+\.{re.escape(gate)})", key)
        if block:
            shapes[f"{block[1]}multi_scan.weights"] = [8, 1, 1, 1]
        if key.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias")):
            shapes[key] = [8, *shape[1:]]
        elif key.endswith(("A_logs", "Ds")):
            shapes[key] = [2 * shape[0], *shape[1:]]
        elif match := re.search(r"_(\d)(\.\w+)?$", key):
            shapes[f"{key[: match.start()]}_{int(match[1]) + 4}{match[2] or ''}"] = shape
    weights = golden_cases.weights({**case, "state_dict": shapes})
    model = vision_ssm.import_official("localmamba", {**case["config"], "directions": None}, weights)
    mixers = [module for module in model.modules() if hasattr(module, "core")]
    assert all(mixer.core.routes.directions == SEARCHED for mixer in mixers)
    key = next(key for key in weights if key.endswith("multi_scan.weights"))
    assert torch.equal(mixers[0].core.direction_weights, weights[key].flatten())


def test_classes_recognise_their_own_weights_alone():
    for path in sorted(golden_cases.ROOT.glob("*/*.json")):
        if path.parent.name == "ops":
            continue
        keys = set(golden_cases.load(f"{path.parent.name}/{path.stem}")["state_dict"])
        assert LocalVim.recognises(keys) == path.stem.startswith("localvim")
        assert LocalVMamba.recognises(keys) == path.stem.startswith("localvmamba")
    for cls in (LocalVim, LocalVMamba):
        ours = set(vision_ssm.create_model(next(name for name in cls.variants if name.endswith("_micro"))).state_dict())
        assert [other for other in (LocalVim, LocalVMamba) if other.recognises(ours)] == [cls]
        assert BACKBONES.get(cls.__name__) is cls
    with pytest.raises(CheckpointError, match="no LocalVMamba checkpoint: it looks like a LocalVim checkpoint"):
        vision_ssm.weights.load_state_dict(vision_ssm.create_model("localvmamba_micro"), golden_cases.weights(MICRO))


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(directons=None), "unknown hyperparameters of an original LocalVim: directons. Did you mean 'directions'"),
        (dict(directions=[["h", "x"]] * 3), "unknown direction 'x' of an original LocalMamba"),
        (dict(directions=[["w"]] * 3), "unknown direction 'w' of an original LocalMamba"),
        (dict(final_pool_type="max"), "final_pool_type of an original LocalVim is 'mean', got 'max'"),
        (dict(pt_hw_seq_len=16), "rotary positions span 14 patches, got pt_hw_seq_len=16"),
    ],
)
def test_wrong_hyperparameters(changes, message):
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("localmamba", {**MICRO["config"], **changes}, golden_cases.weights(MICRO))


@pytest.mark.parametrize(
    "changes,message",
    [(dict(use_middle_cls_token=False), "class token in the middle"), (dict(if_rope=True), "no rotary positions")],
)
def test_class_tokens_that_never_worked(changes, message):
    case = golden_cases.load("localmamba/localvim_micro_midcls")
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("localmamba", {**case["config"], **changes}, golden_cases.weights(case))

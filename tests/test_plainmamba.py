"""PlainMamba and its continuous scan, which VCMamba shares."""

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm.factory import families
from vision_ssm.ops import selective_scan
from vision_ssm.scans import build_scan
from vision_ssm.scans.continuous import ContinuousCore, DirectedSnake, MoveTable
from vision_ssm.weights import load_state_dict

PLAIN = golden_cases.load("ops/plainmamba_scan_order")["cases"]
VC = golden_cases.load("ops/vcmamba_directional_scan")
ORDERS = PLAIN + [dict(zip("HW", map(int, size.split("x"))), **tables) for size, tables in VC["orders"].items()]
MICRO = golden_cases.load("plainmamba/plainmamba_micro_100x76")


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case['H']}x{case['W']}")
def test_golden_orders_and_directions(case):
    (table,) = DirectedSnake().tables(case["H"], case["W"])
    assert table.read.tolist() == table.write.tolist() == case["order"]
    assert table.step.tolist() == case["inverse"]
    assert table.move.gather(1, table.read).tolist() == case["direction"]


def test_snake_goes_to_neighbours():
    order = DirectedSnake().orders(5, 6)
    down, right = (order // 6).diff(dim=1), (order % 6).diff(dim=1)
    assert (down.abs() + right.abs()).eq(1).all()


def core_of(dt_bias, log_rate, skip, direction):
    """A core of full rank, so that given step sizes pass through it; it adds its bias twice."""
    dim, states = log_rate.shape
    core = ContinuousCore(dim, states, dim).double()
    values = dict(dt_proj_weight=torch.eye(dim), dt_proj_bias=dt_bias / 2, A_log=log_rate, D=skip)
    for name, value in dict(values, direction_bias=direction).items():
        getattr(core, name).data = value.double()
    return core


def run_core(core, case, x, delta, b, c, grad):
    """x, delta (B, L, E); b, c (B, L, N). Returns the output and the gradients, those of `core` by name."""
    inputs = dict(x=x, delta=delta, B=b, C=c)
    for value in inputs.values():
        value.requires_grad_()
    (table,) = core.routes.tables(case["H"], case["W"])
    y = core.scan_projected(x, torch.cat([delta, b, c], dim=-1), table)
    y.backward(grad)
    gradients = {name: value.grad for name, value in inputs.items()}
    return y, gradients | {name: value.grad for name, value in core.named_parameters()}


def close(have, want):
    torch.testing.assert_close(have, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_golden_multi_scan():
    case = golden_cases.load("ops/plainmamba_multi_scan")
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}
    core = core_of(given["dt_bias"], (-given["A"]).log(), given["D"], given["direction_B"])
    maps = [given[name].mT.clone() for name in ("u", "dt", "B", "C")]
    y, gradients = run_core(core, case, *maps, torch.tensor(case["grad_output"], dtype=torch.float64).mT)
    close(y.mT, case["output"])
    expected = case["gradients"]
    for ours, theirs in (("x", "u"), ("delta", "dt"), ("B", "B"), ("C", "C")):
        close(gradients[ours].mT, expected[theirs])
    close(gradients["A_log"] / given["A"], expected["A"])
    close(gradients["D"], expected["D"])
    close(gradients["dt_proj_bias"] / 2, expected["dt_bias"])
    close(gradients["direction_bias"], expected["direction_B"])


@pytest.mark.parametrize("case", VC["cases"], ids=lambda case: case["tag"])
def test_golden_directional_scan(case):
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}
    core = core_of(*(given[name] for name in ("dt_bias", "A_log", "D", "direction_Bs")))
    maps = [given["x"].clone(), *(given[name].mT.clone() for name in ("delta", "B", "C"))]
    y, gradients = run_core(core, case, *maps, torch.tensor(case["grad_output"]["y"], dtype=torch.float64))
    close(y, case["outputs"]["y"])
    (table,) = core.routes.tables(case["H"], case["W"])
    for k, expected in enumerate(case["outputs"]["per_direction"]):
        read, step, move = (index[k : k + 1] for index in (table.read, table.step, table.move))
        route = MoveTable(read, read, step=step, move=move)
        close(core.scan_projected(maps[0], torch.cat(maps[1:], dim=-1), route), expected)
    expected = case["grad_inputs"]
    close(gradients["x"], expected["x"])
    for name in ("delta", "B", "C"):
        close(gradients[name].mT, expected[name])
    close(gradients["A_log"], expected["A_log"])
    close(gradients["D"], expected["D"])
    close(gradients["dt_proj_bias"] / 2, expected["dt_bias"])
    close(gradients["direction_bias"], expected["direction_Bs"])


@pytest.mark.parametrize("parameters", ["raster", "token"])
def test_whose_parameters_a_step_uses(parameters):
    """Route by route, with tokens laid out in order and the operator for sequences."""
    torch.manual_seed(0)
    core = ContinuousCore(6, 3, 2, parameters).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    (table,) = core.routes.tables(4, 5)
    tokens = x.flatten(1, 2)
    low_rank, b, c = F.linear(tokens, core.x_proj_weight).split([2, 3, 3], dim=-1)
    delta = F.linear(low_rank, core.dt_proj_weight, core.dt_proj_bias)
    expected = torch.zeros_like(tokens)
    for k in range(4):
        order = table.read[k]
        steps = order if parameters == "token" else torch.arange(20)
        y = selective_scan(
            tokens[:, order].mT, delta[:, steps].mT, -core.A_log.exp(),
            (b[:, steps] + core.direction_bias[table.move[k, order]]).mT, c[:, steps].mT,
            core.D, delta_bias=core.dt_proj_bias, delta_softplus=True,
        )  # fmt: skip
        expected[:, order] += y.mT
    torch.testing.assert_close(core(x), expected.view_as(x))


def test_initial_values():
    torch.manual_seed(0)
    core = build_scan("continuous", 64).core
    assert torch.allclose(core.A_log[3].exp(), torch.arange(1.0, 17.0)) and core.D.eq(1).all()
    steps = F.softplus(2 * core.dt_proj_bias)  # as the scan sees it
    assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01
    assert core.dt_proj_weight.abs().max() <= core.dt_rank**-0.5
    assert 0.01 < core.direction_bias.std() < 0.03
    model = vision_ssm.create_model("plainmamba_micro")
    core = model.stages[1].mixer.core
    assert not core.dt_proj_bias.any() and core.A_log[0, 1].exp() == 2
    for weight in (core.x_proj_weight, core.dt_proj_weight, model.stages[1].mixer.in_proj.weight, model.head.weight):
        assert 0.017 < weight.std() < 0.023
    assert not model.stages[1].mixer.in_proj.bias.any()
    assert 0.015 < model.pos_embed.table.std() < 0.025


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    torch.manual_seed(0)
    mixer = build_scan("continuous", 16)
    normed = build_scan(dict(type="continuous", out_norm="layer"), 16)  # without a norm the output itself may overflow
    x = torch.randn(1, 6, 7, 16)
    with torch.autocast("cpu", dtype=dtype):
        close_by, large = mixer(x), normed(300 * x)
    assert torch.isfinite(large).all()
    assert (close_by.float() - mixer(x)).norm() / mixer(x).norm() < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(parameters="tokens"), "unknown parameters 'tokens'. Did you mean 'token'"),
        (dict(init="normal"), "unknown init 'normal'. Did you mean 'trunc_normal'"),
        (dict(projection="conv"), "unknown projection 'conv'. Did you mean 'conv_norm'"),
        (dict(out_norm="group"), "unknown norm 'group'"),
        (dict(out_act="swish"), "unknown activation 'swish'"),
        (dict(conv_kernel=4), "conv_kernel must be odd, so that the map keeps its size; got 4"),
        (dict(expand=0), r"expand \* dim must be at least 1, got 0 \* 16"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_scan(dict(type="continuous", **options), 16)


def test_scan_of_the_paper_in_the_model():
    torch.manual_seed(0)
    model = vision_ssm.create_model("plainmamba_micro", scan=dict(parameters="token")).eval()
    published = vision_ssm.create_model("plainmamba_micro").eval()
    load_state_dict(published, model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert model.stages[0].mixer.core.parameters_of == "token" and model.stages[0].mixer.gate
    assert not torch.allclose(model(x), published(x), rtol=1e-4)


def test_local_convolution_replaces_the_stream():
    model = vision_ssm.create_model("plainmamba_micro", scan=False, local_blocks=(1,))
    x = torch.randn(2, 3, 4, 32)
    assert model.stages[0](x) == (x, None)
    y, branch = model.stages[1](x)
    torch.testing.assert_close(y, model.stages[1].local(x))
    assert branch is None
    with pytest.raises(ValueError, match=r"local_blocks must be numbers of blocks in 0..2, got \(3,\)"):
        vision_ssm.create_model("plainmamba_micro", local_blocks=(3,))


def test_last_map_shares_the_norm_of_the_classifier():
    classifier = vision_ssm.create_model("plainmamba_micro").eval()
    torch.nn.init.normal_(classifier.norm.weight)
    dense = vision_ssm.create_model("plainmamba_micro", features_only=True, out_indices=(1, 2)).eval()
    assert {key for key in dense.state_dict() if "norms" in key} == {"out_norms.1.weight", "out_norms.1.bias"}
    report = load_state_dict(dense, classifier.state_dict())
    assert report.complete and "norm.weight" in report.loaded
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(dense(x)[-1], classifier.forward_features(x))
    raw = classifier.forward_intermediates(x)[-1]
    assert not torch.allclose(dense(x)[-1], raw)
    normed = vision_ssm.create_model("plainmamba_micro", norm_indices=(-2, -1)).eval()
    load_state_dict(normed, classifier.state_dict())
    assert len(normed.forward_intermediates(x)) == 2 and normed(x).shape == (1, 1000)
    torch.testing.assert_close(normed.forward_intermediates(x)[-1], classifier.forward_features(x))
    with pytest.raises(ValueError, match="norm_indices is for classifiers"):
        vision_ssm.create_model("plainmamba_micro", features_only=True, norm_indices=(2,))


def test_directions_are_not_decayed():
    exempt = vision_ssm.create_model("plainmamba_micro").no_weight_decay()
    leaves = {"A_log", "D", "dt_proj_bias", "direction_bias", "table"}
    assert {name.rsplit(".", 1)[-1] for name in exempt} == leaves


def test_arch_alone_says_everything():
    case = golden_cases.load("plainmamba/plainmamba_l1_224")
    options = families()["plainmamba"][0].from_official_config({"arch": "L1"}, set(case["state_dict"]))
    given = families()["plainmamba"][0].from_official_config(case["config"], set(case["state_dict"]))
    assert options == given and options["local_blocks"] == (0,) and options["stem_convs"] == 1


def imported(config=None, drop=(), rename=lambda key: key, **weights):
    tensors = {**golden_cases.weights(MICRO), **weights}
    tensors = {rename(key): value for key, value in tensors.items() if not key.startswith(drop or "-")}
    return vision_ssm.import_official("plainmamba", {**MICRO["config"], **(config or {})}, tensors)


def test_import_of_other_forms():
    x = golden_cases.images(MICRO["input"])
    whole = imported()
    expected = whole.forward_intermediates(x)
    dense = imported(drop=("head.",))
    assert dense.features_only and dense.num_classes == 0
    for have, want in zip(dense(x), expected, strict=True):
        torch.testing.assert_close(have, want)
    stripped = imported(rename=lambda key: key.removeprefix("backbone."), ema_backbone_pos_embed=torch.zeros(1, 16, 64))
    torch.testing.assert_close(stripped(x), whole(x))
    adapter = imported(dict(final_norm=False), drop=("head.", "backbone.ln1"))
    assert isinstance(adapter.norm, torch.nn.Identity)
    torch.testing.assert_close(whole.norm(adapter(x)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected[-1])
    norms = tuple(f"backbone.layers.{i}.norm.bias" for i in range(3))
    rms = imported(dict(use_rms_norm=True), drop=norms)
    assert isinstance(rms.stages[0].norm1, torch.nn.RMSNorm) and isinstance(rms.norm, torch.nn.LayerNorm)
    assert torch.isfinite(rms(x)).all()


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(embed_dim=64), "unknown hyperparameters of an original PlainMamba: embed_dim. Did you mean 'embed_dims'"),
        (dict(arch="L4"), "unknown arch 'L4' of an original PlainMamba. Did you mean 'L"),
        (dict(out_indices=[0, 3]), r"out_indices must be different stages in 0..2, got \(0, 3\)"),
        (dict(patch_size=7), "patch_size must be even, as the convolutions halve the image; got 7"),
    ],
)
def test_wrong_hyperparameters(config, message):
    with pytest.raises(ValueError, match=message):
        imported(config)


def test_positions_of_another_shape():
    with pytest.raises(ValueError, match="pos_embed has 15 rows for patches: neither this model's grid nor a square one"):
        imported(**{"backbone.pos_embed": torch.zeros(1, 15, 64)})


@pytest.mark.parametrize("size", [(64, 96), (32, 128)])  # 128 / 16 times 32 / 16 is a square number as well
def test_original_of_images_that_are_not_square(size):
    rows = golden_cases.tensor_for("backbone.pos_embed", [1, size[0] * size[1] // 256, 64])
    model = imported(dict(img_size=size), **{"backbone.pos_embed": rows})
    assert torch.equal(model.pos_embed.table.flatten(2).mT, rows)
    assert model.pos_embed.table.shape[2:] == (size[0] // 16, size[1] // 16)


def test_original_with_other_patches():
    rows, kernel = torch.randn(1, 64, 64), torch.randn(64, 64, 4, 4)
    weights = {"backbone.pos_embed": rows, "backbone.patch_embed.projection.weight": kernel}
    model = imported(dict(patch_size=8), **weights).double()
    x = torch.randn(1, 3, 70, 50, dtype=torch.float64)
    cells = model.stem.convs(x)  # (1, 64, 35, 25), padded to (36, 28)
    expected = F.conv2d(F.pad(cells, (0, 3, 0, 1)), kernel.double(), model.stem.patches.conv.bias, stride=4)
    torch.testing.assert_close(model.stem(x).permute(0, 3, 1, 2), expected)
    assert model.forward_intermediates(x)[0].shape == (1, 64, 9, 7) and model.feature_info[0]["reduction"] == 8


def test_hyperparameters_in_other_forms():
    head = {"backbone.ln1.weight", "head.fc.weight"}
    (cls,) = families()["plainmamba"]
    assert cls.from_official_config(dict(arch="L1", out_indices=-1, drop_rate=0.1), head) == cls.from_official_config(
        dict(arch="L1"), head
    )


def test_compiled_model_takes_any_size():
    """Tables of routes and directions are found, and patches padded, where sizes are symbolic."""
    model = vision_ssm.create_model("plainmamba_micro", depth=1, num_classes=3).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((64, 64), (65, 97)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["plainmamba", "vcmamba"])
def test_recognises_its_own_keys_alone(family):
    (cls,) = families()[family]
    for folder in sorted(path for path in golden_cases.ROOT.iterdir() if path.name != "ops"):
        for name in golden_cases.names(folder.name):
            assert cls.recognises(set(golden_cases.load(name)["state_dict"])) is (folder.name == family), name
    for name in (f"{family}_micro", "vmamba_micro"):
        for options in ({}, dict(features_only=True), dict(scan="multi_direction")):
            keys = set(vision_ssm.create_model(name, **options).state_dict())
            assert cls.recognises(keys) is name.startswith(family)


def test_files_of_openmmlab_classifiers(tmp_path):
    """``head.fc`` beside ``backbone.`` is the classifier, and its weights say how many classes there are."""
    weights = golden_cases.weights(MICRO)
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "epoch_300.pth")
    model = vision_ssm.import_official("plainmamba", MICRO["config"], weights)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    torch.nn.init.zeros_(model.head.weight)
    assert vision_ssm.load_weights(model, tmp_path / "epoch_300.pth", verbose=False).complete
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    fewer = {key: value[:10] if key.startswith("head.") else value for key, value in weights.items()}
    config = {key: value for key, value in MICRO["config"].items() if key != "num_classes"}
    assert vision_ssm.import_official("plainmamba", config, fewer).num_classes == 10

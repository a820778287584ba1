"""MSVMamba: the two forms of its scan, its block and its weights."""

import golden_cases
import pytest
import torch
from torch.nn import functional as F

import vision_ssm
from vision_ssm.backbones.msvmamba import _V1_SCAN, _V3_SCAN, ConvMlpBlock, MSVMamba
from vision_ssm.layers import ConvMlp
from vision_ssm.ops import selective_scan
from vision_ssm.scans import MultiDirectionScan, build_scan
from vision_ssm.scans.multi_scale import MultiScaleScan, _TwoScales

CASES = golden_cases.names("msvmamba")


def convert(tensors):
    """Original parameters of an operator as `MultiScaleScan` has them."""
    placed = MSVMamba.official_keys({f"layers.0.blocks.0.op.{key}": value for key, value in tensors.items()})
    return {key.removeprefix("stages.0.blocks.0.mixer."): value for key, value in placed.items()}


@pytest.mark.parametrize(
    "name,scan",
    [("msvmamba_ms2d", {**_V1_SCAN, "state_dim": 2}), ("msvmamba_ms2d_v3_vms_noz", _V3_SCAN)],
    ids=["first", "last"],
)
def test_golden_operators(name, scan):
    golden_cases.check_operator(golden_cases.load(f"ops/{name}"), build_scan(scan, 16), convert)


def test_routes_on_a_small_map():
    """The half-resolution map of 3 x 5 cells is 2 x 3, numbered 0 1 2 / 3 4 5."""
    full, low = _TwoScales(reverse_full=False, low_first=False, unfolded=False).tables(3, 5)
    assert full.read.tolist() == [list(range(15))] and low.read.tolist() == low.write.tolist()
    assert low.read.tolist() == [[5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]]
    assert (full.routes, low.routes) == (slice(0, 1), slice(1, 2))
    full, low = _TwoScales(reverse_full=True, low_first=True, unfolded=False).tables(3, 5)
    assert full.read.tolist() == [list(range(15))[::-1]]
    assert low.read.tolist() == [[0, 1, 2, 3, 4, 5, 0, 3, 1, 4, 2, 5, 5, 2, 4, 1, 3, 0]]
    assert (full.routes, low.routes) == (slice(1, 2), slice(0, 1))
    _, low = _TwoScales(reverse_full=False, low_first=True, unfolded=True).tables(3, 5)
    assert low.read.tolist() == [list(range(18))]


@pytest.mark.parametrize("reverse_full", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_folding_undoes_laying_out(reverse_full, size):
    routes = _TwoScales(reverse_full, low_first=False, unfolded=True)
    x = torch.randn(2, *size, 4)
    torch.testing.assert_close(routes.fold(routes.lay_out(x), *size), 3 * x)


@pytest.mark.parametrize("merge", ["add_norm", "norm_add"])
@pytest.mark.parametrize("reverse_full", [False, True])
def test_scan_is_two_one_dimensional_scans(merge, reverse_full):
    """Against the sequences written out, scanned by `selective_scan`, on a map with odd sides."""
    torch.manual_seed(1)
    mixer = MultiScaleScan(8, merge=merge, reverse_full=reverse_full, state_dim=2, expand=2.0).double()
    torch.nn.init.normal_(mixer.out_norm.bias)
    h = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    full, low = mixer.conv(h), mixer.low_act(mixer.low_conv(h))
    assert low.shape == (2, 3, 2, 16)
    core = mixer.core

    def scan(tokens, group):
        rank, b, c = F.linear(tokens, core.x_proj_weight[group]).split([1, 2, 2], dim=-1)
        delta = F.linear(rank, core.dt_proj_weight[group])
        parts = (tokens.mT, delta.mT, -core.A_log[group].exp(), b.mT, c.mT, core.D[group])
        return selective_scan(*parts, delta_bias=core.dt_proj_bias[group], delta_softplus=True).mT

    rows, columns = low.flatten(1, 2), low.transpose(1, 2).flatten(1, 2)
    whole, rows = (full.flatten(1, 2).flip(1), rows) if reverse_full else (full.flatten(1, 2), rows.flip(1))
    of_full, of_low = (1, 0) if merge == "norm_add" else (0, 1)
    y, y_low = scan(whole, of_full), scan(torch.cat([rows, columns, columns.flip(1)], dim=1), of_low)
    if merge == "norm_add":
        y, y_low = mixer.out_norm(y), mixer.out_norm(y_low)
    first, second, third = y_low.chunk(3, dim=1)
    if reverse_full:
        y = y.flip(1)
    else:
        first = first.flip(1)
    y_low = first.view(low.shape) + (second + third.flip(1)).view(2, 2, 3, 16).transpose(1, 2)
    mode = "bilinear" if merge == "norm_add" else "nearest"
    y = y.view(h.shape) + F.interpolate(y_low.permute(0, 3, 1, 2), size=(5, 3), mode=mode).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer.scan(h), y if merge == "norm_add" else mixer.out_norm(y))


@pytest.mark.parametrize("merge", ["add_norm", "norm_add"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (4, 6)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_both_forms_on_any_size(merge, size):
    mixer = build_scan(dict(type="multi_scale", merge=merge, gate=True), 16)
    x = torch.randn(2, *size, 16, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.isfinite(mixer(100 * x)).all()


def test_hooks_on_the_output_norm_see_both_scales():
    mixer = build_scan(dict(type="multi_scale", merge="norm_add"), 16).eval()
    x, seen = torch.randn(1, 4, 6, 16), []
    fused = mixer(x)
    mixer.out_norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    torch.testing.assert_close(mixer(x), fused)
    assert seen == [(1, 24, 16), (1, 18, 16)]


@pytest.mark.parametrize("residual", [False, True])
def test_conv_mlp(residual):
    mlp = ConvMlp(4, 6, 5, residual=residual)
    x = torch.randn(2, 3, 4, 4)
    h = mlp.fc1(x)
    local = F.conv2d(h.permute(0, 3, 1, 2), mlp.conv.weight, mlp.conv.bias, padding=1, groups=6).permute(0, 2, 3, 1)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(h + local if residual else local)))
    assert not torch.equal(ConvMlp(4, 6, dropout=0.5)(x), ConvMlp(4, 6, dropout=0.5)(x))


def test_norm_stands_before_or_behind_the_conv_mlp():
    x = torch.randn(1, 3, 4, 16)
    for post_norm in (False, True):
        block = ConvMlpBlock(16, False, conv_mlp_ratio=2.0, post_norm=post_norm, mlp_ratio=0.0)
        torch.nn.init.normal_(block.norm2.weight)
        stream, (branch, _) = block(x)
        expected = block.norm2(block.conv_mlp(x)) if post_norm else block.conv_mlp(block.norm2(x))
        torch.testing.assert_close(branch, expected)
        assert torch.equal(stream, x)
    both = ConvMlpBlock(16, False, conv_mlp_ratio=2.0, mlp_ratio=1.0)
    stream, (branch, _) = both(x)
    after = x + both.mlp(both.norm2(x))
    torch.testing.assert_close(stream, after)
    torch.testing.assert_close(branch, both.conv_mlp(both.norm2(after)))
    none = ConvMlpBlock(16, dict(type="multi_scale"), conv_mlp_ratio=0.0, mlp_ratio=0.0)
    assert none.conv_mlp is None and not hasattr(none, "norm2") and none(x)[1][0].shape == x.shape


def test_stages_without_multi_scale_scans():
    model = vision_ssm.create_model("msvmamba_nano", multi_scale_stages=(0, 2), depths=(1, 1, 1, 1), dims=16)
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [type(mixer) for mixer in mixers] == [MultiScaleScan, MultiDirectionScan] * 2
    assert mixers[1].gate and mixers[1].core.state_dim == 1 and mixers[1].channel_gate is not None
    model = vision_ssm.create_model("msvmamba_micro", multi_scale_stages=(), scan="atrous")
    assert type(model.stages[0].blocks[0].mixer).__name__ == "AtrousScan"
    with pytest.raises(ValueError, match=r"numbers of stages in 0..3, got \[4, 7\]"):
        vision_ssm.create_model("msvmamba_micro", multi_scale_stages=(0, 7, 4))
    config = {**golden_cases.load("msvmamba/micro_ms")["config"], "depths": [1, 1]}
    assert MSVMamba.from_official_config(config, set())["multi_scale_stages"] == {0, 1}


def test_initial_values():
    model = vision_ssm.create_model("msvmamba_micro")
    block = model.stages[0].blocks[0]
    assert block.mixer.core.A_log.eq(0).all() and block.mixer.core.D.eq(1).all()
    fc1 = block.conv_mlp.fc1
    assert fc1.bias.any() and fc1.weight.std() > 0.05, "1x1 convolutions of the original start as torch makes them"
    assert block.mixer.in_proj.weight.std() < 0.03


def test_scan_options_replace_some_of_the_variants_own():
    model = vision_ssm.create_model("msvmambav3_base", scan=dict(state_dim=3), depths=(1, 1, 1, 1), dims=16)
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.gate and mixer.core.state_dim == 3 and not mixer.norm_first


@pytest.mark.parametrize("name", [name for name in CASES if "micro_v3_vms_odd" in name or name.endswith("micro_ms")])
def test_switches_that_cases_do_not_have(name):
    case = golden_cases.load(name)
    weights = golden_cases.weights(case)
    image = golden_cases.images(case["input"])
    without = {key: value for key, value in weights.items() if ".op.se." not in key}
    model = vision_ssm.import_official("msvmamba", {**case["config"], "add_se": False}, without)
    assert model.stages[0].blocks[0].mixer.channel_gate is None and torch.isfinite(model(image)).all()
    without = {key: value for key, value in weights.items() if ".convFFN." not in key and ".norm2." not in key}
    switch = "convffn" if "v3" in name else "convFFN"
    model = vision_ssm.import_official("msvmamba", {**case["config"], switch: False, "mlp_ratio": 0.0}, without)
    assert model.stages[0].blocks[0].conv_mlp is None
    without = {key: value for key, value in weights.items() if ".op." not in key and ".norm." not in key.split("blocks")[-1]}
    without |= {key: value for key, value in weights.items() if "classifier" in key or "downsample" in key}
    model = vision_ssm.import_official("msvmamba", {**case["config"], "ssm_ratio": 0.0}, without)
    assert model.stages[0].blocks[0].mixer is None and torch.isfinite(model(image)).all()


def test_first_version_compiles_and_exports():
    model = vision_ssm.create_model("msvmamba_nano", depths=(1, 1, 1, 1), dims=16, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 48)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), wanted)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)


def test_suffixes_of_the_last_version():
    case = golden_cases.load("msvmamba/micro_v3_vms_odd")
    weights = {key: value for key, value in golden_cases.weights(case).items() if ".op.out_norm." not in key}
    config = {**case["config"], "forward_type": "vms_onnone_nozact_oact"}
    mixer = vision_ssm.import_official("msvmamba", config, weights).stages[0].blocks[0].mixer
    assert mixer.gate and isinstance(mixer.gate_act, torch.nn.Identity) and isinstance(mixer.out_act, torch.nn.GELU)
    assert isinstance(mixer.out_norm, torch.nn.Identity)


def test_any_inner_width_of_the_last_version():
    """Only the first version bounds it, by the rank of its projections."""
    case = golden_cases.load("msvmamba/micro_v3_vms_noz")
    config = {**case["config"], "ssm_ratio": 3.0}
    official = MSVMamba.from_official_config(config, set(case["state_dict"]))
    assert official["scan"]["expand"] == 3.0
    with pytest.raises(ValueError, match="ssm_rank_ratio=2.0 below ssm_ratio=3.0"):
        first = golden_cases.load("msvmamba/micro_ms")
        MSVMamba.from_official_config({**first["config"], "ssm_ratio": 3.0}, set(first["state_dict"]))


@pytest.mark.parametrize(
    "case,change,message",
    [
        ("micro_ms", dict(ms_split=[1, 2]), r"ms_split=\[1, 2\] of an original MSVMamba is not offered; it is \[1, 3\]"),
        ("micro_ms", dict(sep_norm=True), "sep_norm=True of an original MSVMamba is not offered"),
        ("micro_ms", dict(ssm_rank_ratio=1.0), "ssm_rank_ratio=1.0 below ssm_ratio=2.0 of an original MSVMamba is not offered"),
        ("micro_ms", dict(forward_type="v0"), "forward_type 'v0' of an original MSVMamba is not offered; it is 'v2'"),
        ("micro_ms", dict(add_sse=True), r"\(first version\): add_sse. Did you mean 'add_se'"),
        ("micro_v3_vms_noz", dict(full_res_index=3), "full_res_index=3 of an original MSVMamba is not offered; it is 1 or 2"),
        ("micro_v3_vms_noz", dict(axis_stage=[0]), r"axis_stage=\[0\] of an original MSVMamba is not offered"),
        ("micro_v3_vms_noz", dict(forward_type="axis_noz"), "forward_type 'axis_noz' of an original MSVMamba is not offered"),
        ("micro_v3_vms_noz", dict(ms_stage=[0]), r"\(last version\): ms_stage"),
    ],
)
def test_wrong_official_configs(case, change, message):
    case = golden_cases.load(f"msvmamba/{case}")
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("msvmamba", {**case["config"], **change}, golden_cases.weights(case))


@pytest.mark.parametrize(
    "options,error,message",
    [
        (dict(merge="norm_ad"), ValueError, "unknown merge 'norm_ad'. Did you mean 'norm_add'"),
        (dict(merge="norm_add", out_norm="none"), ValueError, "merge='norm_add' normalises tokens by themselves"),
        (dict(routes="cross"), TypeError, "unknown keyword 'routes'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        build_scan(dict(type="multi_scale", **options), 16)


def test_recognises_its_own_keys_alone():
    assert MSVMamba.recognises(set(vision_ssm.create_model("msvmamba_micro").state_dict()))
    assert MSVMamba.recognises(set(vision_ssm.create_model("msvmamba_micro", scan="atrous").state_dict()))
    for path in sorted(golden_cases.ROOT.glob("*/*.json")):
        if path.parent.name != "ops":
            keys = set(golden_cases.load(f"{path.parent.name}/{path.stem}")["state_dict"])
            assert MSVMamba.recognises(keys) is (path.parent.name == "msvmamba"), path

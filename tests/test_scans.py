"""Scan strategies: golden operator cases, and what every strategy of the registry must do."""

import functools

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm.backbones.vmamba import convert_mixers, official_scan
from vision_ssm.scans import MultiDirectionScan, build_routes, build_scan, describe_scan, list_scans
from vision_ssm.scans.core import unpack
from vision_ssm.scans.sequence import SequenceScan

SS2D_CASES = sorted(path.stem for path in (golden_cases.ROOT / "ops").glob("vmamba_ss2d_*.json"))


def _official_mixer(case):
    config = dict(case["config"])
    names = dict(ssm_ratio="expand", d_state="state_dim", act_layer="act", conv_bias="conv_bias")
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    scan = official_scan(config["forward_type"], init=config.get("initialize", "v0"), **options)
    mixer = build_scan(scan, config["d_model"]).double().eval()
    weights = {key: golden_cases.tensor_for(key, shape).double() for key, shape in case["state_dict"].items()}
    mixer.load_state_dict(convert_mixers(weights))
    return mixer, {ours: theirs for theirs in weights for ours in convert_mixers({theirs: weights[theirs]})}


def test_gradients_side_by_side_are_not_copied():
    """Kernels leave the gradients of packed projections in one tensor."""
    packed = torch.randn(2, 5, 3, 6, requires_grad=True)  # (B, L, K, R + 2N)
    gradient = torch.randn(2, 5, 3, 6)
    seen = []
    views = unpack(packed * 1, [4, 1, 1])
    views[0].grad_fn.next_functions[0][0].register_prehook(lambda grads: seen.append(grads[0]))
    parts = gradient.split([4, 1, 1], dim=-1)
    torch.autograd.backward(views, parts, retain_graph=True)
    assert seen[0].data_ptr() == gradient.data_ptr() and torch.equal(packed.grad, gradient)
    packed.grad = None
    torch.autograd.backward(views, [part.contiguous() for part in parts])
    assert seen[1].data_ptr() != gradient.data_ptr() and torch.equal(packed.grad, gradient)


@pytest.mark.parametrize("name", SS2D_CASES)
def test_golden_ss2d(name):
    case = golden_cases.load(f"ops/{name}")
    mixer, original_name = _official_mixer(case)
    to_ours = (0, 2, 3, 1) if case["layout"] == "NCHW" else (0, 1, 2, 3)
    back = (0, 3, 1, 2) if case["layout"] == "NCHW" else (0, 1, 2, 3)
    x = golden_cases.images(case["input"]).double().requires_grad_()
    y = mixer(x.permute(to_ours)).permute(back)
    (y * golden_cases.images(case["cotangent"]).double()).sum().backward()
    torch.testing.assert_close(y, golden_cases.array(case["output"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, golden_cases.array(case["grad_input"]), rtol=1e-9, atol=1e-9)
    checked = set()
    for key, parameter in mixer.named_parameters():
        expected = case["param_grads"][original_name[key]]
        grad = parameter.grad.reshape(expected["shape"])
        assert golden_cases.sample_error(expected, grad) < 1e-5, key  # samples were stored in float32
        checked.add(original_name[key])
    assert checked == set(case["param_grads"])


@pytest.mark.parametrize("name", list_scans())
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 6)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_strategy_alone(name, size):
    mixer = build_scan(name, 16)
    x = torch.randn(4, *size, 16, requires_grad=True)  # enough for a unit behind a ReLU to be alive
    y = mixer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    unused = [key for key, parameter in mixer.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not unused, f"no gradient reaches {unused}"
    assert describe_scan(name).endswith(".")


@pytest.mark.parametrize("routes", vision_ssm.list_routes())
@pytest.mark.parametrize("core", ["s6", "ssd"])
def test_multi_direction_along_every_route(routes, core):
    spec = dict(type="compose", families=["column", "raster"]) if routes == "compose" else routes
    mixer = MultiDirectionScan(8, routes=spec, core=core, state_dim=2, expand=1.0)
    x = torch.randn(1, 3, 5, 8)
    y = mixer(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    turned = mixer(x.flip(1))
    assert not torch.allclose(y, turned.flip(1), atol=1e-6), "the output must depend on the order of the cells"


@pytest.mark.parametrize(
    "core,init", [("s6", "mamba"), ("s6", "normal"), ("s6", "uniform"), ("ssd", "normal"), ("ssd", "uniform")]
)
def test_initial_values(core, init):
    torch.manual_seed(0)
    mixer = MultiDirectionScan(32, core=core, init=init, state_dim=4)
    parameters = dict(mixer.core.named_parameters())
    assert torch.equal(parameters["D"], torch.ones_like(parameters["D"]))
    assert parameters["x_proj_weight"].abs().max() <= mixer.core.dim**-0.5
    if init == "mamba":
        assert torch.allclose(parameters["A_log"][2, 5].exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        steps = torch.nn.functional.softplus(parameters["dt_proj_bias"])
        assert steps.min() >= 1e-3 * 0.99 and steps.max() <= 0.1 * 1.01
        assert parameters["dt_proj_weight"].abs().max() <= mixer.core.dt_rank**-0.5
    elif init == "uniform":
        assert not parameters["A_log"].any()
        assert 0 <= parameters["dt_proj_bias"].min() and parameters["dt_proj_bias"].max() <= 0.1
    else:
        assert parameters["A_log"].std() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", ["s6", "ssd"])
def test_half_precision_stays_close_and_finite(dtype, core):
    torch.manual_seed(0)
    mixer = MultiDirectionScan(16, core=core, state_dim=4)
    x = torch.randn(1, 6, 7, 16)
    exact = mixer(x)
    with torch.autocast("cpu", dtype=dtype):
        close = mixer(x)
        large = mixer(300 * x)
    assert torch.isfinite(large).all()
    error = (close.float() - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 4e-3), float(error)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(core="s4"), "unknown core 's4'"),
        (dict(out_norm="layr"), "unknown out_norm 'layr'. Did you mean 'layer'"),
        (dict(act="swish"), "unknown activation 'swish'"),
        (dict(expand=0.0), r"expand \* dim must be at least 1"),
        (dict(core="ssd", dt_rank=3), "heads must divide the scanned width: 3 heads for 16 channels"),
        (dict(conv_kernel=4), "conv_kernel must be odd, so that the map keeps its size, or at most 1; got 4"),
        (dict(dt_rank=0), "dt_rank is 'auto' or a positive whole number, got 0"),
        (dict(init="xavier"), "init is 'mamba', 'normal' or 'uniform', got 'xavier'"),
        (dict(core="ssd", init="mamba"), "init of the SSD core is 'normal' or 'uniform', got 'mamba'"),
        (dict(routes="cros"), "unknown route 'cros'. Did you mean 'cross'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        MultiDirectionScan(8, **options)


@pytest.mark.parametrize("name", list_scans())
@pytest.mark.parametrize(
    "shape,message",
    [
        ((2, 8, 6, 6), r"x must be \(B, H, W, 8\), got shape \(2, 8, 6, 6\); move the channels last"),
        ((2, 36, 8), r"got shape \(2, 36, 8\); give tokens as a map: x.unflatten\(1, \(height, width\)\)"),
        ((2, 6, 6, 12), r"got shape \(2, 6, 6, 12\); width 8 is what it was built for"),
        ((288,), r"x must be \(B, H, W, 8\), got shape \(288,\)"),
    ],
    ids=["channels first", "tokens", "width", "flat"],
)
def test_what_is_no_map(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_scan(name, 8)(torch.zeros(shape))


class Doubled(SequenceScan):
    """A strategy of somebody else's, which knows nothing of `dim`."""

    def __init__(self, dim: int, **options):
        super().__init__()
        self.proj = torch.nn.Linear(dim, dim)

    def scan_tokens(self, tokens, layout):
        return 2 * self.proj(tokens)


@pytest.mark.parametrize("kind", [Doubled, functools.partial(Doubled, option=1)])
def test_strategies_without_a_name(kind):
    assert build_scan(dict(type=kind), 8)(torch.zeros(1, 2, 3, 8)).shape == (1, 2, 3, 8)
    model = vision_ssm.create_model("vmamba_micro", depths=(1, 1, 1, 1), scan=dict(type=kind), num_classes=2)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_routes_in_every_form():
    cross = build_routes("cross")
    for spec in ("cross", dict(type="cross"), cross, ("raster", "column"), ["raster", cross]):
        for name, key in (("multi_direction", "routes"), ("channel_groups", "routes"), ("multi_head", "heads")):
            mixer = build_scan({"type": name, key: [spec, spec] if key == "heads" else spec}, 20)
            assert mixer(torch.zeros(1, 2, 3, 20)).shape == (1, 2, 3, 20), (name, spec)
        assert build_routes(dict(type="reversed", of=spec)).num_routes == build_routes(spec).num_routes
        assert build_routes(dict(type="compose", families=[spec, "raster"])).num_routes == build_routes(spec).num_routes + 1


@pytest.mark.parametrize("name", ["multi_direction", "causal", "hidden_state", "plstm"])
def test_forward_mode_is_not_lost_in_a_compiled_graph(name):
    mixer, x = build_scan(name, 16), torch.randn(1, 3, 4, 16)

    def tangent(x):
        return torch.func.jvp(mixer, (x,), (x,))[1]

    torch._dynamo.reset()
    compiled = torch.compile(tangent, backend="eager")
    torch.testing.assert_close(compiled(x), tangent(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not go through compiled models of vision_ssm"):
        torch.compile(tangent, backend="eager", fullgraph=True)(x)


def test_wrong_names_and_keywords():
    with pytest.raises(KeyError, match="unknown scan 'multi_directions'. Did you mean 'multi_direction'"):
        build_scan("multi_directions", 8)
    with pytest.raises(TypeError, match="unknown keyword 'stat_dim'. 'stat_dim': Did you mean 'state_dim'"):
        build_scan(dict(type="multi_direction", stat_dim=4), 8)


@pytest.mark.parametrize(
    "forward_type,expected",
    [
        ("v05_noz", dict(gate=False)),
        ("v0", dict(gate=True, gate_act=True, conv_bias=True, act="silu")),
        ("v05_onnone_nozact", dict(out_norm="none", gate_act=False)),
        ("v04_oncnorm_noz_oact_no32", dict(out_norm="layer_conv", gate=False, out_act=True)),
        ("v052dc_noz", dict(routes="cascade", gate=False)),
        ("m0_noz", dict(core="ssd", gate=False)),
    ],
)
def test_official_switch_strings(forward_type, expected):
    scan = official_scan(forward_type)
    assert {key: scan[key] for key in scan if key not in ("type", "init")} == expected


@pytest.mark.parametrize("forward_type", ["v05_noz_onnone", "v9", "xv1a_noz"])
def test_unknown_official_switch_strings(forward_type):
    with pytest.raises(ValueError, match="forward_type"):
        official_scan(forward_type)


@pytest.mark.parametrize("name", [name for name in list_scans() if name != "attention"])  # PyTorch's has no tangents
def test_forward_mode_differentiation(name):
    """`torch.func.jvp` gives the directional derivative, with gradients on and off, and of gradients too."""
    torch.manual_seed(0)
    mixer = build_scan(name, 16).double().eval()
    x, direction = torch.randn(2, 1, 4, 5, 16, dtype=torch.double)
    step = 1e-5
    with torch.no_grad():
        want = (mixer(x + step * direction) - mixer(x - step * direction)) / (2 * step)
        _, without = torch.func.jvp(mixer, (x,), (direction,))
    _, tangent = torch.func.jvp(mixer, (x,), (direction,))
    torch.testing.assert_close(tangent, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(without, want, rtol=1e-5, atol=1e-7)

    def gradient(x):
        return torch.func.grad(lambda x: mixer(x).square().sum())(x)

    _, curvature = torch.func.jvp(gradient, (x,), (direction,))
    want = (plain_gradient(mixer, x + step * direction) - plain_gradient(mixer, x - step * direction)) / (2 * step)
    torch.testing.assert_close(curvature, want, rtol=1e-4, atol=1e-6)


def plain_gradient(mixer, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(mixer(x).square().sum(), x)[0]

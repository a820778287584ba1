"""pLSTM: the operator against its twin and the original, the strategy and the backbone."""

import math

import golden_cases
import pytest
import torch
from ops_support import TOLERANCE, cast, check, compare, fresh_seed, run
from plstm_support import plstm_inputs, random_options
from torch.utils.flop_counter import FlopCounterMode
from vision_ssm.kernels import plstm_walk

import vision_ssm
from vision_ssm import kernels
from vision_ssm.ops import plstm2d, select_backend, torch_plstm
from vision_ssm.ops.plstm import plstm2d_flops
from vision_ssm.ops.plstm_paths import decay, flip_orientations
from vision_ssm.ops.torch_plstm import plstm2d_reference
from vision_ssm.scans import build_scan
from vision_ssm.scans.plstm import resolve_heads
from vision_ssm.weights import load_state_dict

GOLDEN = ["plstm2d_pmode", "plstm2d_dmode_chirality_L", "plstm2d_dmode_state2", "plstm2d_four_orientations"]
BOTH = pytest.mark.parametrize("operator", [plstm2d, plstm2d_reference], ids=["paths", "twin"])


@pytest.fixture(autouse=True)
def _fresh_inputs(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    fresh_seed()


def all_used(operator):
    """`operator` on whose result every input has an influence, of 0 where it has none: gradients are zeros, not None."""

    def touched(**inputs):
        nothing = sum(0 * value.sum() for value in inputs.values() if value is not None)
        return operator(**inputs) + nothing

    return touched


def ours(name, values, oriented):
    """A tensor of a golden case, (B, [4,] X, Y, ...), as the operator takes it."""
    if values is None:
        return None
    tensor = torch.tensor(values, dtype=torch.float64)
    if name in ("Q", "K", "V", "output"):
        return tensor.squeeze(-1).unsqueeze(3)  # (B, X, Y, 1, DK)
    if name == "D":
        return tensor.flatten(3)  # (B, X, Y, 1)
    tensor = tensor.movedim(1, 3) if oriented else tensor.unsqueeze(3)  # (B, X, Y, O, ...)
    states = {"S": tensor.shape[4], "M": tensor.shape[-1]}.get(name[0])
    return (tensor if states is None else tensor.reshape(*tensor.shape[:4], states)).unsqueeze(3)


@BOTH
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, operator):
    """The original's outputs and, where they are known, all its gradients."""
    case = golden_cases.load(f"ops/{name}")
    oriented = "orientations" in name
    leaves = {key: ours(key, value, oriented) for key, value in case["inputs"].items()}
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    y = operator(**leaves)
    torch.testing.assert_close(y, ours("output", case["output"], oriented), rtol=1e-9, atol=1e-12)
    if "grads" in case:
        y.backward(ours("output", case["output_grad"], oriented))
        for key, value in case["grads"].items():
            if value is not None:
                torch.testing.assert_close(leaves[key].grad, ours(key, value, oriented), rtol=1e-9, atol=1e-12)


@BOTH
def test_golden_direction(operator):
    """An impulse in propagation mode is a binomial beam."""
    case = golden_cases.load("ops/plstm2d_direction")
    o, (height, width) = case["o"], case["grid"]
    one = torch.ones(1, height, width, 1, 1, 1, 1, dtype=torch.float64)
    impulse = torch.zeros_like(one[..., 0, 0])
    impulse[0, 0, 0] = 1
    y = operator(
        Q=one[..., 0, 0], K=impulse, V=one[..., 0, 0], S_r=o * one[..., 0], S_d=(1 - o) * one[..., 0], T_rl=o * one,
        T_ru=o * one, T_dl=(1 - o) * one, T_du=(1 - o) * one, M_l=one[..., 0], M_u=one[..., 0],
    ).view(height, width)  # fmt: skip
    torch.testing.assert_close(y, torch.tensor(case["output"], dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert y[0, 0] == 0 and math.isclose(y[2, 3], math.comb(5, 2) * o**2 * (1 - o) ** 3)


@pytest.mark.parametrize("number", range(50))
def test_twin_on_random_grids(number):
    inputs = plstm_inputs(**random_options(number))
    for dtype in (torch.float64, torch.float32):
        compare("plstm2d", all_used(plstm2d), all_used(plstm2d_reference), inputs, dtype)


@pytest.mark.parametrize("turns", ["propagation", "L", "R"])
def test_large_values_and_transitions_of_any_sign(turns):
    """Decay by exactly 1, 0 and -1, states that grow along the way, and values whose products overflow float16."""
    inputs = plstm_inputs(1, (9, 10), 1, 4, 4, turns=turns)
    for name in ("Q", "K", "V"):
        inputs[name] = 3e3 * inputs[name]
    for name in ("T_rl", "T_du"):
        inputs[name] = torch.randint(-1, 2, inputs[name].shape).float()
    inputs["T_rl"] = 1.5 * inputs["T_rl"]
    compare("plstm2d", plstm2d, plstm2d_reference, inputs, torch.float32)


def test_conservation():
    """What propagation mode sends on is what has arrived: marks of the last diagonal read the whole source."""
    side = 7
    inputs = plstm_inputs(1, (side, side), 1, 1, 1, orientations=1, direct=False)
    inputs = {name: value if value is None else value.double() for name, value in inputs.items()}
    inputs["T_ru"], inputs["T_dl"], inputs["T_du"] = inputs["T_rl"], 1 - inputs["T_rl"], 1 - inputs["T_rl"]
    inputs["S_d"] = 1 - inputs["S_r"]
    for name in ("Q", "V", "M_l", "M_u"):
        inputs[name] = torch.ones_like(inputs[name])
    inputs["K"] = torch.zeros_like(inputs["K"])
    inputs["K"][:, 0, 0] = 1
    y = plstm2d(**inputs).view(side, side)
    diagonal = y.flip(0).diagonal()
    torch.testing.assert_close(diagonal.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("states", [1, 2])
def test_decay_is_the_product_of_what_lies_between(states):
    steps = torch.randn(3, 5, states, states, dtype=torch.float64)
    products = decay(steps)
    want = steps[:, 3] @ steps[:, 2]
    torch.testing.assert_close(products[:, 4, :, 1], want)
    assert torch.equal(products[:, 2, :, 1], torch.eye(states, dtype=torch.float64).expand(3, -1, -1))
    assert not products[:, 2, :, 2:].any()


@pytest.mark.parametrize("turns", ["propagation", "L", "R"])
def test_no_images(turns):
    inputs = plstm_inputs(batch=0, turns=turns)
    want = run(plstm2d_reference, inputs)
    for name, value in run(plstm2d, inputs).items():
        assert value.shape == want[name].shape, name


INTERPRETED = [
    dict(batch=1, size=(3, 4), heads=1),
    dict(batch=1, size=(2, 2), heads=1, states=2, turns="L", direct=False),
    dict(batch=1, size=(1, 5), orientations=1),
    dict(batch=1, size=(6, 1), turns="R"),
    dict(batch=1, size=(2, 2), heads=1, key_dim=70, value_dim=17, turns="none"),
    dict(batch=1, size=(7, 5), heads=1, orientations=1, turns="L"),  # two blocks of sources
]


@pytest.mark.parametrize("options", INTERPRETED, ids=str)
@pytest.mark.usefixtures("interpreter")
def test_kernels_in_the_interpreter(monkeypatch, options):
    monkeypatch.setattr(plstm_walk, "_COLUMNS", 2)
    compare("plstm2d", all_used(plstm2d), all_used(plstm2d_reference), plstm_inputs(**options), torch.float32)


@pytest.mark.usefixtures("interpreter")
def test_kernels_take_heads_in_turns(monkeypatch):
    monkeypatch.setattr(plstm_walk, "_COLUMNS", 2)
    inputs = plstm_inputs(1, (1, 2), heads=3, orientations=1)
    want = run(plstm2d, inputs)
    monkeypatch.setattr(kernels.find("plstm2d"), "MAX_WORKSPACE", 2 * 3 * 2 * 32)  # two in the backward pass
    for name, value in run(plstm2d, inputs).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_half_precision(monkeypatch, dtype):
    """Views of one projection, as a model has them."""
    monkeypatch.setattr(plstm_walk, "_COLUMNS", 2)
    inputs = plstm_inputs(1, (1, 3), 2, 5, 5, orientations=1)
    projected = torch.randn(1, 1, 3, 2, 3, 5).to(dtype).transpose(3, 4)
    inputs |= dict(zip("QKV", projected.unbind(3)))
    compare("plstm2d", all_used(plstm2d), all_used(plstm2d_reference), inputs, dtype)


def on_gpu(**options):
    inputs = plstm_inputs(**options)
    return {name: None if value is None else value.cuda() for name, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("number", range(50))
def test_kernels_on_random_grids_on_a_gpu(number):
    """Against the twin in float64; heads and channels are few, so that few kernels are compiled."""
    options = random_options(number) | dict(heads=2, key_dim=16, value_dim=16, states=1 + (number % 10 == 0))
    inputs = on_gpu(**options)
    assert select_backend(inputs["Q"], "plstm2d").name == "triton"
    compare("plstm2d", all_used(plstm2d), all_used(plstm2d_reference), inputs, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turns", ["propagation", "L", "R"])
@pytest.mark.parametrize("size", [(14, 14), (5, 11)], ids=str)
def test_on_a_gpu(size, turns, dtype):
    """Channels of published models; bit-equal on repetition."""
    inputs = on_gpu(batch=2, size=size, heads=3, key_dim=64, value_dim=64, turns=turns)
    compare("plstm2d", all_used(plstm2d), all_used(plstm2d_reference), inputs, dtype)
    inputs = cast(inputs, dtype)
    second = run(plstm2d, inputs)
    for name, value in run(plstm2d, inputs).items():
        assert torch.equal(value, second[name]), name


def test_flips_are_their_own_inverse():
    values = torch.randn(2, 4, 3, 5)
    flipped = flip_orientations(values, 1, (2,), (3,))
    assert torch.equal(flipped[:, 1], values[:, 1].flip(1)) and torch.equal(flipped[:, 3], values[:, 3].flip(1, 2))
    assert torch.equal(flip_orientations(flipped, 1, (2,), (3,)), values)


@pytest.mark.parametrize("turns", ["propagation", "L"])
def test_few_images_at_a_time(monkeypatch, turns):
    inputs = plstm_inputs(batch=5, turns=turns)
    want = run(plstm2d, inputs)
    monkeypatch.setitem(torch_plstm.MAX_WEIGHTS, "cpu", 2 * 2 * 4 * 12**2)  # two images
    for name, value in run(plstm2d, inputs).items():
        check(name, value, want[name], TOLERANCE[torch.float32])


@pytest.mark.parametrize("turns", ["propagation", "L", "R"])
def test_repetition_is_bit_equal(turns):
    inputs = plstm_inputs(size=(5, 6), turns=turns)
    second = run(plstm2d, inputs)
    for name, value in run(plstm2d, inputs).items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("turns", ["propagation", "L", "R"])
def test_gradcheck(turns):
    inputs = plstm_inputs(1, (2, 3), 1, 2, 1, states=2, turns=turns)
    leaves = [None if value is None else value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(plstm2d, leaves)


def test_compiler_sees_one_node():
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    inputs = plstm_inputs()
    compiled = torch.compile(plstm2d, fullgraph=True, backend=backend)
    assert torch.equal(compiled(**inputs), plstm2d(**inputs))
    assert [name for name in seen if "vision_ssm" in name] == ["vision_ssm.plstm2d.default"] == seen


@pytest.mark.parametrize("turns", ["propagation", "L"])
def test_flops(turns):
    inputs = plstm_inputs(2, (3, 4), 2, 3, 5, orientations=4, states=1, turns=turns)
    with FlopCounterMode(display=False) as counter:
        run(lambda **given: plstm2d(**given), inputs)
    counted = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    moves = 2 * (4 if turns == "propagation" else 3) + 8
    forward = 48 * 15 * (4 * moves + 5)
    assert plstm2d_flops(48, 3, 5, 4, turns=2 if turns == "propagation" else 1) == forward
    assert counted == {"vision_ssm.plstm2d": forward, "vision_ssm.plstm2d_backward": 2 * forward}


def test_half_precision_is_computed_in_float32():
    inputs = {k: v if v is None else v.half() for k, v in plstm_inputs().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = plstm2d(**inputs)
    assert y.dtype == torch.float32
    assert torch.equal(y, plstm2d(**{name: value.float() for name, value in inputs.items()}))
    assert plstm2d(**cast(inputs, torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(Q=[1.0]), TypeError, "plstm2d: Q must be a tensor, got list"),
        (dict(Q=torch.zeros(2, 12, 2, 3)), ValueError, r"Q must be \(B, X, Y, H, DK\), got shape \(2, 12, 2, 3\)"),
        (dict(K=torch.zeros(2, 3, 4, 2, 4)), ValueError, r"K has shape .*, expected \(B, X, Y, H, DK\)"),
        (dict(V=torch.zeros(2, 4, 3, 2, 5)), ValueError, r"V has shape .*, expected \(B, X, Y, H, DV\)"),
        (dict(S_r=torch.zeros(2, 3, 4, 2, 2, 1)), ValueError, "S_r has 2 orientations, expected 1 or 4"),
        (dict(M_u=torch.zeros(2, 3, 4, 2, 4)), ValueError, r"M_u has shape .*, expected \(B, X, Y, H, O, J\)"),
        (dict(T_ru=torch.zeros(2, 3, 4, 2, 4, 1)), ValueError, r"T_ru has shape .*, expected \(B, X, Y, H, O, J, J\)"),
        (dict(D=torch.zeros(2)), ValueError, r"D has shape \(2,\), expected \(B, X, Y, H\)"),
        (dict(T_dl=torch.zeros(2, 3, 4, 2, 4, 1, 1).int()), TypeError, "T_dl must be floating-point"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        plstm2d(**plstm_inputs() | change)


@pytest.mark.parametrize("mode", ["propagation", "diffusion"])
def test_published_gates(mode):
    """As the paper's code has them at the start: orientation gates spread over heads, the rest depends on nothing."""
    mixer = build_scan(dict(type="plstm", mode=mode, num_heads=3), 24)
    gates = mixer.gates(torch.randn(2, 3, 4, 24))
    near = torch.sigmoid(torch.tensor(-4.0))
    torch.testing.assert_close(gates["M_l"], near.expand(2, 3, 4, 3, 4, 1))
    if mode == "diffusion":
        assert gates["T_dl"] is None
        torch.testing.assert_close(gates["T_ru"], torch.tensor(5.0).tanh().expand(2, 3, 4, 3, 4, 1, 1))
        return
    share = torch.sigmoid(torch.linspace(-2, 2, 3).repeat(4).view(3, 4))
    torch.testing.assert_close(gates["S_r"][0, 0, 0, :, :, 0], share * near)
    torch.testing.assert_close(gates["S_d"], 1 - gates["S_r"])
    torch.testing.assert_close(gates["T_rl"][1, 2, 3, ..., 0, 0], share * torch.tensor(5.0).tanh())
    assert gates["T_ru"] is gates["T_rl"] and gates["T_dl"] is gates["T_du"]
    torch.testing.assert_close(gates["T_dl"], 1 - gates["T_rl"])


def test_a_gate_sees_its_own_channels_alone():
    mixer = build_scan(dict(type="plstm", num_heads=2), 16)
    torch.nn.init.ones_(mixer.gate_weight)
    x = torch.zeros(1, 1, 1, 16)
    x[..., 10:12] = 1  # of head 1 and orientation 1
    marks = mixer.gates(x)["M_l"].flatten()
    assert (marks != marks[0]).nonzero().tolist() == [[5]]


def test_any_cell_reaches_any_other():
    for mode in ("propagation", "diffusion"):
        mixer = build_scan(dict(type="plstm", mode=mode), 8)
        x = torch.randn(1, 3, 4, 8, requires_grad=True)
        for cell in ((0, 0), (1, 2), (2, 3)):
            (grad,) = torch.autograd.grad(mixer(x)[0, *cell].sum(), x)
            assert grad.abs().sum(-1).min() > 0


def test_heads():
    assert [resolve_heads("auto", dim) for dim in (16, 64, 96, 192, 768)] == [1, 1, 1, 3, 12]
    for options, dim, message in (
        (dict(num_heads=3), 16, "4-fold divides dim=16, got 3"),
        (dict(), 6, "dim=6 is no multiple"),
        (dict(mode="difusion"), 16, "unknown mode 'difusion'. Did you mean 'diffusion'"),
        (dict(chirality="left"), 16, "chirality is 'L' or 'R', got 'left'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_scan(dict(type="plstm", **options), dim)


def test_modes_take_turns():
    def modes(**overrides):
        return [stage.mixer.mode[0] for stage in vision_ssm.create_model("plstm_micro", **overrides).stages]

    assert modes() == ["p", "d", "p", "d"] and modes(modes=("diffusion",)) == ["d"] * 4
    assert modes(scan=dict(mode="propagation")) == ["p"] * 4
    assert modes(scan=dict(chirality="R")) == ["p", "d", "p", "d"]


def test_the_classifier_sees_the_corners():
    model = vision_ssm.create_model("plstm_micro", num_classes=3).eval()
    features = torch.randn(2, 32, 4, 5)
    expected = [features[..., 0, 0], features[..., 3, 0], features[..., 0, 4], features[..., 3, 4]]
    assert torch.equal(model.forward_head(features, pre_logits=True), torch.cat(expected, dim=1))
    assert model.head.in_features == model.head_hidden_size == 128 and model.head.weight.abs().max() < 1e-4
    mean = vision_ssm.create_model("plstm_micro", num_classes=3, pooling="mean")
    assert mean.head.in_features == 32


def test_options_of_the_backbone():
    scaled = vision_ssm.create_model("plstm_micro", layer_scale=1e-4, drop_path_rate=0.1)
    assert scaled.stages[3].scale2.gamma.tolist() == pytest.approx([1e-4] * 32)
    assert {stage.drop_path.drop_prob for stage in scaled.stages} == {0.1}
    assert vision_ssm.create_model("plstm_micro", positions=False).pos_embed is None
    assert "stages.0.mixer.gate_bias" in scaled.no_weight_decay()
    tokens = vision_ssm.create_model("plstm_micro", scan="bidirectional", class_tokens="middle", num_classes=2)
    assert tokens.head.in_features == 32 and tokens(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    for options, message in (
        (dict(pooling="corner"), "unknown pooling 'corner'. Did you mean 'corners'"),
        (dict(modes=()), "modes must name at least one mode"),
        (dict(normed_map=True, features_only=True), "normed_map is for classifiers"),
    ):
        with pytest.raises(ValueError, match=message):
            vision_ssm.create_model("plstm_micro", **options)


CASE = golden_cases.load("plstm/plstm_vis_t_dmodeonly_80x96")


def test_official_weights_in_any_order_and_at_another_size():
    weights = golden_cases.weights(CASE)
    model = vision_ssm.import_official("plstm", CASE["config"], dict(sorted(weights.items()))).eval()
    image = golden_cases.images(CASE["input"])
    with torch.no_grad():
        assert golden_cases.sample_error(CASE["outputs"]["logits"], model(image)) < CASE["tolerance"]
    other = vision_ssm.create_model("plstm_vis_t_dmodeonly", img_size=(160, 192))
    assert load_state_dict(other, weights).complete and other.pos_embed.table.shape == (1, 192, 10, 12)
    with pytest.raises(ValueError, match="modes of an original pLSTM are 'P' and 'D', got 'X'"):
        vision_ssm.import_official("plstm", {**CASE["config"], "modes": ["X", "D"]}, weights)
    with pytest.raises(ValueError, match="layers=10 and num_blocks=6 disagree"):
        vision_ssm.import_official("plstm", {**CASE["config"], "layers": 10}, weights)


def test_official_weights_without_a_classifier():
    """The final norm is then the norm of the last map, and without it maps are not normalised."""
    weights = golden_cases.weights(CASE)
    image = golden_cases.images(CASE["input"])
    headless = {key: value for key, value in weights.items() if not key.startswith("head.")}
    model = vision_ssm.import_official("plstm", CASE["config"], headless)
    with torch.no_grad():
        (normed,) = model.forward_intermediates(image)
        assert golden_cases.sample_error(CASE["outputs"]["features"][0], normed) < CASE["tolerance"]
        bare = vision_ssm.import_official("plstm", CASE["config"], {k: v for k, v in headless.items() if k != "norm.scale"})
        (raw,) = bare.forward_intermediates(image)
        scale = weights["norm.scale"].view(1, -1, 1, 1)
        expected = raw * (raw.square().mean(1, keepdim=True) + 1e-5).rsqrt() * scale
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-4)


def test_weights_without_influence_are_not_trained():
    """Else a distributed run would wait for their gradients."""
    model = vision_ssm.create_model("plstm_micro", scan=dict(gate_weights=False), num_classes=2)
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert idle == {f"stages.{i}.mixer.transition_weight" for i in range(4)}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

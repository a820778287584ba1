"""What every backbone of the registry must do. Models are found in the registry: a new family is tested by itself."""

import fnmatch
import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch.nn.attention import SDPBackend, sdpa_kernel

import vision_ssm
from vision_ssm.analysis import count_macs
from vision_ssm.analysis.reported import COUNTED_OTHERWISE, REPORTED_GMACS, agrees
from vision_ssm.backbones.blocks import Stage
from vision_ssm.backbones.plain import PlainBackbone
from vision_ssm.factory import families, find_family
from vision_ssm.layers import RMSNorm
from vision_ssm.ops import chunked_scan_2d
from vision_ssm.registry import BACKBONES

MICRO = vision_ssm.list_models("*_micro")
SIZES = [(64, 64), (96, 160), (65, 97), (32, 32)]
EXPECTED = {family: json.loads((Path(__file__).parent / "expected" / f"{family}.json").read_text()) for family in families()}


def expected(name: str, key: str, default=None):
    """What ``tests/expected/FAMILY.json`` says of a variant.

    ``parameters``: their exact number; ``without_gradient``: patterns of parameters that the published architecture has
    and never uses.
    """
    return EXPECTED[find_family(name).family].get(key, {}).get(name, default)


def total(outputs) -> torch.Tensor:
    """Sum of the squares of all outputs: in training a model with a distilled head returns two."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(output.float().square().mean() for output in outputs)


def is_plain(model) -> bool:
    return isinstance(model, PlainBackbone)


def is_parallel(model) -> bool:
    """Whether every map depends on all stages; that nothing else is built is tested with the family."""
    return len({info["module"] for info in model.feature_info}) == 1


def test_every_family_has_a_micro_variant():
    assert {find_family(name).family for name in MICRO} == set(families())


@pytest.mark.parametrize("name", MICRO)
def test_function_transforms(name):
    """`torch.func`: gradients as by autograd, those of single images too, and directional derivatives."""
    torch.manual_seed(0)
    model = vision_ssm.create_model(name, num_classes=3).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, images=x):
        return torch.func.functional_call(model, {**parameters, **buffers}, (images,)).square().sum()

    fixed = {key: value.detach() for key, value in parameters.items()}
    found = torch.func.grad(loss)(fixed)
    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(fixed, x[:, None])
    model(x).square().sum().backward()
    for key, parameter in parameters.items():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[key], want, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(single[key].sum(0), want, msg=lambda text, key=key: f"{key}: {text}")
    direction = {key: torch.randn_like(value) for key, value in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the other ones of PyTorch have no tangents
        _, slope = torch.func.jvp(loss, (parameters,), (direction,))
    product = sum((found[key] * direction[key]).sum() for key in found)
    torch.testing.assert_close(slope.detach(), product, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*MICRO, *vision_ssm.list_unets("*_micro")])
def test_shapes_without_values(name):
    """On the device "meta", forward and backward."""
    with torch.device("meta"):
        model, images = vision_ssm.create_model(name, num_classes=3), torch.zeros(2, 3, 64, 48)
    output = model.eval()(images)
    output.sum().backward()
    assert output.is_meta and output.shape == ((2, 3) if name in MICRO else (2, 3, 64, 48))
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", ["vmamba_micro", "vim_micro", "efficientvim_micro"])
def test_recomputation_stands_aside_in_transforms(name):
    model = vision_ssm.create_model(name, num_classes=2).double().eval()
    for part in model.modules():  # dropped paths and batch norms stay as in evaluation
        part.training = isinstance(part, (type(model), Stage))
    model.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    found = torch.func.grad(lambda x: model(x).square().sum())(x)
    x.requires_grad_()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("name", [name for name in vision_ssm.list_models() if name not in MICRO])
def test_published_parameter_count(name):
    with torch.device("meta"):
        model = vision_ssm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected(name, "parameters")
    assert model.variant == name


# of every family that has a figure the smallest; tests/test_cards.py compares what the cards say of all, and the linter's
# step of the build counts those anew
SMALLEST = {find_family(name).family: name for name in sorted(vision_ssm.list_models(), key=lambda n: -REPORTED_GMACS.get(n, 0)) if name in REPORTED_GMACS}


@pytest.mark.parametrize("name", SMALLEST.values())
def test_macs_are_the_reported_ones(name):
    """Where a paper counts as we do, within 2 percent and its rounding; elsewhere there is a reason, and a need of it."""
    with torch.device("meta"):
        size = vision_ssm.create_model(name).pretrained_cfg["input_size"][1:]
    counted = count_macs(partial(vision_ssm.create_model, name), size)
    assert agrees(REPORTED_GMACS[name], counted) == (name not in COUNTED_OTHERWISE)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_size(name, size):
    model = vision_ssm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits, features, maps = model(x), model.forward_features(x), model.forward_intermediates(x)
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()
    torch.testing.assert_close(model.forward_head(features), logits)
    for info, feature in zip(model.out_info, maps, strict=True):
        cells = tuple(-(-side // info["reduction"]) for side in size)
        assert feature.shape == (2, info["num_chs"], *cells)
    if getattr(model, "class_tokens", "none") == "none":
        last = features[-1] if isinstance(features, list) else features  # behind what else the classifier sees
        assert last.shape == (2, model.num_features, *maps[-1].shape[2:])


@pytest.mark.parametrize("name", MICRO)
def test_gradient_reaches_every_parameter(name):
    model = vision_ssm.create_model(name, num_classes=5).train()
    total(model(torch.randn(2, 3, 64, 96))).backward()
    without = {
        key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    }
    dead = expected(name, "without_gradient", [])
    assert without == {key for key, _ in model.named_parameters() if any(fnmatch.fnmatchcase(key, d) for d in dead)}


@pytest.mark.parametrize("name", MICRO)
def test_grad_checkpointing_changes_nothing(name):
    model = vision_ssm.create_model(name, num_classes=5).train()
    x = torch.randn(2, 3, 32, 64)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        total(model(x)).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_autocast_is_finite_forward_and_backward(name, dtype, scale):
    model = vision_ssm.create_model(name, num_classes=5).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = total(model(scale * torch.randn(2, 3, 32, 64)))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MICRO)
def test_weights_of_half_precision(name):
    model = vision_ssm.create_model(name, num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, logits = model(x), model.bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    torch.testing.assert_close(logits.float(), expected, rtol=0.2, atol=0.2 * float(expected.std()) + 1e-2)


@pytest.mark.parametrize("name", MICRO)
def test_features_only(name):
    classifier = vision_ssm.create_model(name).eval()
    count = len(classifier.feature_info)
    model = vision_ssm.create_model(name, features_only=True, out_indices=(0, -2))  # in training, for batch norms
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model(x)
    assert [m.shape[1] for m in maps] == [classifier.feature_info[i]["num_chs"] for i in (0, count - 2)]
    if not is_parallel(model):
        assert len(model.stages) == count - 1, "stages behind the last feature get no gradient and must not be built"
    assert model.num_classes == 0 and not any(key.startswith(("head", "norm.")) for key in model.state_dict())
    for m in maps:  # fresh output norms: unit square over channels, and zero mean where the norm subtracts it
        if not isinstance(classifier.norm, RMSNorm):
            torch.testing.assert_close(m.mean(1), torch.zeros_like(m.mean(1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(m.square().mean(1), torch.ones_like(m.mean(1)), atol=1e-2, rtol=0)
    raw = vision_ssm.create_model(name, features_only=True, out_norm=False)
    vision_ssm.weights.load_state_dict(raw, classifier.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(raw.eval()(x), classifier.forward_intermediates(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="was built for out_indices"):
        model.forward_intermediates(x, out_indices=(count - 1,))


@pytest.mark.parametrize("name", MICRO)
def test_classifier_surgery(name):
    model = vision_ssm.create_model(name, num_classes=0).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model(x).shape == (1, model.head_hidden_size)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.double().reset_classifier(11)
    assert model(x.double()).shape == (1, 11) and model.num_classes == 11
    one_channel = vision_ssm.create_model(name, in_chans=1, num_classes=2).eval()
    assert one_channel(torch.randn(1, 1, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("name", MICRO)
def test_layer_decay_groups_cover_each_parameter_once(name):
    model = vision_ssm.create_model(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    stem = max(scale[id(p)] for key, p in names.items() if key.startswith("stem"))
    final = f"stages.{len(model.stages) - 1}."
    first = max(scale[id(p)] for key, p in names.items() if key.startswith(("stages.0.blocks.0.", "stages.0.norm")))
    last = min(scale[id(p)] for key, p in names.items() if key.startswith(final) and ".downsample." not in key)
    assert stem < first < last <= scale[id(names[model.classifier_key])] == 1.0
    assert model.no_weight_decay() <= set(names)
    kept = {key for key in names if key.endswith((".A_log", ".D", ".dt_proj_bias"))}
    assert kept and kept <= model.no_weight_decay()


@pytest.mark.parametrize("name", MICRO)
def test_compiles_to_one_graph(name):
    model = vision_ssm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_model_plans_its_routes_once(monkeypatch):
    """A plan waits for the device, so a compiled model must find those of earlier calls, its own and eager ones."""
    plans = []
    make = chunked_scan_2d._Plan.__init__
    monkeypatch.setattr(chunked_scan_2d._Plan, "__init__", lambda plan, *args: plans.append(args) or make(plan, *args))
    model = vision_ssm.create_model("vmamba_micro", depths=(1, 1), dims=16).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = [torch.randn(1, 3, *size) for size in ((64, 64), (64, 96), (64, 64))]  # sizes become symbolic in between
    with torch.no_grad():
        wanted = [model(x) for x in images]
        made = len(plans)
        for x, y in zip(images, wanted):
            torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-6)
    assert 0 < made == len(plans)


@pytest.mark.parametrize("name", MICRO)
def test_exports(name):
    model = vision_ssm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 48)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("scan", vision_ssm.list_scans())
def test_any_scan_in_any_backbone(name, scan):
    model = vision_ssm.create_model(name, num_classes=3, scan=scan)
    total(model(torch.randn(1, 3, 33, 67))).backward()  # more than one cell at stride 64, for batch norms
    dead = expected(name, "without_gradient", [])
    without = [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert all(any(fnmatch.fnmatchcase(key, pattern) for pattern in dead) for key in without), without


def test_scan_options_replace_some_of_the_variants_own():
    model = vision_ssm.create_model("vmamba_micro", scan=dict(routes="bidirectional", state_dim=3))
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.core.state_dim == 3 and repr(mixer.core.routes) == "Bidirectional(repeats=2)"
    assert not mixer.gate and mixer.core.dim == 16  # still the variant's
    other = vision_ssm.create_model("vmamba_micro", scan=dict(type="multi_direction"))
    assert other.stages[0].blocks[0].mixer.gate and other.stages[0].blocks[0].mixer.core.dim == 32
    none = vision_ssm.create_model("vmamba_micro", scan=False)
    assert none.stages[0].blocks[0].mixer is None


def test_position_table_serves_any_size():
    model = vision_ssm.create_model("vmamba_micro", pos_embed=True, img_size=64, num_classes=2)
    assert model.pos_embed.table.shape == (1, 16, 16, 16)
    assert "pos_embed.table" in model.no_weight_decay()
    assert model(torch.randn(1, 3, 64, 64)).shape == model(torch.randn(1, 3, 50, 90)).shape == (1, 2)


def test_names_and_patterns():
    assert vision_ssm.list_models("vmamba_tiny_*") == ["vmamba_tiny_m2", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"]
    assert vision_ssm.list_models("nothing*") == []
    for cls in BACKBONES.module_dict.values():
        module = inspect.getmodule(cls)
        assert all(callable(getattr(module, name)) for name in cls.variants), "entry points are generated"
        assert {"paper:", "source:"} <= set(module.__doc__.lower().split()), "a family file names paper and source"


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: vision_ssm.create_model("vmamba_tiny_s1l9"), KeyError, "unknown model 'vmamba_tiny_s1l9'. Did you mean 'vmamba_tiny_s1l8'"),
        (lambda: vision_ssm.create_model("vmamba_micro", drop_path=0.1), TypeError, "no keyword 'drop_path'. Did you mean 'drop_path_rate'"),
        (lambda: vision_ssm.create_model("vmamba_micro", stem="convs"), ValueError, "unknown stem 'convs'. Did you mean 'conv'"),
        (lambda: vision_ssm.create_model("vmamba_micro", norm="group"), ValueError, "unknown norm 'group'"),
        (lambda: vision_ssm.create_model("vmamba_micro", num_classes=-1), ValueError, "num_classes must be 0"),
        (lambda: vision_ssm.create_model("vmamba_micro", out_indices=(0,)), ValueError, "out_indices needs features_only=True"),
        (lambda: vision_ssm.create_model("vmamba_micro", features_only=True, out_indices=(4,)), ValueError, r"different stages in 0..3, got \(4,\)"),
        (lambda: vision_ssm.create_model("vmamba_micro", features_only=True, out_indices=2), TypeError, "a sequence of"),
        (lambda: vision_ssm.create_model("vmamba_micro", pretrained=True), ValueError, "no official weights are published"),
        (lambda: vision_ssm.create_model("vmamba_micro", in_chans=0), ValueError, "in_chans must be 1 or more, got 0"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(1, 1, 64, 64)), ValueError, r"takes images \(B, 3, H, W\), got \(1, 1, 64, 64\)"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(1, 64, 48, 3)), ValueError, r"got \(1, 64, 48, 3\); move the channels to the front: x.permute\(0, 3, 1, 2\)"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(3, 64, 48)), ValueError, r"make one image a batch: x.unsqueeze\(0\)"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(64, 48, 3)), ValueError, r"make one image a batch: x.permute\(2, 0, 1\).unsqueeze\(0\)"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), TypeError, "floating-point and normalised, got torch.uint8; scale them to 0..1"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(1, 3, 0, 64)), ValueError, r"got \(1, 3, 0, 64\); an image has one pixel at least"),
        (lambda: vision_ssm.create_model("vmamba_micro")(torch.zeros(1, 3, 31, 64)), ValueError, "at least 32 x 32 pixels, got 31 x 64"),
        (lambda: vision_ssm.create_model("vmamba_micro", features_only=True).reset_classifier(3), ValueError, "no classifier to reset"),
        (lambda: vision_ssm.create_model("vmamba_micro", dims=(16, 32)), ValueError, "one entry per stage"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()

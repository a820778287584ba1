"""The door to timm: what timm's own tests/test_models.py asserts, of every backbone; names, settings and weights."""

import fnmatch
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from test_models import expected
from timm.data import resolve_data_config, resolve_model_data_config
from timm.data.model_config import resolve_input_data_config
from timm.models import FeatureInfo, get_pretrained_cfg, load_checkpoint
from timm.models._factory import resolve_model_input_args
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2

import vision_ssm
from vision_ssm.download import DownloadError
from vision_ssm.factory import find_family
from vision_ssm.integrations.timm_registry import PREFIX, timm_name

MICRO = vision_ssm.list_models("*_micro")
NAMES = vision_ssm.list_models()
TAKEN = [name for name in NAMES if timm_name(name) != name]
IMAGE = (2, 3, 64, 96)


def logits_of(outputs) -> torch.Tensor:
    """As timm's tests do: two logits in training, of a head that learns from a teacher, one after the other."""
    return torch.cat(outputs) if isinstance(outputs, tuple) else outputs


# Names


PROBE = """
import json, warnings
import timm
from timm.models import _registry as registry
def state():
    return {
        "owner": {name: (fn.__module__, fn.__name__) for name, fn in registry._model_entrypoints.items()},
        "module": dict(registry._model_to_module),
        "settings": {name: repr(cfg) for name, cfg in registry._model_pretrained_cfgs.items()},
        "tags": {name: list(tags) for name, tags in registry._model_with_tags.items()},
        "weights": {name: True for name in registry._model_has_pretrained},
        "modules": {name: sorted(models) for name, models in registry._module_to_models.items()},
    }
before = state()
with warnings.catch_warnings():
    warnings.filterwarnings("error", message="Overwriting")
    import vision_ssm
after = state()
changed = [(kind, name) for kind in before for name in before[kind] if after[kind].get(name) != before[kind][name]]
import vision_ssm.integrations.timm_registry as door
door.register()
print(json.dumps([changed, len(after["owner"]) - len(before["owner"]), state() == after]))
"""


def test_no_name_of_timm_changes_owner():
    root = Path(vision_ssm.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    changed, added, same = json.loads(done.stdout)
    assert changed == [] and added == len(NAMES) and same, "a second registration must change nothing"


def test_timm_lists_every_name_once():
    listed = timm.list_models(module="vision_ssm")
    assert sorted(listed) == sorted(map(timm_name, NAMES)) and all(map(timm.is_model, listed))
    assert TAKEN == [f"efficientvim_m{i}{end}" for i in range(1, 5) for end in ("", "_dist")]
    assert set(timm.list_models("vmamba_tiny_*")) == set(vision_ssm.list_models("vmamba_tiny_*"))
    assert "vision_ssm" in timm.models.list_modules() and timm.models.is_model_in_modules("vmamba_micro", ["vision_ssm"])
    for name in TAKEN:
        with torch.device("meta"):
            theirs, ours = timm.create_model(name), timm.create_model(PREFIX + name)
        assert type(theirs).__module__.startswith("timm.")
        assert type(ours) is find_family(name) and ours.variant == name
        assert ours.pretrained_cfg["architecture"] == PREFIX + name


def test_listed_as_pretrained_is_what_can_be_downloaded():
    listed = set(timm.list_models(module="vision_ssm", pretrained=True))
    assert {"vmamba_tiny_s1l8", "vssd_tiny.ema_in1k", "vssd_tiny.mesa_in1k", "plainmamba_l1"} <= listed
    assert not {"vmamba_micro", "lbvim_tiny", "spatialmamba_tiny", "groupmamba_tiny"} & listed
    assert timm.models.is_model_pretrained("vssd_tiny") and not timm.models.is_model_pretrained("hrvmamba_nano")
    for name in listed:
        settings = get_pretrained_cfg(name)
        assert settings.url.startswith("https://") and settings.has_weights and settings.origin_url is None
    assert get_pretrained_cfg("spatialmamba_tiny").origin_url.startswith("https://drive.google.com/")
    assert timm.models.get_pretrained_cfg_value("vim_tiny", "license") == "apache-2.0"


# What timm's tests assert


@pytest.mark.parametrize("name", MICRO)
def test_forward(name):
    model = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        outputs = model(torch.randn(IMAGE))
    assert outputs.shape == (2, model.num_classes) and not torch.isnan(outputs).any()
    assert type(model) is type(vision_ssm.create_model(name)) and model.variant == name


@pytest.mark.parametrize("name", MICRO)
def test_backward(name):
    model = timm.create_model(name, pretrained=False, num_classes=42).train()
    count = sum(p.numel() for p in model.parameters())
    outputs = logits_of(model(torch.randn(IMAGE)))
    outputs.mean().backward()
    dead = expected(name, "without_gradient", [])
    for key, parameter in model.named_parameters():
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in dead):
            assert parameter.grad is not None, f"no gradient for {key}"
    reached = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    unused = sum(p.numel() for p in model.parameters() if p.grad is None)
    assert count == reached + unused and outputs.shape[-1] == 42 and not torch.isnan(outputs).any()


@pytest.mark.parametrize("name", MICRO)
def test_default_cfg_is_true(name):
    model = timm.create_model(name, pretrained=False).eval()
    assert model.num_classes >= 0 and model.num_features > 0 and model.head_hidden_size > 0
    settings, parameters = model.default_cfg, set(model.state_dict())
    size = settings["input_size"]
    x = torch.randn(1, size[0], *(min(side, 64) for side in size[1:]))
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
        torch.testing.assert_close(logits, model(x))
        assert pooled.shape == (1, model.head_hidden_size)
        if settings["pool_size"] is not None:
            stride = model.feature_info[-1]["reduction"]
            assert settings["pool_size"] == tuple(math.ceil(side / stride) for side in size[1:])
            last = features[-1] if isinstance(features, list) else features  # behind hidden states
            assert last.shape == (1, model.num_features, *(math.ceil(side / stride) for side in x.shape[2:]))
        model.reset_classifier(0)
        assert model.num_classes == 0 and model(x).shape == pooled.shape
        model.reset_classifier(0, "")
        unpooled = model(x)
        assert unpooled.shape == (features[-1] if isinstance(features, list) else features).shape
        built = timm.create_model(name, num_classes=0, global_pool="").eval()
        assert built.num_classes == 0 and built(x).shape == unpooled.shape
    assert built.pretrained_cfg["classifier"] is None
    built.reset_classifier(5)
    assert built.pretrained_cfg["classifier"] == settings["classifier"]
    classifiers = settings["classifier"]
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        assert f"{classifier}.weight" in parameters
    assert f"{settings['first_conv']}.weight" in parameters
    assert model.get_submodule(settings["first_conv"]).in_channels == 3


@pytest.mark.parametrize("name", MICRO)
def test_loads_a_checkpoint(name, tmp_path):
    """The path of `timm.create_model` and of timm's validate.py, with in_chans and num_classes."""
    options = dict(num_classes=5, in_chans=4, drop_path_rate=0.0)
    model = timm.create_model(name, **options)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "c.pth")
    loaded = timm.create_model(name, **options, checkpoint_path=tmp_path / "c.pth")
    again = timm.create_model(name, **options)
    load_checkpoint(again, str(tmp_path / "c.pth"))
    first, second = loaded.state_dict(), again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], value) and torch.equal(second[key], value)


@pytest.mark.parametrize("name", MICRO)
def test_features(name):
    model = timm.create_model(name, pretrained=False, features_only=True).eval()
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    with torch.no_grad():
        outputs = model(torch.randn(IMAGE))
    assert len(channels) == len(outputs) == len(model.feature_info.get_dicts())
    for width, stride, output in zip(channels, strides, outputs):
        assert output.shape[:2] == (2, width) and not torch.isnan(output).any()
        assert all(math.ceil(side / stride) == cells for side, cells in zip(IMAGE[2:], output.shape[2:]))
    few = timm.create_model(name, features_only=True, out_indices=(0, -1))
    assert few.feature_info.channels() == [few.feature_info[i]["num_chs"] for i in few.out_indices]
    assert few.out_indices == [0, len(few.feature_info) - 1]
    last = timm.create_model(name, features_only=True, out_indices=2)
    assert last.out_indices == [len(few.feature_info) - 2, len(few.feature_info) - 1]


@pytest.mark.parametrize("name", MICRO)
def test_forward_intermediates(name):
    model = timm.create_model(name, pretrained=False).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = torch.randn(IMAGE)
    with torch.no_grad():
        output, maps = model.forward_intermediates(x, output_fmt="NCHW")
        features = model.forward_features(x)
        assert len(info.channels()) == len(maps)
        for width, stride, m in zip(info.channels(), info.reduction(), maps):
            assert m.shape == (2, width, *(math.ceil(side / stride) for side in IMAGE[2:]))
        torch.testing.assert_close(output, features)
        only = model.forward_intermediates(x, indices=2, intermediates_only=True)
        torch.testing.assert_close(only, maps[-2:])
        first, (same,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        torch.testing.assert_close((first, same), (maps[0], maps[0]))
        normed = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)[0]
        if isinstance(features, torch.Tensor) and features.shape == normed.shape and name != "hrvmamba_micro":
            torch.testing.assert_close(normed, features)
        listed = model.forward_intermediates(x)
        assert isinstance(listed, list) and len(listed) == len(model.out_indices), "without timm's keywords, maps alone"


@pytest.mark.parametrize("name", MICRO)
def test_pruned_and_wrapped_as_a_getter_of_features(name):
    model = timm.create_model(name).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        maps = model.forward_intermediates(x, out_indices=(0, 1))
        before = sum(p.numel() for p in model.parameters())
        wrapped = FeatureGetterNet(model, out_indices=(0, 1))
        torch.testing.assert_close(wrapped(x), maps)
    assert wrapped.feature_info.channels() == [m.shape[1] for m in maps]
    assert sum(p.numel() for p in wrapped.parameters()) < before and model.num_classes == 0
    assert not any(key.startswith(("head.", "norm.", "class_block.", "neck.")) for key in model.state_dict())


@pytest.mark.parametrize("name", MICRO)
def test_training_script_of_timm(name):
    """What timm's train.py calls: optimizer with layer decay, checkpointing, the data's settings."""
    model = timm.create_model(name, num_classes=3, in_chans=3, drop_rate=0.1, drop_path_rate=None, global_pool=None)
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    assert timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    settings = resolve_model_data_config(model)
    assert settings == resolve_data_config(dict(), model=model) and settings["crop_pct"] == model.default_cfg["crop_pct"]
    loss = logits_of(model(torch.randn(IMAGE))).square().mean()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_created_through_timm(name):
    with torch.device("meta"):
        model = timm.create_model(timm_name(name), pretrained=False)
    assert type(model) is find_family(name) and model.variant == name
    settings, registered = model.pretrained_cfg, get_pretrained_cfg(timm_name(name)).to_dict()
    assert {key: settings[key] for key in registered if registered[key] is not None} == {
        key: value for key, value in registered.items() if value is not None
    }
    own = {**find_family(name).common_cfg, **find_family(name).published.get(name, {})}
    assert settings["input_size"] == own["input_size"]
    assert resolve_model_data_config(model)["crop_pct"] == own["crop_pct"]
    if not model.features_only:
        assert settings["classifier"] and settings["num_classes"] == model.num_classes == 1000
    assert f"{settings['first_conv']}.weight" in model.state_dict()
    assert len(model.feature_info.channels()) == len(model.out_info)


def test_arguments_of_timms_scripts():
    """train.py and validate.py turn their command line into keywords, and the model into settings of the data."""
    arguments = resolve_model_input_args("vssd_micro", args=dict(in_chans=4, img_size=96), num_classes=3, pretrained=False)
    model = timm.create_model(**arguments)
    assert model.in_chans == 4 and model.num_classes == 3 and model.variant == "vssd_micro"
    assert resolve_input_data_config(model, args=dict(img_size=96))["input_size"] == (4, 96, 96)
    tagged = resolve_model_input_args("vssd_tiny.mesa_in1k")
    assert tagged["model_name"] == "vssd_tiny" and tagged["pretrained_cfg"]["tag"] == "mesa_in1k"


# Settings and weights


def official(variant: str, tmp_path, **options):
    """A file that stands for published weights: a fresh model of the variant, as a training script writes it."""
    model = vision_ssm.create_model(variant, **options)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return model, tmp_path / "weights.pth"


def test_weights_of_a_file_with_other_classes_and_channels(tmp_path):
    model, file = official("vmamba_micro", tmp_path)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    same = timm.create_model("vmamba_micro", **options)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))
    other = timm.create_model("vmamba_micro", **options, num_classes=7, in_chans=1)
    assert other.num_classes == 7 and torch.equal(other.stages[0].blocks[0].norm1.weight, model.stages[0].blocks[0].norm1.weight)
    torch.testing.assert_close(other.stem.conv1.weight, model.stem.conv1.weight.sum(1, keepdim=True))
    assert timm.create_model("vmamba_micro", **options, in_chans=4).stem.conv1.weight.shape[1] == 4
    dense = timm.create_model("vmamba_micro", **options, features_only=True, out_indices=(1, 2))
    assert torch.equal(dense.stem.conv1.weight, model.stem.conv1.weight)
    given = timm.create_model("vmamba_micro", pretrained=True, pretrained_cfg=dict(state_dict=model.state_dict()))
    assert torch.equal(given.head.weight, model.head.weight)


def test_weights_from_the_cache_by_tag(tmp_path):
    small = dict(depths=(1, 1, 1, 1), dims=16, heads=(1, 2, 4, 8))
    for tag, seed in (("ema_in1k", 1), ("mesa_in1k", 2)):
        torch.manual_seed(seed)
        weights = vision_ssm.create_model("vssd_tiny", **small).state_dict()
        torch.save({"model": weights}, tmp_path / find_family("vssd_tiny").weights_of("vssd_tiny")[tag]["file"])
        options = dict(small, cache_dir=tmp_path)
        for model in (
            timm.create_model(f"vssd_tiny.{tag}", pretrained=True, **options),
            timm.create_model("vssd_tiny", pretrained=True, pretrained_cfg=tag, **options),
            vision_ssm.create_model("vssd_tiny", pretrained=tag, **options),
            vision_ssm.create_model(f"vssd_tiny.{tag}", pretrained=True, **options),
        ):
            assert torch.equal(model.head.weight, weights["head.weight"]) and model.pretrained_cfg["tag"] == tag
    default = vision_ssm.create_model("vssd_tiny", pretrained=True, cache_dir=tmp_path, **small)
    assert default.pretrained_cfg["tag"] == "ema_in1k" and default.pretrained_cfg["notes"][0].startswith("top1 83.6")


def test_settings_pass_through():
    model = timm.create_model("vmamba_micro", pretrained_cfg_overlay=dict(input_size=(4, 96, 96), crop_pct=1.0, num_classes=3))
    assert model.in_chans == 4 and model.num_classes == 3 and model.default_cfg is model.pretrained_cfg
    assert resolve_model_data_config(model)["input_size"] == (4, 96, 96) and model.pretrained_cfg["pool_size"] == (3, 3)
    again = timm.create_model("vmamba_micro", pretrained_cfg={**model.pretrained_cfg, "top1": 1.0})
    assert again.pretrained_cfg == model.pretrained_cfg
    half = timm.create_model("vmamba_micro", dtype=torch.bfloat16, device="meta", scriptable=True, exportable=True, no_jit=True)
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, "meta")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyramid = timm.create_model("plainmamba_micro", features_only=True, pyramid=True, out_indices=(-1,))
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: timm.create_model("vmamba_tiny_s1l9"), RuntimeError, "Unknown model"),
        (lambda: timm.create_model("vssd_tiny.mesa"), RuntimeError, r"Invalid pretrained tag \(mesa\) for vssd_tiny"),
        (lambda: vision_ssm.create_model("vssd_tiny.mesa"), KeyError, "vssd_tiny has no weights 'mesa'. Did you mean 'mesa_in1k'"),
        (lambda: vision_ssm.create_model("vssd_tiny", pretrained="mesa"), KeyError, "vssd_tiny has no weights 'mesa'. Did you mean 'mesa_in1k'"),
        (lambda: vision_ssm.create_model("vssd_tiny.ema_in1k", pretrained="mesa_in1k"), ValueError, "name two trainings: give one"),
        (lambda: vision_ssm.create_model("vim_tiny.in1k"), KeyError, "only one training of it is published; leave the tag out"),
        (lambda: vision_ssm.create_model("vmamba_tiny_s1l9.x"), KeyError, "unknown model 'vmamba_tiny_s1l9'. Did you mean 'vmamba_tiny_s1l8'"),
        (lambda: timm.create_model("vmamba_micro", pretrained=True), RuntimeError, "no official weights are published for vmamba_micro"),
        (lambda: timm.create_model("vmamba_micro", drop_path=0.1), TypeError, "no keyword 'drop_path'. Did you mean 'drop_path_rate'"),
        (lambda: timm.create_model("vmamba_micro", in_chans=0), ValueError, "in_chans must be 1 or more, got 0"),
        (lambda: timm.create_model("vmamba_micro", features_only=True, out_indices=(0, 4)), ValueError, r"different stages in 0..3, got \(0, 4\)"),
        (lambda: timm.create_model("vmamba_micro", features_only=True, out_indices=5), ValueError, "different stages in 0..3"),
        (lambda: timm.create_model("vmamba_micro", out_indices=(0,)), ValueError, "out_indices needs features_only=True"),
        (lambda: timm.create_model("vmamba_micro", global_pool="max"), ValueError, "VMamba pools by 'avg': global_pool is that, or '' for none, got 'max'"),
        (lambda: timm.create_model("vmamba_micro", global_pool=""), ValueError, "global_pool='' goes with num_classes=0"),
        (lambda: timm.create_model("vmamba_micro").forward_intermediates(torch.zeros(1, 3, 64, 64), indices=5), ValueError, "indices=5 asks for the last maps of 4"),
        (lambda: timm.create_model("vmamba_micro").forward_intermediates(torch.zeros(1, 3, 64, 64), (0,), indices=[1]), ValueError, "two names of the same"),
        (lambda: timm.create_model("vmamba_micro").forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC"), ValueError, "output_fmt is 'NCHW'"),
        (lambda: vision_ssm.create_model("vmunet_micro", pretrained="x"), ValueError, "no official weights are published for it"),
        (lambda: timm.create_model("spatialmamba_tiny", pretrained=True, cache_dir="no/such"), DownloadError, r"is a web page. Download https://drive.google.com\S+ yourself and put it at no/such/spatialmamba_tiny.pth"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_weights_of_another_family(tmp_path):
    _, file = official("vssd_micro", tmp_path)
    message = "this is no vmamba checkpoint: it looks like a (spatialmamba or )?vssd checkpoint"
    with pytest.raises(vision_ssm.CheckpointError, match=message):
        timm.create_model("vmamba_micro", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    with pytest.raises(vision_ssm.CheckpointError, match=message):
        vision_ssm.create_model("vmamba_micro", pretrained=file)

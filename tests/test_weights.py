"""Checkpoint files: wrappers, prefixes, older names, and everything that can be wrong with one."""

import argparse
import collections
import pickle
import zipfile

import golden_cases
import pytest
import torch
from safetensors.torch import save_file

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.weights import load_state_dict, read_checkpoint, unwrap

CASE = golden_cases.load("vmamba/micro_v05_noz_ln2d")
CONFIG = CASE["config"]


@pytest.fixture
def official():
    return golden_cases.weights(CASE)


def small(**overrides):
    """The model that the official case describes, under a variant's name."""
    settings = dict(num_classes=37, scan=dict(expand=2.0))
    return vision_ssm.create_model("vmamba_micro", **{**settings, **overrides}).eval()


def save(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


class Config(dict):
    """Pickled as a config of yacs is: items and attributes of a class derived from dict."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__["__immutable__"] = True


WRAPPERS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda weights: {"state_dict": weights, "meta": {"epoch": 3}},
    "data parallel": lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
    "compiled": lambda weights: {"model": {f"_orig_mod.module.{key}": value for key, value in weights.items()}},
    "dense framework": lambda weights: {"state_dict": {f"backbone.{key}": value for key, value in weights.items()}},
    "ema beside": lambda weights: {
        "model": {key: torch.zeros_like(value) for key, value in weights.items()},
        "model_ema": weights,
    },
    "yacs beside": lambda weights: {"model": weights, "config": Config(DATA=Config(SIZE=224), NAMES=["a"])},
    "collections beside": lambda weights: {
        "model": weights,
        "meters": collections.defaultdict(collections.deque, loss=collections.deque([1.0], maxlen=20)),
    },
    "argparse beside": lambda weights: {"model": weights, "args": argparse.Namespace(lr=1e-3)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_unwrapping(wrapper, official, tmp_path, capsys):
    model = small()
    report = vision_ssm.load_weights(model, save(tmp_path, WRAPPERS[wrapper](official)))
    assert report.complete and not report.ignored and len(report.loaded) == len(CASE["state_dict"])
    assert "114 tensors loaded" in capsys.readouterr().out
    with torch.no_grad():
        logits = model(golden_cases.images(CASE["input"]))
    assert golden_cases.sample_error(CASE["outputs"]["logits"], logits) < CASE["tolerance"]


def test_safetensors_and_our_own_names(official, tmp_path):
    model = small()
    vision_ssm.load_weights(model, save(tmp_path, official))
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    other = small()
    report = vision_ssm.load_weights(other, tmp_path / "ours.safetensors", verbose=False)
    assert report.complete
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_plain_weights_on_request(official, tmp_path):
    file = save(tmp_path, WRAPPERS["ema beside"](official))
    model = small()
    vision_ssm.load_weights(model, file, ema=False, verbose=False)
    assert not model.head.weight.any()


def test_names_of_the_first_version(tmp_path):
    case = golden_cases.load("vmamba/micro_v0_scanonly")
    renames = (
        ("patch_embed.0.", "patch_embed.proj."),
        ("patch_embed.2.", "patch_embed.norm."),
        ("classifier.norm.", "norm."),
        ("classifier.head.", "head."),
        (".op.", ".self_attention."),
    )
    old = {}
    for key, value in golden_cases.weights(case).items():
        if ".blocks." in key and (".norm.weight" in key or ".norm.bias" in key) and "out_norm" not in key:
            key = key.replace(".norm.", ".ln_1.")
        for new_name, old_name in renames:
            key = key.replace(new_name, old_name) if not key.startswith("layers") or new_name == ".op." else key
        old[key] = value
    assert any("ln_1" in key for key in old) and any(key.startswith("norm.") for key in old)
    model = vision_ssm.import_official("vmamba", case["config"], old)
    with torch.no_grad():
        logits = model(golden_cases.images(case["input"]))
    assert golden_cases.sample_error(case["outputs"]["logits"], logits) < case["tolerance"]


def test_1x1_convolutions_as_linear_weights(official):
    for key in official:
        if key.endswith(("in_proj.weight", "fc1.weight")):
            official[key] = official[key][:, :, None, None]
    model = vision_ssm.import_official("vmamba", CONFIG, official)
    assert model.stages[0].blocks[0].mixer.in_proj.weight.ndim == 2


def test_position_table_is_resampled_on_load():
    case = golden_cases.load("vmamba/micro_v05_noz_posembed_noconv_down2")
    weights = golden_cases.weights(case)
    model = vision_ssm.import_official("vmamba", {**case["config"], "imgsize": 96}, weights)
    expected = torch.nn.functional.interpolate(weights["pos_embed"], size=(24, 24), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.table.detach(), expected)


def test_pickled_objects_are_not_run(official, tmp_path):
    flag = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(flag)!r}, 'w')",))

    file = save(tmp_path, {"model": official, "config": Bomb()})
    report = vision_ssm.load_weights(small(), file, verbose=False)
    assert report.complete and not flag.exists()
    torch.load(file, weights_only=False)
    assert flag.exists(), "the file does run when it is unpickled without care"


def test_legacy_format_with_objects_is_refused_or_read_without_running(official, tmp_path):
    flag = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(flag)!r}, 'w')",))

    file = tmp_path / "old.pth"
    torch.save({"model": official, "config": Bomb()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old.pth"):
        read_checkpoint(file)
    assert not flag.exists()


def test_missing_file_names_its_neighbours(tmp_path):
    save(tmp_path, {}, "vmamba_tiny.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint file .*vmamba_tin.pth. Checkpoints in that folder: vmamba_tiny.pth"
    ):
        read_checkpoint(tmp_path / "vmamba_tin.pth")
    with pytest.raises(FileNotFoundError, match=r"is a folder: name a file in it. Checkpoints in that folder: vmamba_tiny"):
        read_checkpoint(tmp_path)


def test_weights_of_another_variant_at_another_image_size(tmp_path):
    """The size of the position table says nothing of the variant, as it is resampled."""
    file = save(tmp_path, vision_ssm.create_model("plstm_vis_t", img_size=96).state_dict())
    with pytest.raises(CheckpointError, match="the file fits plstm_vis_t, not plstm_micro") as error:
        vision_ssm.load_weights(vision_ssm.create_model("plstm_micro"), file, adapt_input=True)
    assert "adapted" not in str(error.value)


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path):
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl"))).header_offset
    data = bytearray(path.read_bytes())
    data[offset + 60 : offset + 90] = b"\xff" * 30
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda path: path.write_bytes(b""), "file.pth is empty"),
        (_truncated, "truncated, corrupt, or no checkpoint"),
        (_flipped, "truncated, corrupt, or no checkpoint"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "is a web page, not a checkpoint"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
        (lambda path: path.write_bytes(b"some text that is no archive"), "truncated, corrupt, or no checkpoint"),
        (lambda path: path.write_bytes(b"hello\n"), "no checkpoint: it is no file of PyTorch. Compare"),
        (
            lambda path: path.write_bytes(pickle.dumps([1, 2])),
            "truncated, corrupt, or no checkpoint|holds no state dict",
        ),
    ],
)
def test_spoiled_files(spoil, message, official, tmp_path):
    file = save(tmp_path, official)
    spoil(file)
    with pytest.raises(CheckpointError, match=message):
        vision_ssm.load_weights(small(), file)


def test_truncated_safetensors(official, tmp_path):
    save_file(official, tmp_path / "file.safetensors")
    _truncated(tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="file.safetensors .* truncated, corrupt"):
        vision_ssm.load_weights(small(), tmp_path / "file.safetensors")


def test_no_state_dict_inside():
    with pytest.raises(CheckpointError, match="holds no state dict; found epoch, lr"):
        unwrap({"epoch": 3, "lr": 0.1}, "file.pth")


def test_wrong_family():
    keys = {"conv1.weight": torch.zeros(1), "layer1.0.bn1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match="this is no vmamba checkpoint: its keys begin with conv1.weight, fc.bias"
    ):
        load_state_dict(small(), keys)


def test_wrong_variant_is_named():
    with torch.device("meta"):
        file = vision_ssm.create_model("vmamba_tiny_s2l5", num_classes=10).state_dict()
        model = vision_ssm.create_model("vmamba_tiny_s1l8", num_classes=10)
    with pytest.raises(CheckpointError, match="the file fits vmamba_tiny_s2l5, not vmamba_tiny_s1l8"):
        load_state_dict(model, file)


def test_a_failed_load_changes_nothing(official):
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del official["layers.1.blocks.0.op.Ds"]
    with pytest.raises(CheckpointError, match=r"missing from the file: stages.1.blocks.0.mixer.core.D"):
        load_state_dict(model, official)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_left_over_keys_are_an_error_unless_asked_for(official):
    official["layers.0.blocks.0.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="not in the model: stages.0.blocks.0.extra"):
        load_state_dict(small(), official)
    report = load_state_dict(small(), official, strict=False)
    assert report.unexpected == ["stages.0.blocks.0.extra"] and not report.complete


def test_another_number_of_classes(official, tmp_path):
    with pytest.raises(CheckpointError, match="37 classes in the file and 5 in the model; pass reset_head=True"):
        load_state_dict(small(num_classes=5), official)
    model = small(num_classes=5)
    fresh = model.head.weight.clone()
    report = load_state_dict(model, official, reset_head=True)
    assert report.complete and torch.equal(model.head.weight, fresh)
    assert report.ignored == {"classifier of another size, re-initialised": ["head.weight", "head.bias"]}
    file = save(tmp_path, official)
    with pytest.raises(CheckpointError, match="pass reset_head=True"):
        small(num_classes=5, pretrained=file)
    again = small(num_classes=5, pretrained=file, reset_head=True)
    torch.testing.assert_close(again.stem.conv1.weight, official["patch_embed.0.weight"])


def test_a_backbone_takes_a_classifiers_weights(official):
    model = small(features_only=True, num_classes=1000, out_indices=(0, 1))
    report = load_state_dict(model, official)
    assert report.complete
    assert set(report.ignored) == {
        "classifier of a model without one",
        "stage behind the last one asked for",
        "output norms that a classifier's weights do not have",
    }


@pytest.mark.parametrize(
    "change,error,message",
    [
        (
            dict(ssm_dstate=4),
            ValueError,
            "unknown hyperparameters of an original VMamba: ssm_dstate. Did you mean 'ssm_d_state'",
        ),
        (dict(norm_layer="gn"), ValueError, "unknown norm_layer 'gn'"),
        (dict(forward_type="v7"), ValueError, "unknown forward_type 'v7'"),
        (dict(downsample_version="v9"), ValueError, "unknown downsample_version 'v9'"),
        (dict(ssm_d_state=2), CheckpointError, "does not fit"),
    ],
)
def test_wrong_hyperparameters(change, error, message, official):
    with pytest.raises(error, match=message):
        vision_ssm.import_official("vmamba", {**CONFIG, **change}, official)


def test_unknown_family(official):
    with pytest.raises(KeyError, match="unknown family 'vmambo'. Did you mean 'vmamba'"):
        vision_ssm.import_official("vmambo", CONFIG, official)


@pytest.mark.parametrize("name", ["groupmamba_micro", "vcmamba_micro"])
def test_fresh_classifier_in_place_of_a_distilled_one(name):
    """Fine-tuning without a teacher has use for one classifier alone."""
    taught = vision_ssm.create_model(name, num_classes=7)
    model = vision_ssm.create_model(name, num_classes=3, distilled=False)
    with pytest.raises(CheckpointError, match="not in the model: head.label.weight"):
        load_state_dict(model, taught.state_dict())
    report = load_state_dict(model, taught.state_dict(), reset_head=True)
    assert "head.teacher.weight" in report.ignored["classifier of another form, re-initialised"]
    assert report.complete and not any(key.startswith("head.") for key in report.loaded)


def test_import_of_a_whole_checkpoint(official):
    image = golden_cases.images(CASE["input"])
    plain = vision_ssm.import_official("vmamba", CONFIG, official)
    for wrap in (lambda weights: {"model": weights, "epoch": 3}, lambda weights: {f"module.{k}": v for k, v in weights.items()}):
        model = vision_ssm.import_official("vmamba", CONFIG, wrap(official))
        with torch.no_grad():
            assert torch.equal(model(image), plain(image))
    with pytest.raises(CheckpointError, match="the given vmamba checkpoint holds no state dict"):
        vision_ssm.import_official("vmamba", CONFIG, {"epoch": 3})


def test_forms_that_are_recognised_by_their_hyperparameters_alone(official, tmp_path):
    """Without mixers the blocks of VMamba could be anybody's."""
    bare = {key: value for key, value in official.items() if ".op." not in key and ".norm." not in key}
    bare |= {key: value for key, value in official.items() if key.startswith(("classifier.norm", "patch_embed"))}
    bare |= {key: value for key, value in official.items() if ".downsample." in key}
    model = vision_ssm.import_official("vmamba", {**CONFIG, "ssm_ratio": 0.0}, bare)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.nn.init.zeros_(model.head.weight)
    assert vision_ssm.load_weights(model, save(tmp_path, {"model": bare}), verbose=False).complete
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_counters_of_batch_norms_may_be_missing():
    model = vision_ssm.create_model("efficientvim_micro")
    kept = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    report = load_state_dict(model, kept)
    assert report.complete and list(report.ignored) == ["counter of a batch norm, which the file does not have"]


def test_a_changed_variant_is_told_from_the_published_one():
    changed = vision_ssm.create_model("efficientvim_micro", mlp_ratio=2.0)
    with pytest.raises(CheckpointError, match="the file fits efficientvim_micro, not this one with another mlp_ratio"):
        load_state_dict(changed, vision_ssm.create_model("efficientvim_micro").state_dict())

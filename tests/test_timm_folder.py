"""Folders that timm loads models from: written by us, and read back exactly by both."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import vision_ssm
from vision_ssm.integrations.timm_folder import save_timm_folder

MICRO = vision_ssm.list_models("*_micro")


def same_weights(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", MICRO)
def test_comes_back_exactly(name, tmp_path):
    names = ["cat", "dog", "Fuß", "four", "five"]
    model = vision_ssm.create_model(name, num_classes=5, in_chans=4).eval()
    assert save_timm_folder(model, tmp_path / "new" / "folder", label_names=names) == tmp_path / "new" / "folder"
    folder = f"local-dir:{tmp_path / 'new' / 'folder'}"
    again = timm.create_model(folder, pretrained=True).eval()
    assert type(again) is type(model) and again.variant == name and same_weights(model, again)
    assert again.num_classes == 5 and again.in_chans == 4 and again.pretrained_cfg["label_names"] == names
    x = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    other = timm.create_model(folder, pretrained=True, num_classes=3)
    assert other.num_classes == 3 and same_weights(other.stages, model.stages)


def test_keywords_changes_and_names_come_along(tmp_path):
    model = vision_ssm.create_model("vmamba_micro", num_classes=3, scan=dict(type="noncausal_ssd"), dims=(8, 16, 24, 32))
    save_timm_folder(model, tmp_path, label_names=dict(enumerate("abc")))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vmamba_micro" and config["label_names"] == {"0": "a", "1": "b", "2": "c"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(model, again) and again.num_features == 32
    save_timm_folder(again, tmp_path, overwrite=True)  # keeps the names
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(model, again) and again.pretrained_cfg["label_names"] == config["label_names"]
    again.reset_classifier(7)
    save_timm_folder(again, tmp_path, overwrite=True)
    changed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(changed, again) and changed.num_classes == 7 and "label_names" not in changed.pretrained_cfg
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dense_models_and_names_that_timm_owns(tmp_path):
    dense = vision_ssm.create_model("vssd_micro", features_only=True, out_indices=(1, 2))
    again = timm.create_model(f"local-dir:{save_timm_folder(dense, tmp_path / 'dense')}", pretrained=True)
    assert again.out_indices == [1, 2] and same_weights(dense, again)
    small = dict(depths=(1, 1, 1), dims=(16, 24, 32), states=(4, 4, 4), num_classes=2)
    ours = vision_ssm.create_model("efficientvim_m1", **small)
    folder = save_timm_folder(ours, tmp_path / "taken")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "vision_ssm_efficientvim_m1"
    assert same_weights(timm.create_model(f"local-dir:{folder}", pretrained=True), ours)
    without = vision_ssm.create_model("vim_micro", num_classes=0, global_pool="")
    again = timm.create_model(f"local-dir:{save_timm_folder(without, tmp_path / 'none')}", pretrained=True)
    assert again.num_classes == 0 and again.global_pool == "" and same_weights(without, again)


def test_files_are_those_of_timm(tmp_path):
    """timm writes the same for a model that it made, and `load_weights` reads the file too."""
    model = timm.create_model("vmamba_micro", num_classes=4)
    save_for_hf(model, str(tmp_path / "theirs"), safe_serialization=True)
    save_timm_folder(model, tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert theirs == ours and load_file(tmp_path / "ours" / "model.safetensors").keys() == model.state_dict().keys()
    assert len({file.stat().st_mode for file in (tmp_path / "ours").iterdir()}) == 1  # who reads one reads all
    loaded = vision_ssm.create_model("vmamba_micro", num_classes=4, pretrained=tmp_path / "ours" / "model.safetensors")
    assert same_weights(loaded, model)


def test_wrong_calls(tmp_path):
    model = vision_ssm.create_model("vmamba_micro", num_classes=2)
    save_timm_folder(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    nameless = type(model)(depths=(1,), dims=8)
    strange = vision_ssm.create_model("vmamba_micro", depths=(1, 1, np.int64(1), 1))
    with torch.device("meta"):
        empty = vision_ssm.create_model("vmamba_micro")
    for call, error, message in (
        (lambda: save_timm_folder(model, tmp_path), FileExistsError, "holds model.safetensors and config.json already; overwrite=True"),
        (lambda: save_timm_folder(model, tmp_path / "a", label_names=["one"]), ValueError, "1 label names are given for 2 classes"),
        (lambda: save_timm_folder(torch.nn.Linear(1, 1), tmp_path / "a"), TypeError, "timm's folders hold backbones, got Linear"),
        (lambda: save_timm_folder(vision_ssm.create_model("vmunet_micro"), tmp_path / "a"), TypeError, "got VMUNet"),
        (lambda: save_timm_folder(nameless, tmp_path / "a"), ValueError, "this VMamba has no variant's name"),
        (lambda: save_timm_folder(strange, tmp_path / "a"), TypeError, "config.json cannot hold the keywords"),
        (lambda: save_timm_folder(empty, tmp_path / "a"), ValueError, "meta device and has no weights to save"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "a").exists() and (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(vision_ssm.CheckpointError, match="holds none of model.safetensors, pytorch_model.bin"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)

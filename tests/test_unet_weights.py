"""Weights of U-Nets: what the originals compute, their files, encoders from classification weights, wrong checkpoints."""

import pickle

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.factory import unet_families
from vision_ssm.unets import load_encoder
from vision_ssm.weights import load_state_dict

MICRO = vision_ssm.list_unets("*_micro")
GOLDEN = [name for family in ("vmunet", "mhsvm", "msvmunet") for name in golden_cases.names(family)]


@pytest.mark.parametrize("name", GOLDEN, ids=lambda name: name.replace("/", "-"))
def test_golden(name):
    case = golden_cases.load(name)
    model = vision_ssm.import_official(name.split("/")[0], case["config"], golden_cases.weights(case))
    image, stored = golden_cases.images(case["input"]), case["outputs"]
    with torch.inference_mode():
        maps = model.encode(model.prepare(image))
        levels = [level.permute(0, 3, 1, 2) for level in model.decode(maps)]
        found = {"logits": [model(image)], "features": model.forward_intermediates(image), "decoder": levels}
    found["skips"] = [m.permute(0, 3, 1, 2) for m in maps[: len(stored.get("skips", []))]]
    stored["logits"] = [stored["logits"]]
    errors = {
        f"{kind}[{i}]": golden_cases.sample_error(expected, tensor)
        for kind, tensors in stored.items()
        for i, (expected, tensor) in enumerate(zip(tensors, found[kind], strict=True))
    }
    assert max(errors.values()) < case["tolerance"], errors
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]


def saved(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def official_vmunet(prefix="vmunet."):
    """A small VM-UNet under the original's names, with the weights of the golden rule."""
    names = {}
    dims = [8, 16, 32, 64]
    names.update({"patch_embed.proj.weight": [8, 3, 4, 4], "patch_embed.proj.bias": [8], "patch_embed.norm.weight": [8], "patch_embed.norm.bias": [8]})

    def block(where, c):
        d, rank = 2 * c, -(-c // 16)
        names.update({f"{where}.ln_1.weight": [c], f"{where}.ln_1.bias": [c]})
        leaves = dict(x_proj_weight=[4, rank + 32, d], dt_projs_weight=[4, d, rank], dt_projs_bias=[4, d], A_logs=[4 * d, 16], Ds=[4 * d])
        leaves.update({"in_proj.weight": [2 * d, c], "conv2d.weight": [d, 1, 3, 3], "conv2d.bias": [d], "out_norm.weight": [d], "out_norm.bias": [d], "out_proj.weight": [c, d]})
        names.update({f"{where}.self_attention.{leaf}": shape for leaf, shape in leaves.items()})

    for i, c in enumerate(dims):
        block(f"layers.{i}.blocks.0", c)
        if i < 3:
            names.update({f"layers.{i}.downsample.reduction.weight": [2 * c, 4 * c], f"layers.{i}.downsample.norm.weight": [4 * c], f"layers.{i}.downsample.norm.bias": [4 * c]})
    for j, c in enumerate(dims[::-1]):
        block(f"layers_up.{j}.blocks.0", c)
        if j:
            names.update({f"layers_up.{j}.upsample.expand.weight": [4 * c, 2 * c], f"layers_up.{j}.upsample.norm.weight": [c], f"layers_up.{j}.upsample.norm.bias": [c]})
    names.update({"final_up.expand.weight": [32, 8], "final_up.norm.weight": [2], "final_up.norm.bias": [2], "final_conv.weight": [1, 2, 1, 1], "final_conv.bias": [1]})
    return {prefix + name: golden_cases.tensor_for(name, shape) for name, shape in names.items()}


def small_vmunet(**overrides):
    settings = dict(depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1), dims=8)
    return vision_ssm.create_model("vmunet_isic", **{**settings, **overrides}).eval()


WRAPPERS = {
    "bare": lambda weights: weights,
    "training": lambda weights: {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
    "latest.pth": lambda weights: {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}},
    "data parallel": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "lightning": lambda weights: {"state_dict": {f"_model.{key}": value for key, value in weights.items()}},
    "segmentor": lambda weights: {"state_dict": {"data_preprocessor.mean": torch.zeros(1), **{f"unet.{key}": value for key, value in weights.items()}}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["vmunet.", ""])
def test_official_files(wrapper, prefix, tmp_path, capsys):
    official = official_vmunet(prefix)
    model, reference = small_vmunet(), small_vmunet()
    load_state_dict(reference, official)
    report = vision_ssm.load_weights(model, saved(tmp_path, WRAPPERS[wrapper](official)))
    assert report.complete and len(report.loaded) == len(official) == len(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))
    assert "tensors loaded" in capsys.readouterr().out


def test_counters_that_thop_leaves_are_ignored_by_name(tmp_path):
    official = official_vmunet()
    counters = {"total_ops": torch.zeros(1), "vmunet.layers.0.blocks.0.self_attention.total_params": torch.zeros(1)}
    report = vision_ssm.load_weights(small_vmunet(), saved(tmp_path, {**official, **counters}), verbose=False)
    assert report.complete and len(report.loaded) == len(official) and len(report.ignored["FLOPs counted by thop"]) == 2
    config = dict(num_classes=1, depths=[1] * 4, depths_decoder=[1] * 4, dims=8, dims_decoder=[64, 32, 16, 8])
    model = vision_ssm.import_official("vmunet", config, {**official, **counters})
    wrapped = vision_ssm.import_official("vmunet", config, {f"module.{key}": value for key, value in official.items()})
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), wrapped(image))


def test_images_of_another_number_of_channels(tmp_path):
    file = saved(tmp_path, official_vmunet())
    for channels in (1, 4):
        model = vision_ssm.create_model(
            "vmunet_isic", depths=(1,) * 4, decoder_depths=(1,) * 4, dims=8, in_chans=channels, pretrained=file
        )
        assert model.encoder.stem.conv.weight.shape[1] == channels
    given = official_vmunet()["vmunet.patch_embed.proj.weight"]
    source = vanilla_vmamba()
    grey = small_vmunet(in_chans=1)
    report = load_encoder(grey, source.state_dict(), verbose=False)
    assert report.adapted == ["encoder.stem.conv.weight"] == [f"{grey.first_conv}.weight"]
    torch.testing.assert_close(grey.encoder.stem.conv.weight, source.stem.conv.weight.sum(1, keepdim=True))
    torch.testing.assert_close(
        vision_ssm.create_model(
            "vmunet_isic", depths=(1,) * 4, decoder_depths=(1,) * 4, dims=8, in_chans=1, pretrained=file
        ).encoder.stem.conv.weight,
        given.sum(1, keepdim=True),
    )


@pytest.mark.parametrize("name", MICRO)
def test_our_own_files(name, tmp_path):
    """With a majority of names in the encoder, which must keep its prefix."""
    model, other = (vision_ssm.create_model(name, num_classes=2) for _ in range(2))
    file = saved(tmp_path, {"state_dict": {f"unet.{key}": value for key, value in model.state_dict().items()}})
    assert vision_ssm.load_weights(other, file, verbose=False).complete
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    again = vision_ssm.create_model(name, num_classes=2, pretrained=saved(tmp_path, model.state_dict()))
    assert torch.equal(again.head.scores.weight, model.head.scores.weight)
    with pytest.raises(CheckpointError, match="2 classes in the file and 9 in the model; pass reset_head=True"):
        vision_ssm.create_model(name, num_classes=9, pretrained=file)
    reset = vision_ssm.create_model(name, num_classes=9, pretrained=file, reset_head=True)
    assert reset.head.scores.weight.shape[0] == 9
    assert torch.equal(reset.encoder.state_dict()[next(iter(model.encoder.state_dict()))], next(iter(model.encoder.state_dict().values())))


def test_deep_supervision_comes_and_goes():
    deep = vision_ssm.create_model("msvmunet_micro", deep_supervision=True)
    plain = vision_ssm.create_model("msvmunet_micro")
    report = load_state_dict(plain, deep.state_dict())
    assert report.ignored == {"auxiliary heads of a model without deep supervision": [f"head.aux.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]}
    report = load_state_dict(deep, plain.state_dict())
    assert list(report.ignored) == ["auxiliary heads that the file does not have, initialised anew"]
    broken = {key: value for key, value in deep.state_dict().items() if not key.startswith("head.aux.0")}
    with pytest.raises(CheckpointError, match="missing from the file: head.aux.0"):
        load_state_dict(deep, broken)


def test_tied_names_of_multi_head_scans():
    """The last of each pair of names is in force, whatever the first one holds."""
    case = golden_cases.load("mhsvm/mhsvm_4h_isic18_96x160")
    tied = {key for key in case["state_dict"] if ".mambaeng." in key or key.endswith("x_ssproj_W")}
    keys = {key: torch.empty(shape, device="meta") for key, shape in case["state_dict"].items()}
    cls = unet_families()["mhsvm"][0]
    assert len(tied) == 15 * 21 and set(cls.official_keys(keys)) == set(cls.official_keys({key: value for key, value in keys.items() if key not in tied}))


def vanilla_vmamba(depths=(2, 1, 3, 1), dims=8):
    """VMamba of the first version as a classifier, as the encoder of VM-UNet is."""
    return vision_ssm.create_model("vanilla_vmamba_tiny", depths=depths, dims=dims, num_classes=7)


def test_encoder_and_mirrored_decoder(tmp_path, capsys):
    source = vanilla_vmamba()
    model = small_vmunet(decoder_depths=(1, 2, 2, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_encoder(model, saved(tmp_path, {"model": source.state_dict()}))
    after, given = model.state_dict(), source.state_dict()
    for key in model.encoder.state_dict():
        assert torch.equal(after[f"encoder.{key}"], given[key])
    for j, depth in enumerate((1, 2, 2, 1)):
        for b in range(depth):
            for leaf in ("norm1.weight", "mixer.core.A_log", "mixer.in_proj.weight"):
                ours, theirs = f"decoder.{j}.blocks.{b}.{leaf}", f"stages.{3 - j}.blocks.{b}.{leaf}"
                assert torch.equal(after[ours], given[theirs] if theirs in given else before[ours])
    for key in ("decoder.1.expand.expand.weight", "expand.expand.weight", "head.scores.weight"):
        assert torch.equal(after[key], before[key])
    assert report.complete and set(report.loaded) <= set(after)
    assert {"decoder.2.blocks.1.mixer.in_proj.weight"} <= set(report.ignored["decoder block that the file does not have, as it was"])
    assert {"stages.0.blocks.1.norm1.weight", "stages.2.blocks.2.mixer.core.D"} <= set(report.ignored["block behind the last one of the encoder's stage"])
    assert report.ignored["classifier of a model without one"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert "tensors loaded" in capsys.readouterr().out


def test_encoders_begin_with_the_weights_that_are_no_average(tmp_path):
    plain, averaged = vanilla_vmamba(), vanilla_vmamba()
    model = small_vmunet()
    file = saved(tmp_path, {"model": plain.state_dict(), "model_ema": averaged.state_dict()})
    for ema, source in ((False, plain), (True, averaged)):
        load_encoder(model, file, ema=ema, verbose=False)
        assert torch.equal(model.encoder.stem.conv.weight, source.stem.conv.weight)


def test_encoder_weights_by_keyword(tmp_path):
    source = vision_ssm.create_model("vmamba_micro", depths=(1, 1, 1, 1), num_classes=3)
    model = vision_ssm.create_model("msvmunet_micro", encoder_weights=saved(tmp_path, source.state_dict()))
    given = source.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in model.encoder.state_dict().items())
    generic = vision_ssm.create_model("encoder_unet_micro", encoder="vssd_micro")
    report = load_encoder(generic, vision_ssm.create_model("vssd_micro").state_dict(), verbose=False)
    assert "output norms that a classifier's weights do not have" in report.ignored and report.complete


def test_names_of_the_published_classification_files():
    """The files that the originals start from name their tensors as the encoders do: checked on a golden case."""
    case = golden_cases.load("vmamba/vanilla_vmamba_tiny_224")
    tensors = golden_cases.weights(case)
    model = vision_ssm.create_model("vmunet_isic")
    assert load_encoder(model, tensors, verbose=False).complete
    mixer = model.decoder[3].blocks[0].mixer
    key = next(key for key in tensors if key.startswith("layers.0.blocks.0.") and key.endswith("in_proj.weight"))
    assert torch.equal(mixer.in_proj.weight, tensors[key])


def test_wrong_checkpoints(tmp_path):
    mhs = vision_ssm.create_model("mhsvm_micro").state_dict()
    with pytest.raises(CheckpointError, match="no vmunet checkpoint: it looks like a mhsvm checkpoint"):
        load_state_dict(vision_ssm.create_model("vmunet_micro"), mhs)
    with pytest.raises(CheckpointError, match="no vmunet checkpoint: it looks like a vmamba checkpoint"):
        load_state_dict(vision_ssm.create_model("vmunet_micro"), vanilla_vmamba().state_dict())
    with pytest.raises(CheckpointError, match="no vssd checkpoint: it looks like a plain_unet checkpoint"):
        load_state_dict(vision_ssm.create_model("vssd_micro"), vision_ssm.create_model("plain_unet_micro").state_dict())
    with torch.device("meta"):
        small, tiny = (vision_ssm.create_model(f"msvmunet_{size}") for size in ("small", "tiny"))
    with pytest.raises(CheckpointError, match="the file fits msvmunet_small, not msvmunet_tiny"):
        load_state_dict(tiny, small.state_dict())
    for model, weights, message in (
        (small_vmunet(), vision_ssm.create_model("vmamba_micro").state_dict(), "does not fit"),
        (small_vmunet(), vision_ssm.create_model("efficientvim_micro").state_dict(), "looks like a efficientvim checkpoint"),
        (small_vmunet(depths=(2, 2, 2, 2)), vanilla_vmamba(depths=(1, 1, 1, 1)).state_dict(), "missing from the file"),
        (vision_ssm.create_model("plain_unet_micro"), vanilla_vmamba().state_dict(), "an encoder of its own"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_encoder(model, weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pickles_are_not_run(tmp_path):
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return flag.touch, ()

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    for load in (vision_ssm.load_weights, load_encoder):
        with pytest.raises(CheckpointError):
            load(vision_ssm.create_model("vmunet_micro"), tmp_path / "evil.pth")
    assert not flag.exists()

"""What every U-Net must do. Nets are found in the registry: a new family is tested by itself."""

import inspect
import pickle

import golden_cases
import pytest
import torch
from timm.optim import param_groups_layer_decay

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.factory import unet_families
from vision_ssm.layers import LargeKernelExpanding, MultiScaleMlp, PatchExpanding, depth_to_space
from vision_ssm.registry import UNETS
from vision_ssm.unets import UNet, load_encoder, unet
from vision_ssm.unets.base import falling_drop_path_rates
from vision_ssm.weights import load_state_dict

MICRO = vision_ssm.list_unets("*_micro")
SCANNING = ["vmunet_micro", "msvmunet_micro"]
SIZES = [(33, 47), (64, 96), (96, 96), (5, 1)]
PARAMETERS = {
    "vmunet_isic": 27_427_561,
    "vmunet_synapse": 27_427_761,
    "vmunet_default": 44_273_833,
    "mhsvm_4h": 17_257_129,
    "mhsvm_4h_isic17": 17_257_129,
    "mhsvm_4h_unmixed": 14_121_577,
    "mhsvm_3h": 17_386_153,
    "msvmunet_tiny": 35_925_513,
    "msvmunet_small": 54_689_289,
    "plain_unet": 31_037_633,
    "encoder_unet": 35_573_737,
}
GOLDEN = [name for family in ("vmunet", "mhsvm", "msvmunet") for name in golden_cases.names(family)]


def outputs_of(scores) -> list[torch.Tensor]:
    return list(scores) if isinstance(scores, tuple) else [scores]


def loss_of(scores) -> torch.Tensor:
    return sum(output.float().square().mean() for output in outputs_of(scores))


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# what the originals compute


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
    assert count(model) == case["params"]


def test_every_published_net_is_counted():
    assert set(PARAMETERS) == set(vision_ssm.list_unets()) - set(MICRO)
    assert {cls.family for cls in UNETS.module_dict.values()} == {owner(name).family for name in MICRO}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_count(name):
    with torch.device("meta"):
        model = vision_ssm.create_model(name)
    assert count(model) == PARAMETERS[name] and model.variant == name


@pytest.mark.parametrize(
    "name,classes,parameters", [("mhsvm_3h", 9, 17_386_353), ("msvmunet_tiny", 4, 35_925_028), ("msvmunet_small", 4, 54_688_804)]
)
def test_published_parameter_count_of_other_data_sets(name, classes, parameters):
    with torch.device("meta"):
        assert count(vision_ssm.create_model(name, num_classes=classes)) == parameters


# blocks


def test_expanding_is_the_inverse_of_cutting_into_squares():
    squares = torch.arange(2 * 3 * 16, dtype=torch.float32).view(1, 2, 3, 16)
    spread = depth_to_space(squares, 2)  # (1, 4, 6, 4)
    for row in range(2):
        for column in range(2):
            start = (row * 2 + column) * 4
            assert torch.equal(spread[:, row::2, column::2], squares[..., start : start + 4])


@pytest.mark.parametrize("layer", [PatchExpanding, LargeKernelExpanding])
def test_expanding_layers(layer):
    module = layer(12, 5, 3).eval()
    assert module(torch.randn(2, 4, 3, 12)).shape == (2, 12, 9, 5)


def test_multi_scale_mlp_is_a_sum_of_convolutions():
    mlp = MultiScaleMlp(6, 10).double()
    x = torch.randn(2, 7, 5, 6, dtype=torch.float64)
    h = torch.nn.functional.gelu(mlp.fc1(x))
    branches = [conv.to(torch.float64) for conv in mlp.convs]
    expected = mlp.fc2(h + sum(torch.nn.Conv2d.forward(c, h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for c in branches))
    torch.testing.assert_close(mlp(x), expected)
    with pytest.raises(ValueError, match="kernel_sizes must be odd"):
        MultiScaleMlp(6, 10, (1, 4))


def test_drop_path_falls_to_zero():
    assert [round(rate, 3) for level in falling_drop_path_rates(0.2, (2, 2, 2)) for rate in level] == [0.2, 0.16, 0.12, 0.08, 0.04, 0.0]
    assert [len(level) for level in falling_drop_path_rates(0.2, (2, 9, 2, 1))] == [2, 9, 2, 1]


# every net


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_size(name, size):
    model = vision_ssm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        scores = model(x)
        bottom, right = (-side % model.size_divisor for side in size)
        padded = torch.nn.functional.pad(x, (0, right, 0, bottom), mode="replicate")
        torch.testing.assert_close(scores, model(padded)[:, :, : size[0], : size[1]])
    assert scores.shape == (2, 3, *size) and torch.isfinite(scores).all() and scores.is_contiguous()


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("deep", [False, True])
def test_gradient_reaches_every_parameter(name, deep):
    model = vision_ssm.create_model(name, num_classes=3, deep_supervision=deep).train()
    scores = model(torch.randn(2, 3, 64, 96))
    loss_of(scores).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()]
    assert not without
    sizes = [tuple(output.shape) for output in outputs_of(scores)]
    assert sizes[0] == (2, 3, 64, 96) and len(sizes) == (len(model.decoder) if deep else 1)
    assert sizes == sorted(sizes, reverse=True), "auxiliary scores follow, finest first"
    assert isinstance(model.eval()(torch.randn(1, 3, 64, 64)), torch.Tensor)


def test_auxiliary_scores_are_cropped():
    model = vision_ssm.create_model("msvmunet_micro", deep_supervision=True, num_classes=2)
    sizes = [tuple(scores.shape[2:]) for scores in model(torch.randn(2, 3, 70, 33))]
    assert sizes == [(70, 33), (9, 5), (5, 3)]  # strides 1, 8, 16


@pytest.mark.parametrize("name", MICRO)
def test_micro_nets_are_small(name):
    assert 200_000 < count(vision_ssm.create_model(name)) < 1_000_000


@pytest.mark.parametrize("name", MICRO)
def test_one_channel_is_repeated(name):
    model = vision_ssm.create_model(name).eval()
    x = torch.randn(1, 1, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.expand(-1, 3, -1, -1)))
    narrow = vision_ssm.create_model(name, in_chans=1).eval()
    assert count(narrow) < count(model) and narrow(x).shape == (1, 1, 40, 32)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite_forward_and_backward(name, dtype):
    model = vision_ssm.create_model(name, num_classes=3, deep_supervision=True).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(model(100 * torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", MICRO)
def test_grad_checkpointing_changes_nothing(name):
    model = vision_ssm.create_model(name).train()
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        recomputed = [m for m in model.modules() if getattr(m, "grad_checkpointing", False)]
        assert bool(recomputed) == enable
        loss_of(model(x)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*grads):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", MICRO)
def test_layer_decay_groups_cover_each_parameter_once(name):
    model = vision_ssm.create_model(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    first = min(scale.values())
    assert {key for key, p in names.items() if scale[id(p)] == first} <= {key for key in names if key.startswith("encoder.")}
    assert all(scale[id(p)] == 1.0 for key, p in names.items() if not key.startswith("encoder."))
    assert model.no_weight_decay() == {key for key in names if key.endswith((".A_log", ".D", ".dt_proj_bias"))}


@pytest.mark.parametrize("name", MICRO)
def test_compiles_to_one_graph_and_exports(name):
    model = vision_ssm.create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 33, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("name", SCANNING)
@pytest.mark.parametrize("scan", vision_ssm.list_scans())
def test_any_scan_in_any_net(name, scan):
    model = vision_ssm.create_model(name, scan=scan)
    loss_of(model(torch.randn(2, 3, 33, 40))).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    mixers = {type(block.mixer) for stage in [*model.encoder.stages, *model.decoder] for block in stage.blocks}
    assert len(mixers) == 1


def test_scan_options_replace_some_of_the_variants_own():
    model = vision_ssm.create_model("mhsvm_4h", dims=16, scan=dict(threshold=0.4))
    mixer = model.decoder[0].blocks[0].mixer
    assert mixer.threshold == 0.4 and mixer.heads == 4 and mixer.core.state_dim == 16
    assert vision_ssm.create_model("mhsvm_4h", dims=16).encoder.stages[0].blocks[0].mixer.threshold == 0.5


@pytest.mark.parametrize("name", MICRO)
def test_reset_of_the_head(name):
    model = vision_ssm.create_model(name, num_classes=2, deep_supervision=True).double()
    model.reset_classifier(5)
    scores = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert model.num_classes == 5 and all(output.shape[1] == 5 for output in scores)


def owner(name):
    return next(cls for cls in UNETS.module_dict.values() if name in cls.variants)


def test_entry_points_and_sources():
    for cls in UNETS.module_dict.values():
        module = inspect.getmodule(cls)
        assert all(callable(getattr(module, name)) for name in cls.variants), "entry points are generated"
        assert {"paper:", "source:"} <= set(module.__doc__.lower().split()), "a family file names paper and source"
        assert issubclass(cls, UNet)
    assert set(unet_families()) == {"vmunet", "mhsvm", "msvmunet", "encoder_unet", "plain_unet"}
    assert vision_ssm.list_unets("vmunet_*") == ["vmunet_default", "vmunet_isic", "vmunet_micro", "vmunet_synapse"]
    assert not set(vision_ssm.list_unets()) & set(vision_ssm.list_models())


# any backbone


@pytest.mark.parametrize("encoder", vision_ssm.list_models("*_micro"))
def test_any_backbone(encoder):
    model = unet(encoder, num_classes=2, deep_supervision=True, decoder_depth=1)
    strides = [info["reduction"] for info in model.feature_info]
    assert strides == sorted(strides) and model.size_divisor == strides[-1] >= 16
    scores = model(torch.randn(2, 3, 70, 65))
    assert [tuple(output.shape) for output in scores][0] == (2, 2, 70, 65) and len(scores) == len(model.decoder)
    loss_of(scores).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None and not key.startswith("encoder.")]
    assert not without
    trained = [p.grad is not None for p in model.encoder.parameters()]
    assert sum(trained) / len(trained) > 0.95  # published backbones may have parameters that nothing uses
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 32, 33)).shape == (1, 2, 32, 33)


@pytest.mark.parametrize("options", [dict(blocks="conv"), dict(expand="large_kernel"), dict(scan="snake"), dict(scan=False)], ids=str)
def test_forms_of_the_decoder(options):
    if options.get("scan") == "snake":
        options = dict(scan=dict(routes="snake_pair"))
    model = unet(dict(name="vmamba_micro", drop_path_rate=0.1), **options)
    loss_of(model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# weights


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


# bad input


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: vision_ssm.create_model("vmunet_isci"), KeyError, "unknown model 'vmunet_isci'. Did you mean 'vmunet_isic'"),
        (lambda: vision_ssm.create_model("vmunet_micro", decoder_depth=2), TypeError, "no keyword 'decoder_depth'. Did you mean 'decoder_depths'"),
        (lambda: vision_ssm.create_model("vmunet_micro", features_only=True), TypeError, "no keyword 'features_only'"),
        (lambda: vision_ssm.create_model("vmamba_micro", encoder_weights="f.pth"), TypeError, "is a backbone: encoder_weights are for U-Nets"),
        (lambda: vision_ssm.create_model("vmunet_micro", num_classes=0), ValueError, r"num_classes must be 1 \(binary\) or more"),
        (lambda: vision_ssm.create_model("vmunet_micro", decoder_depths=(1, 1)), ValueError, "one entry per stage"),
        (lambda: vision_ssm.create_model("msvmunet_micro", decoder_depths=(1, 1, 1, 1)), ValueError, "one entry fewer than depths"),
        (lambda: vision_ssm.create_model("vmunet_isic", pretrained=True), ValueError, "no official weights are published"),
        (lambda: vision_ssm.create_model("vmunet_isic", encoder_weights=True), ValueError, r"download https://github.com/MzeroMiko.*\(vanilla_vmamba_small\)"),
        (lambda: vision_ssm.create_model("vmunet_isic", encoder_weights="a", pretrained="b"), ValueError, "give one of the two"),
        (lambda: vision_ssm.create_model("vmunet_micro", pretrained="no.pth"), FileNotFoundError, "no checkpoint file no.pth"),
        (lambda: vision_ssm.create_model("vmunet_micro", encoder_weights="no.pth"), FileNotFoundError, "no checkpoint file no.pth"),
        (lambda: vision_ssm.create_model("plain_unet_micro", dims=(8,)), ValueError, "two stages or more"),
        (lambda: vision_ssm.create_model("vmunet_micro").reset_classifier(0), ValueError, "num_classes must be 1"),
        (lambda: vision_ssm.create_model("vmunet_micro")(torch.zeros(1, 2, 64, 64)), ValueError, r"takes images \(B, 3, H, W\) or \(B, 1, H, W\), got \(1, 2, 64, 64\)"),
        (lambda: vision_ssm.create_model("vmunet_micro", in_chans=4)(torch.zeros(1, 1, 64, 64)), ValueError, r"takes images \(B, 4, H, W\), got"),
        (lambda: vision_ssm.create_model("vmunet_micro")(torch.zeros(3, 64, 64)), ValueError, r"got \(3, 64, 64\)"),
        (lambda: vision_ssm.create_model("vmunet_micro")(torch.zeros(1, 3, 0, 64)), ValueError, r"got \(1, 3, 0, 64\)"),
        (lambda: vision_ssm.create_model("vmunet_micro")(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), TypeError, "floating-point and normalised, got torch.uint8"),
        (lambda: unet("vssd_tini"), KeyError, "unknown encoder 'vssd_tini'. Did you mean 'vssd_tiny'"),
        (lambda: unet("vssd_micro", block="conv"), TypeError, "no keyword 'block'. Did you mean 'blocks'"),
        (lambda: unet(dict(name="vssd_micro", drop_path=1)), TypeError, "no keyword 'drop_path'. Did you mean 'drop_path_rate'"),
        (lambda: unet(dict(name="vssd_micro", num_classes=1)), TypeError, "no keyword 'num_classes'"),
        (lambda: unet(dict(drop_path_rate=1)), TypeError, "encoder is a backbone's name"),
        (lambda: unet("vssd_micro", blocks="cnov"), ValueError, "unknown blocks 'cnov'. Did you mean 'conv'"),
        (lambda: unet("vssd_micro", blocks="conv", scan="multi_direction"), ValueError, "blocks='conv' has none"),
        (lambda: unet("vssd_micro", decoder_depth=0), ValueError, "decoder_depth must be 1 or more"),
        (lambda: vision_ssm.import_official("vmnet", {}, {}), KeyError, "unknown family 'vmnet'. Did you mean 'vmunet'"),
        (lambda: vision_ssm.import_official("plain_unet", {}, {}), KeyError, "unknown family 'plain_unet'"),
        (lambda: vision_ssm.import_official("vmunet", {"depth": [2]}, {}), ValueError, "unknown hyperparameters of an original VM-UNet: depth. Did you mean 'depths'"),
        (lambda: vision_ssm.import_official("msvmunet", {"enc_name": "tiny"}, {}), ValueError, "unknown enc_name 'tiny'. Did you mean 'tiny_0230s'"),
        (lambda: vision_ssm.import_official("vmunet", {"dims_decoder": [8, 4, 2, 1]}, {}), ValueError, "dims_decoder must be dims reversed"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


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
        (small_vmunet(), vision_ssm.create_model("vssd_micro").state_dict(), "looks like a vssd checkpoint"),
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


def test_a_net_learns_a_disk():
    """The smallest test of training: half a minute's worth of steps would be exact, twenty already tell inside from outside."""
    model = vision_ssm.create_model("vmunet_micro").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    losses = []
    for _ in range(30):
        centres = torch.randint(10, 22, (8, 2, 1, 1))
        masks = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 49).float().unsqueeze(1)
        images = masks + 0.3 * torch.randn_like(masks)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])

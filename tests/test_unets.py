"""What every U-Net must do. Nets are found in the registry: a new family is tested by itself."""

import inspect

import pytest
import torch
from timm.optim import param_groups_layer_decay

import vision_ssm
from vision_ssm.factory import unet_families
from vision_ssm.layers import LargeKernelExpanding, MultiScaleMlp, PatchExpanding, depth_to_space
from vision_ssm.registry import UNETS
from vision_ssm.unets import UNet, unet
from vision_ssm.unets.base import falling_drop_path_rates

MICRO = vision_ssm.list_unets("*_micro")
SCANNING = ["vmunet_micro", "msvmunet_micro"]
SHALLOW = {  # half the graph is as much of a test and compiles in half the time
    "vmunet_micro": dict(depths=(1, 1), decoder_depths=(1, 1)),
    "mhsvm_micro": dict(depths=(1, 1), decoder_depths=(1, 1)),
    "msvmunet_micro": dict(depths=(1, 1), decoder_depths=(1,)),
    "encoder_unet_micro": dict(encoder=dict(name="vmamba_micro", depths=(1, 1))),
}
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


def outputs_of(scores) -> list[torch.Tensor]:
    return list(scores) if isinstance(scores, tuple) else [scores]


def loss_of(scores) -> torch.Tensor:
    return sum(output.float().square().mean() for output in outputs_of(scores))


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def owner(name):
    return next(cls for cls in UNETS.module_dict.values() if name in cls.variants)


# size


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
def test_no_images_have_no_scores(name):
    assert vision_ssm.create_model(name, num_classes=3).eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 3, 64, 64)


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


@pytest.mark.parametrize("name", MICRO)
def test_float32_gradients_are_those_of_float64(name):
    """Rounding must not grow from block to block, where routes that nearly agree are compared least of all."""
    model = vision_ssm.create_model(name).train()
    x, grads = torch.randn(2, 3, 64, 64), []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        loss_of(model(x.to(dtype))).backward()
        grads.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    limit = 0.05 if name == "mhsvm_micro" else 1e-3  # fresh multi-head scans add less to their input than it is rounded
    assert (grads[0] - grads[1]).norm() < limit * grads[1].norm()


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
    model = vision_ssm.create_model(name, num_classes=3, **SHALLOW.get(name, {})).eval()
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
        (lambda: vision_ssm.create_model("vmunet_micro", encoder_weights=True), ValueError, "no weights are published for the encoder of"),
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


def test_a_net_learns_a_disk():
    model = vision_ssm.create_model("vmunet_micro").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    losses = []
    for _ in range(40):
        centres = torch.randint(10, 22, (4, 2, 1, 1))
        masks = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 49).float().unsqueeze(1)
        images = masks + 0.3 * torch.randn_like(masks)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

"""HRVMamba. Its operator, DCNv4, is tested by itself."""

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from engine_support import CONFIGS, read_config
from torch import nn

import vision_ssm
from vision_ssm.backbones.hrvmamba import DynamicScanBlock, HRVMamba
from vision_ssm.layers import DeformableConv2d, Fusion, SumNeck, synchronize_batch_norms
from vision_ssm.ops import dcnv4
from vision_ssm.scans import MultiDirectionScan, build_scan
from vision_ssm.weights import load_state_dict

POSE = golden_cases.load("hrvmamba/hrvmamba_small_pose_128x96")
SCAN = dict(type="multi_direction", expand=2.0, state_dim=1, gate=False, deformable=True)


def micro(**options):
    return vision_ssm.create_model("hrvmamba_micro", **options)


def restless(module):
    """`module` with norms, statistics and zeros that do something."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
        elif isinstance(part, DeformableConv2d):
            nn.init.normal_(part.offset_mask.weight, std=0.3)
            nn.init.normal_(part.offset_mask.bias)
    return module.eval()


def without_gradient(model):
    x = model(torch.randn(2, 3, 64, 96))
    sum(map_.square().mean() for map_ in x).backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]


@pytest.mark.parametrize("position_convs", [False, True])
@pytest.mark.parametrize("drop_convs", [False, True])
def test_block_is_what_the_text_says(position_convs, drop_convs):
    options = dict(SCAN, channel_gate=position_convs)
    block = DynamicScanBlock(8, options, mlp_ratio=2.0, drop_path=0.5, position_convs=position_convs, drop_convs=drop_convs)
    restless(block)
    x, added = torch.randn(2, 5, 7, 8), torch.randn(2, 5, 7, 8)
    values, branch = block(x, (added, nn.Identity()))
    have = values + branch[1](branch[0])
    y = x = x + added
    if position_convs:
        y = x + block.position1(x)
    h = block.norm0(y)
    parts = []
    for conv, group in zip(block.convs, h.split(2, dim=-1)):
        parts.append(F.conv2d(group.permute(0, 3, 1, 2), conv.weight, conv.bias, padding="same", groups=2))
    sizes = [conv.kernel_size for conv in block.convs]
    assert sizes == [(3, 3), (5, 5), (7, 7), (9, 9)]
    h = torch.cat(parts, dim=1)  # (B, C, H, W)
    h = h.view(2, 4, 2, 5, 7).transpose(1, 2).flatten(1, 2).permute(0, 2, 3, 1)  # channels of the groups alternate
    x = x + F.gelu(h)
    x = x + block.mixer(block.norm1(x))
    if position_convs:
        x = x + block.position2(x)
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    torch.testing.assert_close(have, x)
    assert (block.drop_convs is block.drop_path) is drop_convs


def test_scan_behind_a_deformable_convolution():
    mixer = restless(build_scan(dict(SCAN, channel_gate=True, offset_kernel=3), 32))
    x = torch.randn(1, 4, 5, 32)
    h = mixer.in_proj(x)
    conv = mixer.conv
    assert (conv.groups, conv.offset_mask.out_features, h.shape[-1]) == (2, 56, 64)  # as many groups as the rank
    numbers = conv.offset_mask(conv.offset_conv(h))
    h = F.silu(dcnv4(h, numbers, conv.groups))
    y = mixer.out_norm(mixer.core(h))
    gate = mixer.channel_gate
    y = y * gate.expand(F.relu(gate.reduce(y.mean((1, 2), keepdim=True)))).sigmoid()
    torch.testing.assert_close(mixer(x), mixer.out_proj(y))


def test_deformable_convolution_starts_at_zero():
    conv = DeformableConv2d(6, 2, act="silu")
    assert conv.offset_mask.out_features == 56  # 2 * 27, in eights
    assert not conv(torch.randn(1, 3, 3, 6)).any()
    with pytest.raises(ValueError, match="must divide its 6 channels, got 4"):
        DeformableConv2d(6, 4)
    with pytest.raises(ValueError, match="must be odd, got 3 and 2"):
        DeformableConv2d(6, 2, offset_kernel=2)
    with pytest.raises(ValueError, match="must be odd, got 2 and 0"):
        DeformableConv2d(6, 2, kernel_size=2)


def test_fusion_by_hand():
    """Ways up and down between maps whose sizes do not divide."""
    dims = (8, 16, 24)
    fusion = restless(Fusion(dims))
    maps = [torch.randn(2, *size, dim) for size, dim in zip(((9, 13), (5, 7), (3, 4)), dims)]
    nchw = [x.permute(0, 3, 1, 2) for x in maps]

    def conv_norm(layer, x, **options):
        x = F.conv2d(x, layer.conv.weight, groups=layer.conv.groups, **options)
        bn = layer.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5)

    def up(layer, x, factor, size):
        x = F.interpolate(conv_norm(layer, x), scale_factor=factor, mode="bilinear")
        return F.interpolate(x, size=size, mode="bilinear")

    def down(layers, x):
        for i in range(0, len(layers), 2):
            x = conv_norm(layers[i + 1], conv_norm(layers[i], x, stride=2, padding=1))
            x = F.relu(x) if i + 2 < len(layers) else x
        return x

    want = [
        F.relu(nchw[0] + up(fusion["0"]["1"], nchw[1], 2, (9, 13)) + up(fusion["0"]["2"], nchw[2], 4, (9, 13))),
        F.relu(down(fusion["1"]["0"], nchw[0]) + nchw[1] + up(fusion["1"]["2"], nchw[2], 2, (5, 7))),
        F.relu(down(fusion["2"]["0"], nchw[0]) + down(fusion["2"]["1"], nchw[1]) + nchw[2]),
    ]
    for have, x in zip(fusion(maps), want, strict=True):
        torch.testing.assert_close(have.permute(0, 3, 1, 2), x)
    del fusion["1"]
    torch.testing.assert_close(fusion(maps)[1].permute(0, 3, 1, 2), want[2])


def test_new_branches_grow_from_the_coarsest_fused_map():
    model = restless(micro())
    seen = {}
    for number, stage in enumerate(model.stages[1:], 1):
        stage.register_forward_hook(lambda module, inputs, outputs, number=number: seen.update({number: (inputs[0], outputs)}))
        stage.blocks[0].register_forward_hook(
            lambda module, inputs, outputs, number=number: seen.update({f"module {number}": inputs[0]})
        )
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
        first = seen[1][0][0]
        assert len(seen[1][0]) == 1 and first.shape == (1, 16, 24, 32)
        for conv, x in zip(model.stages[1].downsample, seen["module 1"], strict=True):
            torch.testing.assert_close(conv(first), x)
        for number in (2, 3):
            before, entering = seen[number][0], seen[f"module {number}"]
            assert all(torch.equal(a, b) for a, b in zip(before, entering[:-1], strict=True))
            torch.testing.assert_close(model.stages[number].downsample[0](before[-1]), entering[-1])


def test_neck_by_hand():
    neck = restless(SumNeck((8, 16), (16, 24), 32))
    fine, coarse = torch.randn(1, 5, 6, 8), torch.randn(1, 3, 3, 16)
    first = neck.increase[0](fine)
    second = neck.downsample[0](first) + neck.increase[1](coarse)
    sums = neck([fine, coarse])
    torch.testing.assert_close(sums[0], first)
    torch.testing.assert_close(sums[1], neck.final(second))
    assert neck.final.conv.out_channels == 32 and neck.increase[1].conv1.conv.out_channels == 6


@pytest.mark.parametrize("maps", ["branches", "sums"])
def test_only_what_the_asked_maps_need_is_built(maps):
    # a gate's few units behind a ReLU may all be dead
    options = dict(features_only=True, maps=maps, out_norm=False, scan=dict(channel_gate=False))
    whole = restless(micro(**options))
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        wanted = whole(x)
    widths = [m.shape[1] for m in wanted]
    assert widths == ([16, 16, 24, 32] if maps == "branches" else [16, 24, 32, 48])
    for indices in ((0,), (0, 2), (3,)):
        part = micro(**options, out_indices=indices).eval()
        report = load_state_dict(part, whole.state_dict())
        assert report.complete
        if indices != (3,) or maps == "branches":
            assert "fusion into maps that are not asked for" in report.ignored
        with torch.no_grad():
            for have, index in zip(part(x), indices, strict=True):
                torch.testing.assert_close(have, wanted[index])
        assert not without_gradient(part.train())
        assert [info["num_chs"] for info in part.out_info] == [widths[i] for i in indices]
    with pytest.raises(ValueError, match=r"was built for out_indices=\[0\] and has no map 1"):
        micro(**options, out_indices=(0,)).forward_intermediates(x, out_indices=(0, 1))
    assert whole.feature_info[0]["module"] == ("stages.3" if maps == "branches" else "neck")


def small_pose(**options):
    settings = dict(dims=(8, 16, 24, 32), first_dim=8, depths=(1, 1, 1, 1), blocks=1)
    return vision_ssm.create_model("hrvmamba_small_pose", **settings, **options).eval()


def test_pose_returns_the_finest_map_alone():
    model = small_pose()
    assert model.features_only and model.out_indices == [0] and not len(model.out_norms) and model.neck is None
    assert isinstance(model.stages[2].blocks[0].branches[1].blocks[0].drop_convs, nn.Identity)
    for size in ((64, 48), (33, 47)):
        (map_,) = model(torch.randn(1, 3, *size))
        assert map_.shape == (1, 8, -(-size[0] // 4), -(-size[1] // 4))
    several = small_pose(features_only=True, out_indices=(0, 1, 2, 3))
    assert len(several(torch.randn(1, 3, 64, 48))) == 4 == len(small_pose(multiscale=True)(torch.randn(1, 3, 64, 48)))
    assert small_pose(features_only=False, num_classes=5)(torch.randn(1, 3, 64, 48)).shape == (1, 5)


def test_classifiers_weights_start_the_other_forms():
    narrow = dict(neck_dims=(16, 24, 32, 40), num_features=48)
    classifier = small_pose(features_only=False, num_classes=7, **narrow)
    pose = small_pose()
    report = load_state_dict(pose, classifier.state_dict())
    assert report.complete
    assert set(report.ignored) == {"classifier of a model without one", "fusion into maps that are not asked for"}
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(pose(x)[0], classifier.forward_intermediates(x)[0])
    sums = small_pose(multiscale=True, maps="sums", out_norm=True, **narrow)
    report = load_state_dict(sums, classifier.state_dict())
    assert report.complete and report.ignored["classifier of a model without one"] == ["head.weight", "head.bias"]
    with pytest.raises(vision_ssm.CheckpointError, match=r"missing from the file: stages.3.blocks.0.fusion.1"):
        load_state_dict(small_pose(multiscale=True), pose.state_dict())


def test_drop_path_rises_with_the_depth_alone():
    model = vision_ssm.create_model("hrvmamba_micro", depths=(1, 1, 2, 1), blocks=2, drop_path_rate=0.7)
    found = []
    for stage in model.stages[1:]:
        for module in stage.blocks:
            of_branches = [[getattr(b.drop_path, "drop_prob", 0.0) for b in branch.blocks] for branch in module.branches]
            assert all(rates == of_branches[0] for rates in of_branches)
            found += of_branches[0]
    assert found == pytest.approx([0.7 * i / 7 for i in range(8)])


def test_initial_values():
    model = micro(dims=(64, 64, 64, 64))
    block = model.stages[1].blocks[0].branches[0].blocks[0]
    core, conv = block.mixer.core, block.mixer.conv
    assert not core.A_log.any() and core.D.eq(1).all() and core.state_dim == 1 and core.dt_rank == 4 == conv.groups
    linear = [conv.offset_mask, block.mixer.in_proj, block.mixer.channel_gate.reduce, block.mlp.fc1, model.head]
    for layer in linear:
        assert 0.018 < layer.weight.std() < 0.022
        assert layer.bias is None or not layer.bias.any()
    assert block.convs[0].bias.any()  # convolutions start as torch makes them
    final = model.neck.final.conv.weight
    bound = final.shape[1] ** -0.5
    assert bound * 0.95 < final.abs().max() <= bound
    step = F.softplus(core.dt_proj_bias)
    assert 1e-3 * 0.99 <= step.min() and step.max() <= 0.1 * 1.01


def test_scan_and_its_options_are_replaced():
    blocks = [b for b in micro(scan=dict(state_dim=3)).modules() if isinstance(b, DynamicScanBlock)]
    assert len(blocks) == 9
    for block in blocks:
        assert isinstance(block.mixer, MultiDirectionScan) and block.mixer.core.state_dim == 3
        assert isinstance(block.mixer.conv, DeformableConv2d) and block.mixer.channel_gate is not None
    assert isinstance(micro(scan=dict(deformable=False)).stages[1].blocks[0].branches[0].blocks[0].mixer.conv, nn.Conv2d)
    bare = micro(scan=False, num_classes=3)
    assert all(block.mixer is None for block in bare.modules() if isinstance(block, DynamicScanBlock))
    assert bare(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_norms_of_all_processes_keep_layout_and_activation():
    model = restless(micro(num_classes=3))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        twin = synchronize_batch_norms(model).eval()
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in twin.modules()) > 50
        torch.testing.assert_close(twin(x), want)


def test_neck_learns_faster_than_the_stages():
    blocks = micro().group_matcher()["blocks"]
    assert blocks[-1] == (r"^neck\.", (99998,))


def test_weights_of_the_other_task_are_told_apart():
    weights = golden_cases.weights(POSE)
    assert HRVMamba.recognises(set(weights)) and HRVMamba.recognises(set(HRVMamba.official_keys(weights)))
    others = [cls for cls in vision_ssm.registry.BACKBONES.module_dict.values() if cls is not HRVMamba]
    for keys in (set(weights), set(HRVMamba.official_keys(weights))):
        assert not [cls.__name__ for cls in others if cls.recognises(keys)]
    whole = {"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}
    whole["state_dict"]["head.final_layer.weight"] = torch.zeros(17, 32, 1, 1)
    model = vision_ssm.create_model("hrvmamba_small_pose")
    report = load_state_dict(model, vision_ssm.weights.unwrap(whole, "a trained estimator of poses"))
    assert report.complete and sum(map(len, report.ignored.values())) == 1


def test_what_is_published():
    """Sizes, and what the paper reports for each of the files."""
    published = HRVMamba.published
    assert set(published) == set(HRVMamba.variants) - {"hrvmamba_micro"}
    assert vision_ssm.create_model("hrvmamba_small_pose").pretrained_cfg["input_size"] == (3, 256, 192)
    small = HRVMamba.weights_of("hrvmamba_small_pose")
    assert list(small) == ["coco_256x192", "coco_384x288", "crowdpose"] and small["coco_256x192"]["coco_ap_reported"] == 74.6
    assert [entry["input_size"] for entry in small.values()] == [(3, 256, 192), (3, 384, 288), (3, 640, 640)]
    assert published["hrvmamba_base"]["input_size"] == (3, 224, 224) and published["hrvmamba_base"]["crop_pct"] == 1.0
    urls = [entry["url"] for weights in published.values() for entry in (weights, *weights.get("also", ()))]
    assert len(set(urls)) == 12 and all(url.startswith("https://drive.google.com/file/d/") for url in urls)


@pytest.mark.parametrize(("size", "batch", "side"), [("nano", 256, 256), ("tiny", 256, 256), ("small", 128, 256), ("base", 128, 224)])
def test_recipe_on_imagenet(size, batch, side):
    cfg = read_config(CONFIGS / "classification" / f"hrvmamba_{size}_8xb{batch}_in1k.py")
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == 5e-4 * 8 * batch / 512 and optimizer.weight_decay == 0.05 and optimizer.eps == 1e-8
    assert cfg.optim_wrapper.precision == "bf16" and cfg.optim_wrapper.clip_grad.max_norm == 5.0
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, cosine.eta_min_ratio) == (1e-3, 20, 1e-2) and cfg.train_cfg.max_epochs == 300
    assert [hook.momentum for hook in cfg.custom_hooks] == [1e-4]
    train, test = cfg.train_dataloader.dataset.transform, cfg.test_dataloader.dataset.transform
    assert (train.input_size, train.erasing_prob, train.color_jitter) == (side, 0.25, 0.4)
    assert (test.input_size, test.crop_pct) == (side, 1.0) == tuple(cfg.val_dataloader.dataset.transform[k] for k in ("input_size", "crop_pct"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chanels=[32, 64, 128, 256]), "unknown hyperparameters of an original HRVMamba: chanels. Did you mean 'channels'"),
        (dict(num_modules=[2, 1, 4, 2]), "first stage of an original HRVMamba is one module, got 2"),
        (dict(dt_rank=4), r"dt_rank of an original HRVMamba is 'ceil\(dim/16\)', got 4"),
    ],
)
def test_wrong_hyperparameters(change, message):
    with pytest.raises(ValueError, match=message):
        HRVMamba.from_official_config({**POSE["config"], **change}, set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dims=(8, 16, 24)), r"dims, depths and neck_dims must have four entries, got dims \(8, 16, 24\)"),
        (dict(depths=(1, 1, 0, 1)), r"every stage and branch needs a block, got depths \(1, 1, 0, 1\) and blocks 1"),
        (dict(maps="sum"), "unknown maps 'sum'. Did you mean 'sums'"),
        (dict(dims=(8, 18, 24, 32)), "four groups, which 18 channels cannot form"),
        (dict(dims=(8, 16, 24, 68)), "groups of a deformable convolution must divide its 136 channels, got 5"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        micro(**options)


def test_weights_say_what_the_config_leaves_out():
    """One map or several, and a depthwise convolution in front of the offsets."""
    weights = golden_cases.weights(POSE)
    config = {key: value for key, value in POSE["config"].items() if key != "multiscale_output"}
    image = golden_cases.images(POSE["input"])
    with torch.no_grad():
        whole = vision_ssm.import_official("hrvmamba", POSE["config"], weights).forward_intermediates(image)
        ours = vision_ssm.import_official("hrvmamba", {**config, "in_chans": 3}, weights).forward_intermediates(image)
    assert len(ours) == len(whole) == 1 and torch.equal(ours[0], whole[0])
    settings = HRVMamba.from_official_config({}, {"stage2.0.branches.0.0.op.conv2d.offset_mask_dw.weight"})
    assert settings["scan"]["offset_kernel"] == 3
    assert HRVMamba.from_official_config(dict(offset_depthwise=True), set())["scan"]["offset_kernel"] == 3
    with pytest.raises(ValueError, match="in_chans of an original HRVMamba is 3, got 1"):
        HRVMamba.from_official_config(dict(in_chans=1), set())


def test_output_norms_on_maps_of_the_branches():
    norms = {f"outnorm{i}.weight" for i in range(4)}
    assert HRVMamba.from_official_config({}, norms)["maps"] == "branches"
    assert HRVMamba.from_official_config({}, norms | {"neck.final_layer.0.weight"})["maps"] == "sums"

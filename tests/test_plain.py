"""Plain backbones: sequences with class tokens, features of any block, pyramids. Families have tests of their own."""

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from vision_ssm.backbones.base import ScanBlock, drop_path_rates, resolve_scan
from vision_ssm.backbones.plain import PlainBackbone
from vision_ssm.layers import DistilledHead, PatchStem, SimplePyramid
from vision_ssm.layers.position import resample_position_table
from vision_ssm.scans.sequence import CLASS_TOKENS, SequenceScan, TokenLayout

COUNTS = {"none": 0, "first": 1, "middle": 1, "last": 1, "double": 2}
DIM = 16


class RunningMean(SequenceScan):
    """Mean of a token and all before it."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def scan_tokens(self, tokens, layout):
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
        return self.proj(tokens.cumsum(1) / count[:, None])


class Small(PlainBackbone):
    """Patches, positions and six blocks of a scan alone."""

    family = "small"

    def __init__(self, *, scan=None, depth=6, positions=True, norm="rms", drop_path_rate=0.0, distilled=False, **common):
        super().__init__(**common)
        self.distilled = distilled
        self.stem = PatchStem(self.in_chans, DIM, 16, norm="none")
        spec = resolve_scan(scan, dict(type=RunningMean))
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        blocks = [ScanBlock(DIM, spec, norm=norm, mlp_ratio=0.0, drop_path=rate) for rate in rates]
        self.finish_plain(blocks, DIM, 16, self.stem.grid_size((64, 64)) if positions else None, norm=norm)

    def build_head(self, num_classes):
        return DistilledHead(DIM, num_classes) if self.distilled else super().build_head(num_classes)


def small(**options):
    return Small(**{"num_classes": 5, **options}).eval()


# Sequences


@pytest.mark.parametrize("kind", CLASS_TOKENS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 5)], ids=str)
def test_layout_joins_and_splits(kind, size):
    layout = TokenLayout(*size, kind)
    length, count = size[0] * size[1], COUNTS[kind]
    patches, tokens = torch.randn(2, length, 3), torch.randn(2, count, 3)
    sequence = layout.join(patches, tokens)
    assert sequence.shape == (2, length + count, 3) and len(layout.positions) == count
    for i, place in enumerate(layout.positions):
        assert torch.equal(sequence[:, place], tokens[:, i])
    for got, want in zip(layout.split(sequence), (patches, tokens), strict=True):
        assert torch.equal(got, want)


def test_places_of_class_tokens():
    places = {kind: TokenLayout(3, 5, kind).positions for kind in CLASS_TOKENS}
    assert places == {"none": (), "first": (0,), "middle": (7,), "last": (15,), "double": (0, 16)}
    order = TokenLayout(1, 5, "middle").join(torch.arange(5.0).view(1, 5, 1), torch.full((1, 1, 1), -1.0))
    assert order.flatten().tolist() == [0, 1, -1, 2, 3, 4]


def test_a_sequence_scan_serves_maps():
    mixer = RunningMean(3)
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(mixer(x), mixer.scan_tokens(x.flatten(1, 2), TokenLayout(4, 5)).view(x.shape))
    strided = x.transpose(1, 2)
    torch.testing.assert_close(mixer(strided), mixer(strided.contiguous()))


# Class tokens


@pytest.mark.parametrize("kind", CLASS_TOKENS)
@pytest.mark.parametrize("size", [(64, 64), (50, 97)], ids=str)
def test_classifier_sees_the_class_tokens(kind, size):
    model, image = small(class_tokens=kind), torch.randn(2, 3, *size)
    cells = [-(-side // 16) for side in size]
    features = model.forward_features(image)
    if kind == "none":
        assert features.shape == (2, DIM, *cells)
        pooled = features.mean((2, 3))
    else:
        layout = TokenLayout(*cells, kind)
        assert features.shape == (2, cells[0] * cells[1] + COUNTS[kind], DIM)
        pooled = layout.split(features)[1].mean(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(image), model.head(pooled))
    for feature in model.forward_intermediates(image):
        assert feature.shape == (2, DIM, *cells)


def test_class_tokens_have_positions_of_their_own():
    model = small(class_tokens="double")
    model.cls_token.positions.data += 3.0
    x, layout, size = model.embed(torch.randn(2, 3, 64, 64))
    want = (model.cls_token.tokens + model.cls_token.positions).expand(2, -1, -1)
    assert size == (4, 4) and torch.equal(layout.split(x)[1], want)
    assert {"cls_token.tokens", "cls_token.positions", "pos_embed.table"} <= model.no_weight_decay()


def test_maps_carry_no_class_tokens():
    """A strategy that walks no sequence pools instead; so does a model without mixers."""
    for scan in ("multi_direction", False):
        model = small(class_tokens="middle", scan=scan, norm="layer")
        assert model.class_tokens == "none" and model.cls_token is None
        assert not any(name.startswith("cls_token") for name in model.state_dict())
        assert model(torch.randn(1, 3, 48, 64)).shape == (1, 5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["none", "middle"])
def test_stream(norm, kind):
    """Blocks add to a stream that is normalised in front of each, and at the end."""
    model, image = small(norm=norm, class_tokens=kind), torch.randn(2, 3, 64, 48)
    x, layout, _ = model.embed(image)
    for block in model.stages:
        normed = block.norm1(x)
        x = x + (block.mixer(normed) if layout is None else block.mixer.scan_tokens(normed, layout))
    want = model.norm(x)
    want = want.mean((1, 2)) if layout is None else layout.split(want)[1].mean(1)
    torch.testing.assert_close(model(image), model.head(want))


# Features


@pytest.mark.parametrize(
    ("depth", "indices"), [(24, [5, 11, 17, 23]), (6, [0, 2, 3, 5]), (4, [0, 1, 2, 3]), (3, [0, 1, 2]), (1, [0])]
)
def test_features_are_evenly_spaced(depth, indices):
    model = small(depth=depth)
    assert model.out_indices == indices
    assert [info["module"] for info in model.out_info] == [f"stages.{i}" for i in indices]
    assert len(model.forward_intermediates(torch.randn(1, 3, 32, 32))) == len(indices)


@pytest.mark.parametrize("kind", ["none", "double"])
def test_features_of_any_block(kind):
    model, image = small(class_tokens=kind), torch.randn(2, 3, 64, 40)
    every = model.forward_intermediates(image, out_indices=range(6))
    for i in range(6):
        torch.testing.assert_close(model.forward_intermediates(image, out_indices=(i,))[0], every[i])
    x, layout, size = model.embed(image)
    branch, streams = None, []
    for block in model.stages:
        x, branch = block(x, branch, layout)
        stream = x + branch[0]
        streams.append(stream if layout is None else layout.split(stream)[0].unflatten(1, size))
    for got, want in zip(every, streams, strict=True):
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


def test_features_of_the_mixer():
    """What a block adds to the stream: the difference of the streams around it."""
    image = torch.randn(2, 3, 64, 64)
    streams, mixer = small(), small(feature_source="mixer")
    mixer.load_state_dict(streams.state_dict())
    every = streams.forward_intermediates(image, out_indices=range(6))
    added = mixer.forward_intermediates(image, out_indices=range(6))
    for i in range(1, 6):
        torch.testing.assert_close(added[i], every[i] - every[i - 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(image), streams(image))


def test_output_norms_and_blocks_that_are_not_built():
    model = small(features_only=True, out_indices=(1, 3))
    assert len(model.stages) == 4 and set(model.out_norms) == {"1", "3"}
    raw = small(features_only=True, out_indices=(1, 3), out_norm=False)
    raw.load_state_dict({key: value for key, value in model.state_dict().items() if "out_norms" not in key})
    image = torch.randn(1, 3, 64, 64)
    for i, got, want in zip((1, 3), model(image), raw(image), strict=True):
        torch.testing.assert_close(got, model.out_norms[str(i)](want.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"was built for out_indices=\[1, 3\] and has no map 5"):
        model.forward_intermediates(image, out_indices=(5,))


def test_a_feature_in_training_is_what_the_next_block_sees():
    """Stochastic depth draws once for a block, whether its map is asked for or not."""
    model, image = small(drop_path_rate=0.9).train(), torch.randn(8, 3, 64, 64)
    seen = []
    model.stages[4].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    maps = model.forward_intermediates(image, out_indices=(3, 5))
    assert torch.equal(seen[0], maps[0].permute(0, 2, 3, 1))


# Pyramids


def test_pyramid():
    pyramid, maps = SimplePyramid(DIM).eval(), [torch.randn(2, 3, 5, DIM) for _ in range(4)]
    levels = pyramid(maps)
    assert [level.shape for level in levels] == [(2, h, w, DIM) for h, w in ((12, 20), (6, 10), (3, 5), (2, 3))]
    assert torch.equal(levels[2], maps[2])
    assert torch.equal(levels[3][:, 1, 2], maps[3][:, 2, 4]) and torch.equal(levels[3][:, 0, 0], maps[3][:, :2, :2].amax((1, 2)))
    up = pyramid.levels[1]
    patch = torch.einsum("c,cohw->hwo", maps[1][0, 1, 2], up.weight) + up.bias
    torch.testing.assert_close(levels[1][0, 2:4, 4:6], patch)
    for got, want in zip(pyramid(maps[:1]), pyramid(maps[:1] * 4), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError):
        pyramid(maps[:2])


@pytest.mark.parametrize("indices", [None, (2,)], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 40)], ids=str)
def test_pyramid_of_a_model(indices, size):
    model = small(features_only=True, pyramid=True, out_indices=indices)
    assert [(info["num_chs"], info["reduction"]) for info in model.out_info] == [(DIM, s) for s in (4, 8, 16, 32)]
    maps = model(torch.randn(2, 3, *size))
    for info, feature in zip(model.out_info, maps, strict=True):
        assert feature.shape == (2, DIM, *(-(-side // info["reduction"]) for side in size)) and feature.is_contiguous()
    sum(feature.square().sum() for feature in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Positions


def test_positions_serve_any_size():
    model = small()
    assert model.pos_embed.table.shape == (1, DIM, 4, 4)
    image = torch.randn(1, 3, 96, 40)
    x, _, size = model.embed(image)
    table = nn.functional.interpolate(model.pos_embed.table, size=(6, 3), mode="bicubic")
    assert size == (6, 3)
    torch.testing.assert_close(x, model.stem(image) + table.permute(0, 2, 3, 1))
    assert resample_position_table(model.pos_embed.table, 4, 4) is model.pos_embed.table
    halved = resample_position_table(model.pos_embed.table.bfloat16(), 6, 3)
    assert halved.dtype == torch.bfloat16
    wide = model.pos_embed.table.double()
    expected = nn.functional.interpolate(wide, size=(6, 3), mode="bicubic")
    torch.testing.assert_close(resample_position_table(wide, 6, 3), expected, rtol=1e-12, atol=1e-12)
    assert small(positions=False).pos_embed is None


# Training


@pytest.mark.parametrize("kind", ["none", "middle"])
def test_grad_checkpointing_changes_nothing(kind):
    model, image = small(class_tokens=kind, drop_path_rate=0.5).train(), torch.randn(4, 3, 64, 48)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(image).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_layer_decay():
    model = small(class_tokens="first")
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale.keys() == set(names.values())
    parts = [{scale[name] for name in scale if name.startswith(("stem.", "pos_embed.", "cls_token."))}]
    parts += [{scale[name] for name in scale if name.startswith(f"stages.{i}.")} for i in range(6)]
    parts += [{scale[name] for name in scale if name.startswith("head.")}]
    assert parts == [{0.5**i} for i in reversed(range(8))]
    assert scale["norm.weight"] == 0.5  # as the last block's
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert not decayed & model.no_weight_decay()
    dense = small(features_only=True, pyramid=True)
    groups = param_groups_layer_decay(dense, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scale[id(p)] for p in [*dense.pyramid.parameters(), *dense.out_norms.parameters()]} == {1.0}


@pytest.mark.parametrize("kind", ["none", "double"])
def test_autocast(kind):
    model, image = small(class_tokens=kind, norm="layer"), torch.randn(2, 3, 64, 64)
    exact = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close = model(image)
    assert (close.float() - exact).norm() < 0.05 * exact.norm()


def test_distilled_head():
    model, image = small(class_tokens="first", distilled=True), torch.randn(2, 3, 64, 64)
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    label, teacher = model.head.label(pooled), model.head.teacher(pooled)
    torch.testing.assert_close(model(image), (label + teacher) / 2)
    outputs = model.train()(image)
    assert isinstance(outputs, tuple)
    for got, want in zip(outputs, (label, teacher), strict=True):
        torch.testing.assert_close(got, want)
    model.double().reset_classifier(3)
    assert model.head.label.weight.shape == (3, DIM) and model.head.teacher.weight.dtype == torch.float64
    assert model.head.label.weight.std() < 0.05 and not model.head.teacher.bias.any()
    model.reset_classifier(0)
    assert model(image.double()).shape == (2, DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_tokens="centre"), "unknown class_tokens 'centre'"),
        (dict(feature_source="mixers"), "unknown feature_source 'mixers'. Did you mean 'mixer'"),
        (dict(pyramid=True), "pyramid needs features_only=True: a classifier has no use for it"),
        (
            dict(pyramid=True, features_only=True, out_indices=(0, 1)),
            r"made of the maps of 1 or 4 blocks, got out_indices=\[0, 1\]",
        ),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)

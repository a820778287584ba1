"""Pictures of scans and models: exact where that can be computed, and drawn for models of every kind."""

import copy
import json
import runpy
from functools import partial

import numpy as np
import pytest
import torch
from engine_support import QUICKSTART, ROOT, small_config
from PIL import Image
from torch import nn

from vision_ssm import build_scan, create_model, list_models, list_scans
from vision_ssm.analysis.class_activation import cam_stage, grad_cam, maps_and_gradients
from vision_ssm.analysis.feature_pictures import find_kernels, reduce_map, tile
from vision_ssm.analysis.receptive_field import covered_areas, receptive_field
from vision_ssm.analysis.route_pictures import save_animated_svg, save_gif
from vision_ssm.analysis.scan_attention import find_mixer, mixer_input, named_mixers, on_decades, query_weights
from vision_ssm.backbones.plain import PlainBackbone
from vision_ssm.engine.subjects import load_subject
from vision_ssm.engine.visualize_command import visualize
from vision_ssm.scans import build_routes
from vision_ssm.scans.walks import NoRouteError, Walk, Wave, walks_of

MICROS = list_models("*_micro")
WITHOUT_ROUTE = ("attention", "hidden_state", "noncausal_ssd")
MIXER_DIM = 16


class OneConvolution(nn.Module):
    """A backbone of one 3x3 convolution and a linear head on the mean, as far as pictures ask for one."""

    variant = "one_convolution"
    feature_info = [dict(num_chs=4, reduction=1, module="conv")]

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward_intermediates(self, x, out_indices=None):
        return [self.conv(x)]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A colour picture, not square."""
    y, x = np.mgrid[:50, :80]
    values = np.stack([127 + 100 * np.sin(x / 6), 127 + 100 * np.cos(y / 5), (x + y) % 256], -1)
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


def draws(capsys, *arguments) -> list:
    """Paths that the command prints, of files that it has written."""
    assert visualize([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def fails(capsys, *arguments) -> str:
    """What the command says on its way out."""
    with pytest.raises(SystemExit) as stop:
        visualize([str(argument) for argument in arguments])
    assert stop.value.code != 0
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# Routes


@pytest.mark.parametrize("name", list_scans())
def test_every_strategy_shows_its_walks_or_says_why_not(name):
    mixer = build_scan(name, 64)
    if name in WITHOUT_ROUTE:
        with pytest.raises(NoRouteError, match="in no order"):
            walks_of(mixer, 5, 7)
        return
    for walk in walks_of(mixer, 5, 7):
        if isinstance(walk, Wave):
            assert walk.steps.shape == (5, 7) and walk.steps.max() == 5 + 7 - 2
            continue
        cells = walk.order[walk.order < walk.height * walk.width]
        assert cells.unique().numel() == cells.numel()
        if name != "atrous":  # a quarter of the cells each
            assert cells.numel() == walk.height * walk.width


def test_walks_are_those_that_the_mixers_take():
    low = walks_of(build_scan("multi_scale", 8), 3, 5)
    assert [(walk.height, walk.width) for walk in low] == [(3, 5)] + [(2, 3)] * 3
    assert low[1].order.tolist() == [5, 4, 3, 2, 1, 0] and low[2].order.tolist() == [0, 3, 1, 4, 2, 5]
    both = walks_of(build_scan(dict(type="noncausal_ssd", order="bidirectional", groups=2), 128), 2, 2)
    assert [walk.order.tolist() for walk in both] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert walks_of(build_scan(dict(type="causal", reverse=True), 8), 2, 2)[0].order.tolist() == [3, 2, 1, 0]
    ahead = walks_of(build_scan(dict(type="local_bidirectional", window=4, both=True), 8), 2, 2)
    assert [walk.title for walk in ahead] == ["forwards, looking ahead in windows of 4 steps", "backwards"]
    wave = walks_of(build_scan("plstm", 8), 2, 3)[1]
    assert wave.title == "orientation 1, from the bottom left" and wave.steps.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert wave.directions == ((-1, 0), (0, 1))
    (padded, *_) = walks_of(build_scan("atrous", 8), 3, 3)
    assert (padded.height, padded.width) == (4, 4)


def test_the_wave_of_plstm_is_the_order_in_which_cells_see_each_other():
    """In one orientation a cell depends on those that the wave has passed before it, and on itself."""
    mixer = build_scan(dict(type="plstm", num_heads=1), MIXER_DIM).double()
    with torch.no_grad():
        mixer.gate_bias.fill_(1.0)
    for number, wave in enumerate(walks_of(mixer, 3, 4)):
        one = copy.deepcopy(mixer)
        with torch.no_grad():
            one.gate_bias[1, [n for n in range(4) if n != number]] = -1e4  # marks: the others are not read
        weights, _ = query_weights(one, torch.randn(1, 3, 4, MIXER_DIM).double(), (1, 2))
        (down, _), (_, right) = wave.directions
        rows, columns = torch.arange(3)[:, None], torch.arange(4)
        seen = ((1 - rows) * down >= 0) & ((2 - columns) * right >= 0)
        assert torch.equal(weights > 0, seen) and (wave.steps[seen] <= wave.steps[1, 2]).all()


@pytest.mark.parametrize("name, steps", [("cross", 12), ("cascade", 4)])
def test_gif_has_one_frame_per_step(name, steps, tmp_path):
    walks = build_routes(name).walks(3, 4)
    assert save_gif(walks, tmp_path / "a.gif", name) == steps
    with Image.open(tmp_path / "a.gif") as image:
        assert image.format == "GIF" and image.n_frames == steps
        image.seek(0)
        first = np.asarray(image.convert("RGB"))
        image.seek(steps - 1)
        assert (first != np.asarray(image.convert("RGB"))).any()
    fewer = 3 if steps == 12 else 2  # steps in threes or fours, or in twos
    assert save_gif(walks, tmp_path / "b.gif", name, frames=3) == fewer == Image.open(tmp_path / "b.gif").n_frames
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        save_gif(walks, tmp_path / "c.gif", name, frames=0)


def test_animated_svg_lets_every_cell_appear_in_its_turn(tmp_path):
    walk = Walk("one <route>", 1, 3, torch.tensor([2, 0, 1]))
    save_animated_svg([walk], tmp_path / "a.svg", "three & cells", seconds=0.5)
    text = (tmp_path / "a.svg").read_text()
    assert "three &amp; cells" in text and "one &lt;route&gt;" in text
    assert text.count("<line") == 2 and text.count("<animate") == 2 + 2 + 1  # lines, cells after the first, the end
    assert 'dur="7.5s"' in text  # 3 steps and 12 of rest


def test_a_route_may_leave_cells_out_and_read_padding(tmp_path):
    walks = walks_of(build_scan(dict(type="windowed", directions=["raster", "window2"]), 8), 3, 3)
    assert [walk.title for walk in walks] == ["raster", "window2"] and walks[1].order.max() == 9
    assert save_gif(walks, tmp_path / "a.gif", "padding") == 16


# Effective receptive fields


@pytest.mark.parametrize("measure", ["abs", "square"])
def test_the_receptive_field_of_a_convolution_is_its_kernel(measure):
    model = OneConvolution()
    field = receptive_field(model, [torch.randn(3, 9, 11) for _ in range(2)], measure=measure)
    assert field.count_nonzero() == 9 and (field[3:6, 4:7] > 0).all() and float(field.sum()) == pytest.approx(1)
    kernel = model.conv.weight.detach().double().sum(0)  # (3, 3, 3): of the sum of all channels
    kernel = (kernel.abs() if measure == "abs" else kernel.square()).sum(0)
    assert torch.allclose(field[3:6, 4:7], kernel / kernel.sum())
    assert [area.side for area in covered_areas(field)][-1] == 3
    assert covered_areas(field, (1.0,))[0].ratio == pytest.approx(9 / 99)


def test_areas_are_centred_squares_cut_off_at_the_border():
    field = torch.zeros(5, 7)
    field[2, 3] = field[2, 6] = 1
    small, large = covered_areas(field, (0.5, 0.99))
    assert (small.side, small.ratio) == (1, 1 / 35) and (large.side, large.ratio) == (7, 1)


# Grad-CAM


def test_grad_cam_of_a_mean_and_a_linear_head_has_a_closed_form():
    """The logit is linear in the mean of the normalised map, so the gradient is known where the norm is linear."""
    model = create_model("vmamba_micro", num_classes=5).eval()
    model.norm = nn.Identity()
    image = torch.randn(3, 64, 96)
    cam, label, share = grad_cam(model, image, label=3)
    features = model.forward_intermediates(image[None], (3,))[0][0].detach()
    cells = features.shape[1] * features.shape[2]
    closed = (model.head.weight[3].view(-1, 1, 1) * features / cells).sum(0).relu()
    assert torch.allclose(cam, closed.detach(), rtol=1e-4, atol=1e-7) and cam.shape == (2, 3)
    assert label == 3 and share == pytest.approx(model(image[None])[0].softmax(0)[3].item(), rel=1e-5)


@pytest.mark.parametrize("name", MICROS)
def test_grad_cam_weighs_the_map_that_the_model_returns(name):
    """The watched map is that of `forward_intermediates`, and its gradient that of the logit along the map."""
    model = create_model(name, num_classes=3).double().eval()
    image = torch.randn(3, 64, 64).double()
    stage = cam_stage(model, None)
    activation, gradient, label, _ = maps_and_gradients(model, image, stage, 1)
    assert label == 1
    module = model.get_submodule(model.feature_info[stage]["module"])
    direction = torch.randn(activation.shape).double()

    def push(sign, arguments, output):
        first = output[0] if isinstance(output, tuple) else output[stage] if isinstance(output, list) else output
        step = direction.permute(1, 2, 0)[None]
        if first.dim() == 3:
            layout = next(a for a in arguments if hasattr(a, "join"))
            step = layout.join(step.flatten(1, 2), step.new_zeros(1, len(layout.positions), step.shape[-1]))
        pushed = first + sign * 1e-6 * step
        if isinstance(output, tuple):
            return (pushed, *output[1:])
        return [pushed if i == stage else m for i, m in enumerate(output)] if isinstance(output, list) else pushed

    ends = []
    for sign in (1, -1):
        hook = partial(lambda sign, _, arguments, output: push(sign, arguments, output), sign)
        with module.register_forward_hook(hook), torch.no_grad():
            ends.append(float(model(image[None])[0, 1]))
    slope = float((gradient * direction).sum())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4) and slope != 0
    if name not in ("plainmamba_micro", "plstm_micro"):  # these normalise the maps of classifiers
        returned = model.forward_intermediates(image[None], (stage,))[0][0]
        assert torch.allclose(activation, returned, rtol=1e-6)


def test_class_tokens_hide_the_last_map():
    model = create_model("vim_micro", num_classes=3)
    assert isinstance(model, PlainBackbone) and cam_stage(model, None) == len(model.stages) - 2
    with pytest.raises(ValueError, match="reads the class token behind block 3, not its cells: choose a stage up to 2"):
        cam_stage(model, -1)


# Implicit attention


def test_attention_of_a_causal_scan_sees_no_later_token():
    mixer = build_scan(dict(type="causal", heading=False), MIXER_DIM).eval()
    weights, _ = query_weights(mixer, torch.randn(1, 4, 5, MIXER_DIM), (2, 1))
    flat = weights.flatten()
    assert (flat[: 2 * 5 + 2] > 0).all() and (flat[2 * 5 + 2 :] == 0).all()
    raster = build_scan(dict(type="bidirectional", directions="backward"), MIXER_DIM).eval()
    flat = query_weights(raster, torch.randn(1, 4, 5, MIXER_DIM), (2, 1))[0].flatten()
    assert (flat[: 2 * 5 + 1] == 0).all() and (flat[2 * 5 + 1 :] > 0).all()


@pytest.mark.parametrize("name", list_scans())
def test_attention_is_the_jacobian(name):
    mixer = build_scan(name, MIXER_DIM).double().eval()
    x = torch.randn(1, 4, 6, MIXER_DIM).double()
    weights, class_tokens = query_weights(mixer, x, (1, 2))
    jacobian = torch.autograd.functional.jacobian(lambda values: mixer(values)[0, 1, 2], x)  # (C, 1, H, W, C)
    assert torch.allclose(weights, jacobian.square().sum(dim=(0, 1, 4)).sqrt(), rtol=1e-6, atol=1e-12)
    assert class_tokens.numel() == 0 and (weights > 0).any()


def test_attention_of_every_kind_of_block(photo):
    for name in ("vim_micro", "efficientvim_micro", "hrvmamba_micro", "vmunet_micro"):
        subject = load_subject(name, size=[64])
        block, mixer = find_mixer(subject.model, None)
        x, layout = mixer_input(subject.model, mixer, subject.read(photo))
        query = (0, min(1, (layout.width if layout else x.shape[2]) - 1))
        assert not any(key in vars(mixer) for key in ("forward", "mix", "scan_tokens"))  # nothing is left behind
        weights, class_tokens = query_weights(mixer, x, query, layout)
        assert block in named_mixers(subject.model) and weights.isfinite().all() and weights[query] > 0
        assert (class_tokens.numel() == 1) == (name == "vim_micro")
    with pytest.raises(ValueError, match="the query 9, 0 lies outside of the map"):
        query_weights(mixer, x, (9, 0), layout)


def test_scale_holds_nearly_all_weights():
    values, decades = on_decades(torch.cat([10 ** -torch.linspace(0, 4, 41), torch.zeros(9)]))
    assert decades == 4 and values[0] == 1 and values[20] == pytest.approx(0.5) and (values[41:] == 0).all()
    assert on_decades(torch.zeros(3))[1] == 1


# Feature maps and kernels


def test_principal_components_separate_what_differs():
    features = torch.zeros(6, 2, 2)
    features[2, 0] = 5.0  # the rows differ in one channel
    picture = reduce_map(features, "pca")
    assert picture.shape == (2, 2, 3) and (picture[0, :, 0] - picture[1, :, 0] == 1).all()
    assert reduce_map(features, "norm").tolist() == [[1, 1], [0, 0]] == reduce_map(features, "mean").tolist()
    with pytest.raises(ValueError, match="unknown reduction 'pc'. Did you mean 'pca'"):
        reduce_map(features, "pc")


def test_kernels_are_found_and_laid_out():
    model = create_model("vmamba_micro")
    layers = dict(find_kernels(model))
    first, *others = layers.items()
    assert first[0].startswith("stem.") and first[1].shape[1:] == (3, 3, 3)
    assert len(others) == 4 and all(kernels.shape[1:] == (1, 3, 3) for _, kernels in others)
    sheet = tile(torch.tensor([[[[2.0, -1.0]]], [[[0.0, 4.0]]]]))
    assert sheet.shape == (3, 2) and np.isnan(sheet[1]).all()
    assert sheet[0].tolist() == [1.0, 0.25] and sheet[2].tolist() == [0.5, 1.0]
    assert [name for name, _ in find_kernels(model, ["stages.1.*"])] == ["stages.1.blocks.0.mixer.conv"]
    with pytest.raises(ValueError, match="no drawable layer matches 'stem.conv3'. Did you mean 'stem.conv1'"):
        find_kernels(model, ["stem.conv3"])


# The command


@pytest.mark.parametrize("name", ["vmamba_micro", "vim_micro"])
def test_every_subcommand_draws_backbones(name, photo, tmp_path, capsys):
    common = ["--size", 64, 96, "--out"]
    runs = {
        "cam": [photo, "--class", 7, "--whole"],
        "activation": [photo],
        "attn": [photo, "--query", 0, 1, "--query", 0.5, 0.5],
        "erf": ["--random", 1],
    }
    for command, arguments in runs.items():
        out = tmp_path / f"{command}.png"
        printed = draws(capsys, command, name, *arguments, *common, out)
        assert str(out) in printed
        image = np.asarray(Image.open(out).convert("RGB"))
        assert image.shape[1] > 200 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    record = json.loads((tmp_path / "erf.json").read_text())
    areas = record["fields"]["random weights"]["areas"]
    assert [area["threshold"] for area in areas] == [0.2, 0.3, 0.5, 0.99]
    assert all(0 < area["ratio"] <= 1 for area in areas) and record["images"] == "1 image of noise"
    assert draws(capsys, "filters", name, "--out", tmp_path / "f.png") == [str(tmp_path / "f.png")]


@pytest.mark.parametrize("classes", [1, 3])
def test_grad_cam_of_a_unet_is_that_of_the_pixels_that_get_the_class(classes):
    model = create_model("vmunet_micro", num_classes=classes).double().eval()
    image = torch.randn(3, 64, 96).double()
    activation, gradient, label, share = maps_and_gradients(model, image, 2, None)
    scores = model(image[None])[0]
    gets = scores[0] > 0 if classes == 1 else scores.argmax(0) == label
    counts = [int((scores.argmax(0) == number).sum()) for number in range(classes)]
    assert label == (0 if classes == 1 else 1 + counts[1:].index(max(counts[1:]))) and 0 < share < 1
    assert share == pytest.approx(float(gets.double().mean()))
    returned = model.encode(model.prepare(image[None]))[2][0].permute(2, 0, 1)  # what the decoder takes
    direction, ends = torch.randn(returned.shape).double(), []
    for sign in (1, -1):
        with torch.no_grad():
            maps = list(model.encode(model.prepare(image[None])))
            maps[2] = maps[2] + sign * 1e-6 * direction.permute(1, 2, 0)
            ends.append(float(model.read(model.decode(maps)[-1], 64, 96)[0, label][gets].sum()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-4)
    assert torch.allclose(activation, returned) and grad_cam(model, image, stage=2).cam.shape == returned.shape[1:]


def test_every_subcommand_draws_unets(photo, tmp_path, capsys):
    for command, arguments in {
        "activation": [photo, "--reduce", "norm"], "cam": [photo], "erf": [photo], "attn": [photo], "filters": [],
    }.items():  # fmt: skip
        size = [] if command == "filters" else ["--size", 64]
        out = tmp_path / f"{command}.png"
        assert draws(capsys, command, "vmunet_micro", *arguments, *size, "--out", out)
        assert out.exists()
    record = json.loads((tmp_path / "erf.json").read_text())
    assert record["stage"] is None and record["images"] == "1 image"


def test_scan_finds_routes_strategies_and_models(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert draws(capsys, "scan", "cross", "--grid", 3, 5, "--out", out) == [str(out)] and Image.open(out).width > 800
    assert draws(capsys, "scan", "snake", "--out", tmp_path / "b.svg") and "<svg" in (tmp_path / "b.svg").read_text()
    draws(capsys, "scan", "raster", "--grid", 2, 3, "--animate", "--out", tmp_path / "c.svg")
    assert "<animate" in (tmp_path / "c.svg").read_text()
    draws(capsys, "scan", "plstm", "--grid", 2, 3, "--out", tmp_path / "d.gif")
    assert Image.open(tmp_path / "d.gif").n_frames == 2 + 3 - 1
    options = ["--options", "directions=[column,window2_reversed]"]
    draws(capsys, "scan", "windowed", "--grid", 3, 3, *options, "--out", tmp_path / "e.gif")
    assert Image.open(tmp_path / "e.gif").n_frames == 16
    assert visualize(["scan", "bidirectional", "--kind", "scan", "--grid", "2", "2", "--out", str(out)]) == 0
    assert "bidirectional is also a route family: --kind routes" in capsys.readouterr().err
    assert visualize(["scan", "localvmamba_micro", "--out", str(out)]) == 0
    assert "stages.1.blocks.0" in capsys.readouterr().err
    draws(capsys, "scan", "localvmamba_micro", "--block", "stages.3.blocks.0", "--out", out)


def test_a_training_run_is_looked_at_through_its_config(data, tmp_path, capsys):
    """Before and after training: the checkpoint's weights, channels, classes and transform."""
    config = small_config(data, tmp_path)
    model = load_subject(_dumped(config, tmp_path)).model
    checkpoint = tmp_path / "trained.pth"
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    meta = dict(dataset_meta=dict(classes=("bars", "blob", "rows")))
    torch.save(dict(state_dict={f"backbone.{k}": v for k, v in model.state_dict().items()}, meta=meta), checkpoint)
    subject = load_subject(str(tmp_path / "small.py"), str(checkpoint))
    assert subject.classes == ("bars", "blob", "rows") and subject.channels == 1 and subject.size == (32, 32)
    picture = subject.picture(subject.read(data / "val" / "rows" / "00.png"))
    expected = np.asarray(Image.open(data / "val" / "rows" / "00.png"), dtype=np.float32) / 255
    assert np.abs(picture[..., 0] - expected).max() < 1e-5 and picture.shape == (32, 32, 3)
    common = [tmp_path / "small.py", data / "val", "--checkpoint", checkpoint, "--out"]
    draws(capsys, "cam", *common, tmp_path / "cam.png", "--class", "blob", 0, "--stage", 0)
    draws(capsys, "erf", *common, tmp_path / "erf.png", "--count", 2)
    assert list(json.loads((tmp_path / "erf.json").read_text())["fields"]) == ["before training", "trained"]
    assert "has no class 'blub'. Did you mean 'blob'?" in fails(capsys, "cam", *common, tmp_path / "x.png", "--class", "blub")


def _dumped(config, folder) -> str:
    config.dump(folder / "small.py")
    return str(folder / "small.py")


def test_weights_by_name_bring_their_channels_and_classes(tmp_path):
    for name, options in (("vmamba_micro", dict(in_chans=1, num_classes=4)), ("vmunet_micro", dict(num_classes=2))):
        model = create_model(name, **options)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        subject = load_subject(name, str(tmp_path / "w.pth"))
        assert subject.model.in_chans == model.in_chans and len(subject.classes) == model.num_classes
        assert torch.equal(next(subject.model.parameters()), next(model.parameters()))
    maps = create_model("vmamba_micro", features_only=True)
    torch.save(maps.state_dict(), tmp_path / "maps.pth")
    assert load_subject("vmamba_micro", str(tmp_path / "maps.pth")).model.features_only


def test_sixteen_bit_grey_is_read_and_damaged_files_are_named(photo, tmp_path, capsys):
    deep = tmp_path / "deep.png"
    Image.fromarray((np.arange(48 * 64).reshape(48, 64) * 20).astype(np.uint16)).save(deep)
    image = load_subject("vmamba_micro", size=[64]).read(deep, whole=True)
    assert image.shape == (3, 64, 85) and image.std() > 0.1
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:300])
    assert "cannot read image" in (message := fails(capsys, "cam", "vmamba_micro", broken, "--out", tmp_path / "c.png"))
    assert "broken.jpg" in message
    arguments = ["activation", "vmamba_micro", str(deep), str(broken), "--size", "32", "--out", str(tmp_path / "a.png")]
    assert visualize(arguments) == 0
    assert "broken.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["scan", "crosss"], "no route family, scan strategy or model is called 'crosss'. Did you mean 'cross'"),
        (["scan", "raster", "--kind", "scan"], "no scan strategy is called 'raster'"),
        (["scan", "attention"], "attention follows no route: attention lets every cell read every other one at once"),
        (["scan", "vssd_micro"], "vssd_micro follows no route"),
        (["scan", "cross", "--block", "stages.0"], "--block belongs to a model; cross is a route family"),
        (["scan", "vmamba_micro", "--block", "stages.0.block.0"], "Did you mean 'stages.0.blocks.0'"),
        (["scan", "cross", "--out", "a.jpg"], "--out a.jpg should end in .png or .svg or .gif"),
        (["scan", "cross", "--animate"], "an animation is a .gif or .svg"),
        (["scan", "bidirectional", "--options", "repeat=1"], "'repeat': Did you mean 'repeats'?"),
        (["erf", "vmamba_micr"], "unknown model 'vmamba_micr'. Did you mean 'vmamba_micro'"),
        (["erf", "vmamba_micro", "--stage", "4"], "vmamba_micro has stages 0 to 3 (or -4 to -1), got 4"),
        (["erf", "vmamba_micro", "--size", "16"], "--size must be at least 32 pixels, got 16"),
        (["erf", "vmamba_micro", "PHOTO", "--random", "2"], "--random takes the place of images"),
        (["erf", "vmamba_micro", "PHOTO", "--whole"], "--whole is not for erf"),
        (["erf", "vmamba_micro", "--checkpoint", "no.pth"], "no.pth"),
        (["cam", "vmamba_micro", "no.jpg"], "no.jpg is neither an image nor a folder"),
        (["cam", "vmamba_micro", "PHOTO", "--class", "1000"], "vmamba_micro has classes 0 to 999, got 1000"),
        (["cam", "vmamba_micro", "PHOTO", "--stage", "-5"], "stages 0 to 3 (or -4 to -1), got -5"),
        (["cam", "vmamba_micro", "PHOTO", "--options", "num_classes=0"], "vmamba_micro has no classifier"),
        (["cam", "configs/segmentation/upernet_vmamba_micro_shapes.py", "PHOTO"], "a classifier's or a U-Net's is needed"),
        (["activation", "vmamba_micro", "PHOTO", "--stages", "0", "7"], "stages 0 to 3 (or -4 to -1), got 7"),
        (["attn", "vmamba_micro"], "give one image, got 0"),
        (["attn", "cross_scan"], "unknown model 'cross_scan'"),
        (["attn", "causal", "PHOTO"], "causal alone has no images and no checkpoint"),
        (["attn", "causal", "--query", "2", "0"], "--query gives fractions of height and width between 0 and 1, got 2 0"),
        (["attn", "vmamba_micro", "PHOTO", "--block", "stages.9"], "no block 'stages.9' with a token mixer"),
        (["attn", "vmamba_micro", "PHOTO", "--options", "scan=False"], "vmamba_micro has no token mixer"),
        (["filters", "vmamba_micro", "--layers", "head"], "no drawable layer matches 'head'"),
        (["filters", "QUICKSTART", "--options", "dims=8"], "--options are keywords of a model by name"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, message, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    places = {"PHOTO": str(photo), "QUICKSTART": str(QUICKSTART)}
    arguments = [places.get(argument, argument) for argument in arguments]
    if "--out" not in arguments and "--animate" not in arguments:
        arguments += ["--out", str(tmp_path / "out.png")]
    if arguments[0] in ("activation", "attn") and "--size" not in arguments:
        arguments += ["--size", "64"]
    assert message in fails(capsys, *arguments)


def test_the_place_to_write_to_is_checked_first(photo, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file" / "a.png", "/proc/a.png"):
        assert f"cannot write {out}" in fails(capsys, "cam", "vmamba_micro", photo, "--out", out)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder; name a file" in fails(capsys, "filters", "vmamba_micro", "--out", tmp_path / "folder.png")


def test_help_has_examples(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["visualize.py", "attn", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "visualize.py"), run_name="__main__")
    assert "examples:\n  visualize.py attn" in capsys.readouterr().out

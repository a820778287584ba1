"""The multi-head scan: routes, route attention, conversion, and the first stage of the original network."""

import golden_cases
import pytest
import torch
from torch import nn

from vision_ssm.backbones.base import ScanBlock
from vision_ssm.layers import PatchStem
from vision_ssm.scans import build_routes, build_scan
from vision_ssm.scans.multi_head import convert_multi_heads, route_attention

PAIRS = {"C": "snake_pair", "X": "diagonal_pair", "S": "spiral_pair", "Z": "raster_pair"}
GRIDS = golden_cases.load("ops/mhs_routes")["grids"]
ATTENTION = golden_cases.load("ops/mhs_route_attention")
STAGES = golden_cases.load("ops/mhs_stage")["cases"]


@pytest.mark.parametrize("head", PAIRS)
@pytest.mark.parametrize("grid", GRIDS)
def test_golden_routes(head, grid):
    orders = build_routes(PAIRS[head]).orders(*map(int, grid.split("x")))
    for k in (0, 1):
        expected = GRIDS[grid][f"{head}{k}"]
        assert orders[2 * k].tolist() == expected["order"]
        assert orders[2 * k].argsort().tolist() == expected["inverse"]
        assert torch.equal(orders[2 * k + 1], orders[2 * k].flip(0))


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 1), (6, 7), (9, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_walks_go_from_neighbour_to_neighbour(size):
    """Snakes and spirals step to a side, diagonals at most to a corner, and all start in one; small grids included."""
    height, width = size
    for name, longest in (("snake_pair", 1), ("spiral_pair", 1), ("diagonal_pair", 2)):
        orders = build_routes(name).orders(height, width)
        rows, columns = orders // width, orders % width
        assert rows.diff(dim=1).abs().add(columns.diff(dim=1).abs()).le(longest).all()
        assert orders[0, 0] == 0


@pytest.mark.parametrize("case", ATTENTION["cases"], ids=lambda case: f"threshold {case['t']}")
def test_golden_route_attention(case):
    y = torch.tensor(ATTENTION["input"], dtype=torch.float64, requires_grad=True)  # (B, K, D, L)
    merged = route_attention(y.permute(0, 3, 1, 2), case["t"]).mT
    torch.testing.assert_close(merged, torch.tensor(case["output"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    (merged * torch.tensor(ATTENTION["output_grad"], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(y.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_route_attention_where_all_routes_agree():
    y = torch.full((2, 4, 3), 0.5, requires_grad=True)
    merged = route_attention(y)
    merged.sum().backward()
    assert not merged.any() and torch.isfinite(y.grad).all()


@pytest.mark.parametrize(("peak", "quotient"), [(1.0, 2.0), (-1.0, 2 / 3)])
def test_bounds_of_the_quotient(peak, quotient):
    y = torch.tensor([0.0, 0.0, 0.0, peak])[:, None]
    assert route_attention(y).item() == pytest.approx(peak * quotient, rel=1e-4)
    assert not route_attention(y, 2.0).any()


def official_block(case, number):
    """Block of the first stage of a case, as our block, in float64."""
    heads, dim = list(PAIRS.values())[: case["config"]["head_num"]], 96
    options = dict(heads=heads, threshold=case["config"]["gfu_t"], mix=case["config"]["with_proj"])
    block = ScanBlock(dim, dict(type="multi_head", state_dim=case["config"]["d_state"], **options), mlp_ratio=0.0)
    prefix = f"vmunet.layers.0.blocks.{number}."
    weights = {key.removeprefix(prefix): value for key, value in golden_cases.weights(case).items() if prefix in key}
    renamed = {
        key.replace("ln_1.", "norm1.").replace("self_attention.", "mixer."): value
        for key, value in convert_multi_heads(weights).items()
    }
    block.load_state_dict(renamed)
    return block.double()


@pytest.mark.parametrize("case", STAGES, ids=lambda case: case["source_case"].split("/")[1])
def test_golden_first_stage(case):
    """Patch embedding and the two blocks behind it."""
    weights = {key.removeprefix("vmunet.patch_embed."): value for key, value in golden_cases.weights(case).items()}
    stem = PatchStem(3, 96)
    stem.load_state_dict({ours: weights[ours.replace("conv.", "proj.")] for ours in stem.state_dict()})
    branch, x = None, stem.double()(golden_cases.images(case["input"]).double())
    with torch.no_grad():
        for number in (0, 1):
            x, branch = official_block(case, number)(x, branch)
        feature = (x + branch[0]).permute(0, 3, 1, 2)
    assert golden_cases.sample_error(case["feature"], feature) < 1e-5  # stored in float32


def test_second_names_are_in_force():
    case = STAGES[0]
    prefix = "vmunet.layers.0.blocks.0.self_attention."
    weights = {key.removeprefix(prefix): v for key, v in golden_cases.weights(case).items() if key.startswith(prefix)}
    converted = convert_multi_heads(weights)
    assert torch.equal(converted["head_proj.weight"], weights["mhs.x_ssproj.weight"])
    assert not torch.equal(converted["head_proj.weight"], weights["mhs.x_ssproj_W"])
    for i, head in enumerate("CXSZ"):
        engine = f"mhs.scanhead_{head}.scanning.seq2seq_engine."
        assert torch.equal(converted["core.x_proj_weight"][4 * i : 4 * i + 4], weights[engine + "x_proj_weight"])
        assert torch.equal(converted["core.A_log"][4 * i : 4 * i + 4].flatten(0, 1), weights[engine + "A_logs"])
    first = {key: value for key, value in weights.items() if "seq2seq_engine" not in key and "x_ssproj.w" not in key}
    assert {key: value.shape for key, value in convert_multi_heads(first).items()} == {
        key: value.shape for key, value in converted.items()
    }
    assert convert_multi_heads(converted) == converted, "names of ours are kept"


@pytest.mark.parametrize(
    ("dim", "heads", "mix"),
    [(96, 4, True), (96, 3, True), (96, 4, False), (16, 3, True)],
)
def test_parameter_count(dim, heads, mix):
    """As the original counts: projections, 3x3 convolution, heads with four routes each, norms."""
    mixer = build_scan(dict(type="multi_head", heads=list(PAIRS.values())[:heads], mix=mix), dim)
    width = dim // heads
    rank, joined = -(-width // 16), width * heads
    of_route = (rank + 32) * width + width * rank + width + 16 * width + width
    expected = 2 * dim * dim + 10 * dim + joined * dim + 4 * heads * of_route + 2 * dim
    expected += (2 * joined + joined * dim) if mix else 0
    assert sum(parameter.numel() for parameter in mixer.parameters()) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_grids(size, dtype):
    mixer = build_scan("multi_head", 16).to(dtype)
    x = torch.randn(2, *size, 16, dtype=dtype, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape and y.dtype == dtype and torch.isfinite(y).all()
    y.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in mixer.parameters())


def test_heads_see_their_own_channels():
    mixer = build_scan("multi_head", 16)
    mixer.mix_norm, mixer.mix_proj = nn.Identity(), nn.Identity()
    seen = []
    mixer.out_norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(1, 3, 4, 16)
    mixer(x)
    with torch.no_grad():
        mixer.head_proj.weight[4:8] += 1
    mixer(x)
    changed = (seen[0] != seen[1]).flatten(0, 1).any(0)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=["raster"]), r"same number of routes each, two at least; \['raster'\] have \[1\]"),
        (dict(heads=["snake_pair", "raster"]), r"same number of routes each.* have \[1, 4\]"),
        (dict(heads=[]), "same number of routes each"),
        (dict(heads=["cross"] * 17), "17 heads cannot share 16 channels"),
        (dict(heads=["cross"] * 3, mix=False), "3 heads cannot share 16 channels without mix=True"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_scan(dict(type="multi_head", **options), 16)

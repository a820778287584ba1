"""EfficientVMamba: its scan, blocks and weights."""

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm.backbones.base import Stage
from vision_ssm.backbones.efficientvmamba import DualBranchBlock, EfficientVMamba, InvertedResidual
from vision_ssm.scans import build_routes, build_scan

ROUTES = golden_cases.load("ops/atrous_scan")["cases"]


def converter(theirs: str, ours: str):
    """What turns original parameters of one place of the network into ours."""

    def convert(tensors):
        placed = EfficientVMamba.official_keys({theirs + key: value for key, value in tensors.items()})
        return {key.removeprefix(ours): value for key, value in placed.items()}

    return convert


@pytest.mark.parametrize(
    "name,module,theirs,ours",
    [
        (
            "efficientvmamba_es2d",
            lambda: build_scan(dict(type="atrous", state_dim=4, expand=2.0), 8),
            "layers.0.blocks.0.op.",
            "stages.0.blocks.0.mixer.",
        ),
        (
            "efficientvmamba_evss_block",
            # the original block by itself has another epsilon than in the network
            lambda: Stage([DualBranchBlock(16, dict(type="atrous", state_dim=3), mlp_ratio=0.0, norm_eps=1e-6)]),
            "layers.0.blocks.0.",
            "stages.0.",
        ),
        ("efficientvmamba_inverted_residual", lambda: Stage([InvertedResidual(16)]), "layers.2.1.", "stages.2."),
    ],
)
def test_golden_operators(name, module, theirs, ours):
    golden_cases.check_operator(golden_cases.load(f"ops/{name}"), module(), converter(theirs, ours))


@pytest.mark.parametrize("case", ROUTES, ids=lambda case: f"{case['H']}x{case['W']}")
def test_golden_routes(case):
    """What each route reads from a padded map, and where its outputs go."""
    height, width = case["H"], case["W"]
    rows, columns = height + height % 2, width + width % 2
    grid = torch.zeros(rows, columns, dtype=torch.int64)
    grid[:height, :width] = torch.tensor(case["x"]).view(height, width)
    (table,) = build_routes("atrous").tables(rows, columns)
    assert grid.flatten()[table.read].tolist() == case["routes"]
    merged = torch.empty(rows * columns, dtype=torch.int64)
    merged[table.write] = torch.tensor(case["ys"])
    assert merged.view(rows, columns)[:height, :width].flatten().tolist() == case["merged"]


def test_padded_steps_let_the_state_decay():
    """On 3 x 2 cells route 1 sees the second row, then a step of padding: its state decays, and nothing is added."""
    mixer = build_scan(dict(type="atrous", state_dim=2, gate=False), 4).double()
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(mixer.core(x), mixer.core(padded)[:, :3])
    (table,) = mixer.core.routes.tables(4, 2)
    seen = mixer.core.scan_routes(padded.flatten(1, 2), table, merge=False)[0]  # (L, K, D)
    assert table.read[1].tolist() == [2, 6] and seen[6, 1].abs().max() == 0  # C is 0 where the map is padded


def test_routes_share_the_map():
    """A cell's output depends on cells of its own quarter alone."""
    core = build_scan(dict(type="atrous", state_dim=2), 16).core.double()
    x = torch.randn(1, 4, 6, 32, dtype=torch.float64, requires_grad=True)
    core(x)[0, 3, 4].sum().backward()
    touched = x.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(touched, expected)


def test_other_cores_and_composed_routes_pad_as_well():
    x = torch.randn(2, 5, 3, 16)
    for scan in (dict(type="atrous", core="ssd"), dict(type="multi_direction", routes=["atrous", "atrous"])):
        assert build_scan(scan, 16)(x).shape == x.shape
    assert build_routes(["atrous", "atrous"]).multiple == 2


def test_initial_values():
    model = vision_ssm.create_model("efficientvmamba_micro")
    core = model.stages[0].blocks[0].mixer.core
    assert torch.allclose(core.A_log.exp(), torch.tensor([1.0, 2.0]).expand_as(core.A_log)) and core.D.eq(1).all()
    gate, conv = model.stages[0].blocks[0].channel_gate, model.stages[0].blocks[0].conv_branch[3]
    assert gate.reduce.weight.std() < 0.03 and not gate.reduce.bias.any()
    assert conv.weight.abs().max() <= 16**-0.5 and conv.bias.any(), "convolutions start as torch makes them"


def test_one_gate_serves_both_branches():
    block = DualBranchBlock(16, dict(type="atrous"), mlp_ratio=0.0).eval()
    torch.nn.init.normal_(block.channel_gate.reduce.weight)
    x = torch.randn(1, 4, 4, 16)
    _, (both, _) = block(x)
    n = block.norm1(x).flatten(1, 2)
    maps = [branch(n.view(x.shape)).flatten(1, 2) for branch in (block.mixer, block.conv_branch)]
    torch.testing.assert_close(both.flatten(1, 2), sum(block.channel_gate(y) for y in maps))
    alone = DualBranchBlock(16, False, mlp_ratio=0.0).eval()
    assert alone.mixer is None and alone(x)[1][0].shape == x.shape


def test_published_widths():
    model = vision_ssm.create_model("efficientvmamba_small", scan=dict(state_dim=4))
    assert [info["num_chs"] for info in model.feature_info] == [64, 128, 256, 512]
    assert model.stages[0].blocks[0].mixer.core.state_dim == 4
    assert isinstance(model.stages[2].blocks[0], InvertedResidual)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(step_size=3), "step_size 3 never worked in the original"),
        (dict(downsample_version="v3"), "unknown downsample_version 'v3' of an original EfficientVMamba"),
        (dict(ssm_ratios=1.0), "unknown hyperparameters of an original EfficientVMamba: ssm_ratios. Did you mean 'ssm_ratio'"),
    ],
)
def test_wrong_official_configs(change, message):
    case = golden_cases.load("efficientvmamba/micro")
    with pytest.raises(ValueError, match=message):
        vision_ssm.import_official("efficientvmamba", {**case["config"], **change}, golden_cases.weights(case))


def test_switches_without_effect_are_taken():
    case = golden_cases.load("efficientvmamba/micro")
    config = {**case["config"], "d_state": 4, "dt_rank": 7, "window_size": 2, "softmax_version": "v1"}
    model = vision_ssm.import_official("efficientvmamba", config, golden_cases.weights(case))
    assert model.stages[0].blocks[0].mixer.core.state_dim == 16


def test_wrong_keywords():
    with pytest.raises(ValueError, match="unknown downsample 'conv3'. Did you mean 'conv2'"):
        vision_ssm.create_model("efficientvmamba_micro", downsample="conv3")
    with pytest.raises(ValueError, match="one entry per stage"):
        vision_ssm.create_model("efficientvmamba_micro", dims=(16, 32))
    with pytest.raises(TypeError, match="unknown keyword 'routes'"):
        build_scan(dict(type="atrous", routes="cross"), 16)


def test_recognises_its_own_keys_alone():
    ours = set(vision_ssm.create_model("efficientvmamba_micro").state_dict())
    assert EfficientVMamba.recognises(ours)
    for path in sorted(golden_cases.ROOT.glob("*/*.json")):
        if path.parent.name != "ops":
            keys = set(golden_cases.load(f"{path.parent.name}/{path.stem}")["state_dict"])
            assert EfficientVMamba.recognises(keys) is (path.parent.name == "efficientvmamba"), path

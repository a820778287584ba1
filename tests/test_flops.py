"""Counting of multiply-accumulates: nothing is lost between modules, and what has no formula is named."""

import json
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import vision_ssm
from vision_ssm.analysis.macs import SCAN_FORMULAS, count_operations
from vision_ssm.analysis.macs_report import report_model
from vision_ssm.analysis.reported import COUNTED_OTHERWISE, PAPER_FORMULAS, REPORTED_GMACS, agrees
from vision_ssm.factory import families, unet_families
from vision_ssm.layers import ConvStem
from vision_ssm.scans.core import RouteCore

ROOT = Path(__file__).resolve().parent.parent
# a scan, attention, a recurrence on a grid, parallel branches, a decoder; tools/make_cards.py --check counts all
MICRO = ["vmamba_micro", "vssd_micro", "plstm_micro", "hrvmamba_micro", "vmunet_micro"]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(ROOT / "tools" / "get_flops.py"))["main"]


def micro(name="vmamba_micro", **overrides):
    return partial(vision_ssm.create_model, name, **overrides)


@pytest.mark.parametrize("name", MICRO)
def test_parts_sum_to_the_whole(name):
    count = count_operations(micro(name), 64)
    assert count.macs > 0 and count.parameters == sum(p.numel() for p in micro(name)().parameters())
    assert abs(sum(count.operators.values()) - count.macs) <= len(count.operators)  # halves are rounded down
    assert count.operators.keys() == count.calls.keys() and not count.operators.keys() & count.uncounted.keys()
    children = {}
    for module in count.modules:
        if module:
            children.setdefault(module.rpartition(".")[0], []).append(module)
    assert count.modules[""] == count.macs and count.sizes[""] == count.parameters
    assert abs(sum(count.modules[child] for child in children[""]) - count.macs) <= len(children[""])
    for parent, found in children.items():
        assert sum(count.modules[child] for child in found) <= count.modules[parent] + len(found)


def test_counts_are_those_of_formulas():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear, self.norm = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5), nn.LayerNorm(8)

        def forward(self, x):
            return self.linear(self.norm(self.conv(x).mean((2, 3))))

    count = count_operations(Net, (32, 64))
    assert count.modules == {"": 6184, "conv": 6144 * 8, "linear": 40, "norm": 0} | {"": 6144 * 8 + 40}
    assert count.uncounted == {"aten::mean": 1, "aten::native_layer_norm": 1} and count.operators["aten::addmm"] == 40


def test_operators_without_a_formula_are_listed():
    @torch.library.custom_op("vision_ssm_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x):
            return twice(x)

    def build():
        model = micro()()
        model.stem = nn.Sequential(Twice(), model.stem, Twice())
        return model

    plain, changed = count_operations(micro(), 64), count_operations(build, 64)
    assert changed.uncounted == {**plain.uncounted, "vision_ssm_test::twice": 2} and changed.macs == plain.macs
    assert "vision_ssm::layer_norm" in plain.uncounted
    views_and_indices = {"aten::view", "aten::permute", "aten::arange", "aten::slice", "prim::device", "aten::stack"}
    assert not views_and_indices & plain.uncounted.keys()


def test_scans_count_by_the_chosen_formula():
    model = micro()()
    counts = {formula: count_operations(micro(), 64, scan_formula=formula).macs for formula in SCAN_FORMULAS}
    recurrence = expansion = projection = 0
    for stage, cells in zip(model.stages, (256, 64, 16, 4)):
        for core in (module for module in stage.modules() if isinstance(module, RouteCore)):
            steps = 4 * cells * core.dim
            recurrence += steps * (9 * core.state_dim + 1)
            expansion += steps * core.dt_rank
            projection += steps * (core.dt_rank + 2 * core.state_dim)
    assert counts["9BLDN"] - counts["products"] == recurrence > 0
    assert counts["products"] - counts["modules"] == expansion + projection
    with pytest.raises(ValueError, match="scan_formula is one of 9BLDN, products, modules, got 'einsum'"):
        count_operations(micro(), 64, scan_formula="einsum")


def test_building_without_values_builds_the_same():
    with torch.device("meta"):
        stem = ConvStem(3, 16)
    count = count_operations(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), stem), 64)
    assert count.parameters == 12 + sum(p.numel() for p in stem.parameters())


def test_reported_figures_belong_to_variants():
    known = {*vision_ssm.list_models(), *vision_ssm.list_unets()}
    assert set(REPORTED_GMACS) <= known and set(COUNTED_OTHERWISE) <= set(REPORTED_GMACS)
    assert set(PAPER_FORMULAS) <= {*families(), *unet_families()} and set(PAPER_FORMULAS.values()) <= set(SCAN_FORMULAS)
    assert agrees(4.9, 4_800_000_000) and not agrees(4.9, 4_700_000_000)


def test_paper_formulas():
    """VM-UNet's figure is that of thop: twice as far away by the default."""
    report = report_model("vmunet_isic", scan_formula="paper")
    assert agrees(REPORTED_GMACS["vmunet_isic"], report.count.macs) and abs(report.comparison.difference) < 2
    assert "leaves out" not in report.sentences()[-1] and "leaves out" in report_model("vmunet_isic").sentences()[-1]
    with pytest.raises(ValueError, match="repository of vim do not say how they count scans"):
        report_model("vim_micro", scan_formula="paper")


def test_only_published_models_are_compared():
    assert report_model("efficientvim_m1").comparison.reason == ""
    for changed in (dict(size=(64, 64)), dict(features_only=True)):
        report = report_model("efficientvim_m1", **changed)
        assert report.comparison is None and len(report.sentences()) == 2


def test_command(main, capsys, tmp_path):
    file = tmp_path / "count.json"
    options = ["--size", "64", "96", "--in-chans", "4", "--scan", "plstm", "--features-only", "--depth", "1"]
    assert main(["vmamba_micro", *options, "--json", str(file)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "vmamba_micro, in_chans=4, scan='plstm', features_only=True, one image of 4 x 64 x 96" in page
    assert "vision_ssm::plstm2d" in page and "not counted" in page and "9*L*D*N" in page
    found = json.loads(file.read_text())
    assert found["image"] == [4, 64, 96] and found["reported"] is None
    assert {entry["name"] for entry in found["modules"]} >= {"", "stem", "stages"}
    assert not any("." in entry["name"] for entry in found["modules"])
    assert found["macs"] == count_operations(micro(in_chans=4, scan="plstm", features_only=True), (64, 96), 4).macs
    assert main(["vmamba_micro", "--size", "64", "--scan", "{'state_dim': 4}", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["overrides"] == {"scan": {"state_dim": 4}}


@pytest.mark.parametrize(
    "options, message",
    [
        (["vmamba_tin"], "unknown model 'vmamba_tin'. Did you mean"),
        (["vmamba_micro", "--size", "1", "2", "3"], "--size takes a side, or height and width, each at least 1, got [1, 2, 3]"),
        (["vmamba_micro", "--size", "8"], "images must be at least 32 x 32 pixels, got 8 x 8"),
        (["vmamba_micro", "--depth", "-1"], "--depth must be 0 or more, got -1"),
        (["vmunet_micro", "--features-only"], "vmunet_micro is a U-Net: it has no dense backbone of its own, leave --features-only out"),
        (["lbvim_micro", "--scan-formula", "paper"], "do not say how they count scans, so there is no 'paper' formula"),
        (["vmamba_micro", "--scan", "{'state_dim': x}"], "must be a name or a dict of plain values, got"),
    ],
)
def test_bad_input_is_named(main, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code != 0 and message in capsys.readouterr().err

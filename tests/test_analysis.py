"""The benchmark times only what is right; generated tables agree with the registry."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import vision_ssm
from vision_ssm.analysis import BenchmarkError, benchmark_models, describe_machine, fill_tables
from vision_ssm.analysis.benchmark import check_model
from vision_ssm.scans.core import S6Core

ROOT = Path(__file__).resolve().parent.parent


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("train", [False, True])
def test_rows_say_what_was_timed(train):
    ours, theirs = benchmark_models(["vmamba_micro", "timm:test_resnet"], size=(64, 48), batch=2, repeats=3, train=train)
    assert (ours.name, ours.backend, theirs.backend) == ("vmamba_micro", "chunked", "-")
    assert ours.parameters == sum(p.numel() for p in vision_ssm.create_model("vmamba_micro").parameters())
    for row in (ours, theirs):
        assert 0 < row.lower <= row.median <= row.upper
        assert row.images_per_second == pytest.approx(2 / row.median)
        assert row.peak_memory is None


def test_a_wrong_model_is_not_timed(monkeypatch):
    model = vision_ssm.create_model("vmamba_micro").eval()
    check_model("vmamba_micro", model, torch.device("cpu"))
    honest = S6Core.scan

    def wrong(self, x, table):
        exact = honest(self, x, table)
        return exact if os.environ.get("VISION_SSM_BACKEND") == "reference" else exact.roll(1, dims=1)

    monkeypatch.setattr(S6Core, "scan", wrong)
    with pytest.raises(BenchmarkError, match="vmamba_micro is not timed: its logits are .* away from the reference"):
        benchmark_models(["vmamba_micro"], size=(64, 64), repeats=1)


def test_machine_is_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine["device"].startswith("cpu: ") and machine["torch"] == torch.__version__


def test_benchmark_tool(monkeypatch, tmp_path, capsys):
    file = tmp_path / "figures.json"
    tool = ("tools/benchmark.py", "model", "vmamba_micro", "--device", "cpu", "--size", 64, 40, "--repeats", 2)
    assert run_tool(monkeypatch, *tool, "--json", file) == 0
    printed = capsys.readouterr().out
    assert "inference, batch 1, 64 x 40" in printed and "vmamba_micro" in printed and "threads" in printed
    written = json.loads(file.read_text())
    assert written["rows"][0]["name"] == "vmamba_micro" and written["machine"]["torch"] == torch.__version__
    assert run_tool(monkeypatch, "tools/benchmark.py", "model", "vmamba_micr", "--device", "cpu") == 1
    assert "unknown model 'vmamba_micr'. Did you mean 'vmamba_micro'" in capsys.readouterr().err
    assert run_tool(monkeypatch, "tools/benchmark.py", "model", "vmamba_micro", "--size", 1, 2, 3) == 2
    assert "--size takes one side" in capsys.readouterr().err


def test_readme_tables_are_up_to_date(monkeypatch, capsys):
    assert run_tool(monkeypatch, "tools/update_readme.py", "--check") == 0
    page = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in page for name in (*vision_ssm.list_models(), *vision_ssm.list_scans()))


def test_tables_replace_only_what_is_marked():
    page = "before\n<!-- table scans -->\nstale\n<!-- end -->\nafter\n"
    filled = fill_tables(page)
    assert filled.startswith("before\n<!-- table scans -->\n| scan |") and filled.endswith("<!-- end -->\nafter\n")
    assert "stale" not in filled and fill_tables(filled) == filled
    with pytest.raises(KeyError, match="nothing"):
        fill_tables("<!-- table nothing -->\n<!-- end -->")

"""tools/benchmark.py: every sub-command, what it writes, and what it refuses."""

import importlib.util
import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from vision_ssm.analysis import (
    CASES,
    BenchmarkError,
    OperatorSettings,
    Point,
    Timing,
    benchmark_operator,
    find_cases,
    sweep_operators,
)
from vision_ssm.analysis import benchmark_ops as ops
from vision_ssm.analysis.benchmark_report import (
    Run,
    Table,
    append_markdown,
    milliseconds,
    plot_sweep,
    sweep_table,
)
from vision_ssm.analysis.timing import copy_bandwidth, fits_in_memory, summarize, time_in_turns
from vision_ssm.ops import selective_scan
from vision_ssm.ops.backend import demanded_backend

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUICK = ("--device", "cpu", "--repeats", "2", "--warmup", "1")
TINY = {
    "core_stage4": replace(CASES["core_stage4"], batch=1, height=3, width=5),
    "core_stage1_n16": replace(CASES["core_stage1_n16"], batch=1, height=4, width=4),
    "scan_2d_stage1": replace(CASES["scan_2d_stage1"], batch=1, height=3, width=5),
    "selective_scan_3": replace(CASES["selective_scan_3"], batch=1, length=33),
    "ssd_stage1": replace(CASES["ssd_stage1"], batch=1, length=33),
    "state_fusion_stage1": replace(CASES["state_fusion_stage1"], batch=1, height=3, width=5),
    "dcnv4_branch1": replace(CASES["dcnv4_branch1"], batch=1, height=3, width=5),
    "rms_norm_tokens": replace(CASES["rms_norm_tokens"], batch=1, length=5),
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(monkeypatch):
    """The cases at shapes that take no time, and a ceiling measured on little memory."""
    for name, case in TINY.items():
        monkeypatch.setitem(CASES, name, case)
    monkeypatch.setattr("vision_ssm.analysis.timing._COPY_BYTES", {"cpu": 2**16})


def test_model(tool, tmp_path, capsys):
    data, page = tmp_path / "figures.json", tmp_path / "page.md"
    command = ["model", "vmamba_micro", *QUICK, "--size", "64", "40", "--json", str(data), "--markdown", str(page)]
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert "inference, batch 1, 64 x 40, amp none, contiguous, 1 warm-up steps, 2 repeats in turns" in printed
    assert "vmamba_micro" in printed and "tf32" in printed and "Backend chunked of vmamba_micro" in printed
    written = json.loads(data.read_text())
    assert written["rows"][0]["name"] == "vmamba_micro" and written["rows"][0]["median"] > 0
    assert written["versions"]["torch"] == torch.__version__ and written["machine"]["device"].startswith("cpu: ")
    assert written["command"].startswith("python tools/benchmark.py model vmamba_micro") and written["date"]
    text = page.read_text()
    assert text.startswith("# Speed on ") and f"\n\n    {written['command']}\n\n" in text
    assert "\n| model | scan backend |" in text and "\n| vmamba_micro | chunked | 0.5 M |" in text


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_op(tool, tiny, tmp_path, capsys, dtype):
    file = tmp_path / "figures.json"
    command = ["op", *TINY, *QUICK, "--dtype", dtype, "--backward", "--peers", "chunked", "mamba_ssm"]
    assert tool.main([*command, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TINY) and "mamba_ssm is not installed." in printed
    assert "Copy ceiling of this run" in printed and "Triton kernels need a CUDA tensor" in printed
    page = json.loads(file.read_text())
    rows = page["rows"]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (name, implementation) for name in TINY for implementation in ("vision_ssm", "chunked")
    ]
    for row in rows:
        assert row["times"].keys() == {"forward", "forward+backward", "backward"} and not row["note"]
        assert row["backend"] == "chunked" and row["input_sets"] == 1
        forward = row["times"]["forward"]["median"]
        assert row["bandwidth"]["forward"] == pytest.approx(row["floor_bytes"]["forward"] / forward)
        assert row["copy_share"]["forward"] == pytest.approx(row["bandwidth"]["forward"] / page["copy_bandwidth"])


def test_floor_is_every_tensor_once():
    case = replace(CASES["selective_scan_3"], batch=2, length=8)
    bound = case.bind(case.values(torch.bfloat16, CPU))
    wide, narrow, parameters = 2 * 2 * 384 * 8, 2 * 2 * 16 * 8, 4 * (384 * 16 + 2 * 384)
    inputs = 3 * wide + 2 * narrow + parameters
    assert ops.floor_bytes(bound) == {
        "forward": inputs + wide,
        "forward+backward": 3 * inputs + 2 * wide,
        "backward": 2 * inputs + wide,
    }
    assert case.exponentials() == 2 * 384 * 8 * 16
    assert CASES["core_stage1"].exponentials() == 128 * 4 * 3136 * 96


def test_shapes_are_those_of_the_models():
    assert CASES["core_stage1"].shape == "B=128 56x56 D=96 K=4 N=1 R=6"
    assert CASES["core_stage4"].shape == "B=128 7x7 D=768 K=4 N=1 R=48"
    assert CASES["core_stage1_n16"].shape == "B=64 56x56 D=192 K=4 N=16 R=6"
    assert CASES["selective_scan_3"].shape == "B=16 D=384 L=6085 N=16 z"
    assert CASES["rms_norm_tokens"].shape == "B=128 L=197 C=192"
    assert CASES["state_fusion_stage3"].shape == "B=128 14x14 D=512"
    assert CASES["state_fusion_stage3"].of_image(448).shape == "B=128 28x28 D=512"
    assert CASES["core_stage2"].of_image(448).shape == "B=128 56x56 D=192 K=4 N=1 R=12"
    assert find_cases(["core_stage?", "core_stage1"]) == [f"core_stage{stage}" for stage in (1, 2, 3, 4)]


def test_inputs_that_fit_in_the_cache_take_turns(monkeypatch):
    case = TINY["core_stage4"]
    bound = case.bind(case.values(torch.bfloat16, CPU))
    size = sum(leaf.nbytes for leaf in bound.leaves.values())
    monkeypatch.setattr(ops, "second_level_cache", lambda device: size)
    assert ops.input_sets(bound, CPU) == 4
    (row,) = benchmark_operator("core", case, OperatorSettings(repeats=1, warmup=1, backward=True), copy=1.0)
    assert row.input_sets == 4 and row.times["backward"].median > 0
    monkeypatch.setattr(ops, "second_level_cache", lambda device: 1000 * size)
    assert ops.input_sets(bound, CPU) == 64


def test_core_is_called_with_the_norm_where_it_takes_one():
    x, norm = torch.randn(1, 2, 2, 4), nn.LayerNorm(4)

    class Core(nn.Module):
        def forward(self, x):
            return x.double()

    class FusedCore(nn.Module):
        def forward(self, x, norm=None):
            return norm(x)

    assert torch.equal(ops.run_core(Core(), norm.double(), x), norm(x.double()).float())
    assert torch.equal(ops.run_core(FusedCore(), norm.float(), x), norm(x))


@pytest.mark.parametrize(
    "spoil, what",
    [
        (lambda y: 1.05 * y, "output"),
        (lambda y: 1.05 * y - 0.05 * y.detach(), "gradient of x"),
        (lambda y: y * math.nan, "output"),
    ],
)
def test_a_wrong_operator_is_not_timed(tool, tiny, monkeypatch, capsys, spoil, what):
    honest = ops.scan_2d

    def wrong(**inputs):
        exact = honest(**inputs)
        return exact if demanded_backend() == "reference" else spoil(exact)

    monkeypatch.setattr(ops, "scan_2d", wrong)
    assert tool.main(["op", "scan_2d_stage1", *QUICK, "--json", "never written"]) == 1
    printed = capsys.readouterr()
    assert f"scan_2d_stage1 is not timed: its {what} is " in printed.err and "(allowed 1e-02)" in printed.err
    assert "scan_2d_stage1" not in printed.out and not Path("never written").exists()


def test_long_routes_are_compared_with_the_chunked_path(monkeypatch):
    """An operator that is right on few steps and wrong on many."""
    honest = ops.selective_scan
    case = replace(CASES["selective_scan_3"], batch=1, length=100)

    def wrong(**inputs):
        exact = honest(**inputs)
        return exact * (1 if demanded_backend() or inputs["u"].shape[-1] < 100 else 1.5)

    monkeypatch.setattr(ops, "selective_scan", wrong)
    monkeypatch.setattr(ops, "describe_backends", lambda used: ("triton", ""))
    with pytest.raises(BenchmarkError, match="its output is 5.0e-01 away from the chunked operator's at full size"):
        ops.check_operator("long", case, torch.float32, CPU)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_mamba_ssm_is_a_peer_where_installed(tool, tiny, monkeypatch, tmp_path, capsys, factor):
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = lambda **inputs: factor * selective_scan(**inputs)
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = tmp_path / "figures.json"
    assert tool.main(["op", "selective_scan_3", "core_stage4", *QUICK, "--json", str(file)]) == 0
    assert "not installed" not in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["vision_ssm", "mamba_ssm", "vision_ssm"]
    if factor == 1.0:
        assert rows[1]["times"]["forward"]["median"] > 0
    else:
        assert rows[1]["times"] == {} and "mamba_ssm is not timed: its output is 1.0e+00 away" in rows[1]["note"]


def test_sweep_of_models(tool, tmp_path, capsys):
    data, page, picture = tmp_path / "figures.json", tmp_path / "page.md", tmp_path / "sweep.png"
    command = ["sweep", "vmamba_micro", "timm:test_vit", *QUICK, "--sizes", "64", "32", "--pixels", "8192"]
    assert tool.main([*command, "--json", str(data), "--markdown", str(page), "--plot", str(picture)]) == 0
    assert capsys.readouterr().err == "32 x 32, batch 8\n64 x 64, batch 2\n"
    rows = json.loads(data.read_text())["rows"]
    assert [(row["label"], row["size"], row["batch"]) for row in rows] == [
        ("vmamba_micro", 32, 8), ("timm:test_vit", 32, 8), ("vmamba_micro", 64, 2), ("timm:test_vit", 64, 2),
    ]  # fmt: skip
    assert all(row["time"]["median"] > 0 for row in rows)
    assert "| size | batch | vmamba_micro ms/image | timm:test_vit ms/image |" in page.read_text()
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 800


def test_sweep_of_operators(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("vision_ssm.analysis.timing._COPY_BYTES", {"cpu": 2**16})
    data, picture = tmp_path / "figures.json", tmp_path / "sweep.png"
    command = ["sweep", "core_stage4", *QUICK, "--sizes", "64", "96", "--train", "--peers", "chunked", "--amp", "bf16"]
    assert tool.main([*command, "--json", str(data), "--plot", str(picture)]) == 0
    written = json.loads(data.read_text())
    assert "forward and backward" in written["setting"] and "bfloat16" in written["setting"]
    assert [(row["label"], row["size"], row["batch"]) for row in written["rows"]] == [
        ("core_stage4", 64, 2), ("core_stage4, chunked", 64, 2), ("core_stage4", 96, 1), ("core_stage4, chunked", 96, 1),
    ]  # fmt: skip
    assert picture.stat().st_size > 10_000


def test_memory_that_runs_out_is_recorded(monkeypatch):
    honest = ops.scan_2d

    def hungry(**inputs):
        if inputs["x"].shape[1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return honest(**inputs)

    monkeypatch.setattr(ops, "scan_2d", hungry)
    monkeypatch.setattr(ops, "check_operator", lambda *arguments: None)
    settings = OperatorSettings(repeats=1, warmup=1)
    points = sweep_operators(["scan_2d_stage4"], settings, [64, 128], 128**2, copy=1.0, progress=str)
    assert [(point.size, point.note) for point in points] == [(64, ""), (128, "out of memory")]
    table = sweep_table(points)
    assert table.rows[1] == ["128", "1", "out of memory"] and float(table.rows[0][2]) > 0


def test_memory_is_told_from_other_errors():
    def run_out(kind, text):
        raise kind(text)

    for error in ((torch.OutOfMemoryError, "x"), (RuntimeError, "Triton Error [CUDA]: out of memory")):
        assert not fits_in_memory(lambda error=error: run_out(*error), CPU)
    with pytest.raises(RuntimeError, match="shape"):
        fits_in_memory(lambda: run_out(RuntimeError, "wrong shape"), CPU)
    count = iter(range(10))

    def third_fails():
        if next(count) == 2:
            raise torch.OutOfMemoryError("late")

    assert time_in_turns({"late": third_fails, "fine": lambda: None}, CPU, repeats=4).keys() == {"fine"}


def test_samples_are_long_enough():
    calls = {"long": 0}

    def step():
        calls["long"] += 1

    timings = time_in_turns({"long": step}, CPU, repeats=3, shortest=1e-4)
    assert calls["long"] > 10 and timings["long"].median < 1e-4
    assert summarize([1.0]) == Timing(1.0, 1.0, 1.0) and summarize([3.0, 1.0, 2.0]) == Timing(2.0, 1.5, 2.5)
    assert copy_bandwidth(CPU, repeats=2) > 1e6


def test_figures_are_readable():
    assert [milliseconds(value) for value in (0.2345678, 0.0123456, 1.23456e-4, 9.87e-7)] == [
        "234.6", "12.3", "0.123", "0.000987",
    ]  # fmt: skip
    assert Table(["a", "b"], [["x|y", "1"]]).markdown() == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"


def test_pages_grow(tmp_path):
    page = tmp_path / "h200.md"
    page.write_text("# Speed on an NVIDIA H200\n\nText.\n\n\n")
    run = Run(
        "python tools/benchmark.py op x", "operators", {"device": "cuda: NVIDIA H200"}, {"torch": "2.11"}, "2026-11-24"
    )
    append_markdown(page, run, Table(["case"], [["x"]]))
    assert page.read_text() == (
        "# Speed on an NVIDIA H200\n\nText.\n\n    python tools/benchmark.py op x\n\n"
        "operators. cuda: NVIDIA H200; torch 2.11; 2026-11-24.\n\n| case |\n| --- |\n| x |\n"
    )


@pytest.mark.parametrize("lines, memory, missing", [(2, True, True), (9, False, False), (1, False, False)])
def test_pictures(tmp_path, lines, memory, missing):
    points = [
        Point(f"model {line}", size, 2, "-", Timing(t, t, t), 10**6 * size if memory else None, "")
        for line in range(lines)
        for size in (224, 448, 2048)
        for t in [(line + 1) * size**2 * 1e-9]
    ]
    if missing:
        points.append(Point("model 0", 4096, 1, "-", None, None, "out of memory"))
    file = tmp_path / "sweep.png"
    plot_sweep(file, points, "Inference", "a machine")
    with Image.open(file) as image:
        assert (image.width > 1500) == memory


@pytest.mark.parametrize(
    "command, code, message",
    [
        (["op", "core_stage7"], 1, "unknown operator case 'core_stage7'. Did you mean 'core_stage"),
        (["op", "nothing"], 1, "unknown operator case 'nothing'. Known: core_stage1, "),
        (["model", "vmamba_micr"], 1, "unknown model 'vmamba_micr'. Did you mean 'vmamba_micro'"),
        (["model", "timm:test_resnet2"], 1, "timm has no model 'test_resnet2'. Did you mean 'test_resnet'"),
        (
            ["sweep", "selective_scan_5", "--sizes", "32"],
            1,
            "belongs to no stage of a model; sweep core_* or scan_2d_*",
        ),
        (["sweep", "vmamba_micro", "core_stage1"], 2, "operators and models do not share a sweep"),
        (["model", "vmamba_micro", "--size", "1", "2", "3"], 2, "--size takes one side, or height and width"),
        (["model", "vmamba_micro", "--graph"], 2, "--graph needs a CUDA device; add --device cuda"),
        (["op", "core_stage1", "--graph"], 2, "--graph needs a CUDA device; add --device cuda"),
        (["op", "core_stage1", "--batch", "0"], 2, "must be at least 1, got 0"),
        (["op", "core_stage1", "--dtype", "fp8"], 2, "invalid choice: 'fp8'"),
        (["op", "core_stage1", "--device", "meta"], 2, "must be cpu, cuda or cuda:NUMBER, got 'meta'"),
        (["op", "core_stage1", "--device", "gpu0"], 2, "must be cpu, cuda or cuda:NUMBER, got 'gpu0'"),
    ],
)
def test_bad_input(tool, monkeypatch, capsys, command, code, message):
    monkeypatch.setattr("vision_ssm.analysis.timing._COPY_BYTES", {"cpu": 2**16})
    command = command if "--device" in command else [*command, "--device", "cpu"]
    try:
        assert tool.main(command) == code
    except SystemExit as stopped:
        assert stopped.code == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["op", "core_stage1", "--device", "cuda"])
    assert "this PyTorch finds no CUDA device" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="CUDA graphs need a CUDA device, not cpu"):
        benchmark_operator("core", TINY["core_stage4"], OperatorSettings(graph=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(tool, tmp_path, graph):
    file, graphs = tmp_path / "figures.json", ["--graph"] if graph else []
    names = ["core_stage4", "core_stage4_n16", "scan_2d_stage4", "selective_scan_4", "ssd_stage1"]
    command = ["op", *names, "--batch", "2", "--backward", "--repeats", "3", "--json", str(file), *graphs]
    assert tool.main(command) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert row["note"] == "" and row["peak_memory"] > 0 and 0 < row["copy_share"]["forward"] < 1.5, row
        assert row["times"]["forward"]["median"] < row["times"]["forward+backward"]["median"]
        assert row["input_sets"] > 1
    command = ["model", "vmamba_micro", "timm:test_resnet", "--batch", "2", "--size", "64", "--amp", "bf16"]
    for options in (graphs, [*graphs, "--train"], [*graphs, "--channels-last"]) if graph else (["--train"], ["--compile"]):
        assert tool.main([*command, "--repeats", "3", "--json", str(file), *options]) == 0
        assert all(row["note"] == "" and row["peak_memory"] > 0 for row in json.loads(file.read_text())["rows"])


def test_models_apart_with_their_slowest_lines(tool, capsys, tmp_path):
    """For models that do not fit into memory together; the profile names one operator of each."""
    data = tmp_path / "apart.json"
    command = ["model", "vmamba_micro", "timm:test_resnet", *QUICK, "--size", "64", "--apart", "--profile"]
    assert tool.main([*command, "--train", "--json", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "slowest line" in printed and "repeats in turns" not in printed
    ours, theirs = json.loads(data.read_text())["rows"]
    assert all(re.fullmatch(r"[\w:.# ]+ \d+ %", row["slowest"]) for row in (ours, theirs))

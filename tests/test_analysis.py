"""The benchmark times only models that are right; generated tables agree with the registry."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vision_ssm
from vision_ssm.analysis import BenchmarkError, ModelSettings, benchmark_models, describe_machine, fill_tables
from vision_ssm.analysis import benchmark as models
from vision_ssm.analysis.benchmark import build_model, check_model
from vision_ssm.analysis.timing import _short_name, describe_backends, describe_versions, used_backends
from vision_ssm.scans.core import S6Core

ROOT = Path(__file__).resolve().parent.parent


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("train", [False, True])
def test_rows_say_what_was_timed(train):
    settings = ModelSettings(size=(64, 48), batch=2, repeats=3, train=train)
    ours, theirs = benchmark_models(["vmamba_micro", "timm:test_resnet"], settings)
    assert (ours.name, ours.backend, theirs.backend) == ("vmamba_micro", "chunked", "-")
    assert "CUDA" in ours.reason and not theirs.reason
    assert ours.parameters == sum(p.numel() for p in vision_ssm.create_model("vmamba_micro").parameters())
    for row in (ours, theirs):
        assert (row.size, row.batch, row.note) == ((64, 48), 2, "")
        assert 0 < row.lower <= row.median <= row.upper
        assert row.images_per_second == pytest.approx(2 / row.median)
        assert row.peak_memory is None


def _wrong_scan(monkeypatch, spoil):
    honest = S6Core.scan

    def scan(self, *arguments, **keywords):
        exact = honest(self, *arguments, **keywords)
        return exact if os.environ.get("VISION_SSM_BACKEND") == "reference" else spoil(exact)

    monkeypatch.setattr(S6Core, "scan", scan)


def test_rounding_that_a_model_amplifies_is_allowed(monkeypatch):
    """Both float32 paths are 1 % off, each in its own way; what is exact in float64 says so."""
    honest = S6Core.scan

    def scan(self, *arguments, **keywords):
        exact = honest(self, *arguments, **keywords)
        return exact if exact.dtype == torch.float64 else exact * (1 + 0.01 * torch.randn_like(exact))

    monkeypatch.setattr(S6Core, "scan", scan)
    model = vision_ssm.create_model("vmamba_micro").eval()
    check_model("vmamba_micro", model, torch.device("cpu"))


def test_a_wrong_model_is_not_timed(monkeypatch):
    model = vision_ssm.create_model("vmamba_micro").eval()
    check_model("vmamba_micro", model, torch.device("cpu"), gradients=True)
    _wrong_scan(monkeypatch, lambda exact: exact.roll(1, dims=1))
    with pytest.raises(BenchmarkError, match="vmamba_micro is not timed: its logits are .* away from the reference"):
        benchmark_models(["vmamba_micro"], ModelSettings(size=(64, 64), repeats=1))


def test_wrong_gradients_forbid_training_only(monkeypatch):
    _wrong_scan(monkeypatch, lambda exact: 1.01 * exact - 0.01 * exact.detach())
    settings = ModelSettings(size=(64, 64), repeats=1, warmup=1)
    assert benchmark_models(["vmamba_micro"], settings)[0].median
    with pytest.raises(BenchmarkError, match="vmamba_micro is not timed: its gradient of .* is .* away from the ref"):
        benchmark_models(["vmamba_micro"], ModelSettings(size=(64, 64), repeats=1, train=True))


def test_half_precision_is_checked_too(monkeypatch):
    _wrong_scan(monkeypatch, lambda exact: exact.roll(1, dims=1) if torch.is_autocast_enabled("cpu") else exact)
    settings = ModelSettings(size=(64, 64), repeats=1, warmup=1)
    assert benchmark_models(["vmamba_micro"], settings)[0].median
    with pytest.raises(BenchmarkError, match="its bfloat16 logits are .* away from the reference"):
        benchmark_models(["vmamba_micro"], ModelSettings(size=(64, 64), amp=torch.bfloat16))


def test_compiled_models_are_compared_with_plain_ones(monkeypatch):
    compiled = []

    def compile(model, dynamic):
        compiled.append(model)
        return lambda images: model(images) * factor

    monkeypatch.setattr(torch, "compile", compile)
    settings = ModelSettings(size=(64, 64), repeats=1, warmup=1, compile=True)
    factor = 1.0
    assert benchmark_models(["vmamba_micro"], settings, check=False)[0].median and len(compiled) == 1
    factor = 1.1
    with pytest.raises(BenchmarkError, match="its output is .* away from that of the plain model"):
        benchmark_models(["vmamba_micro"], settings, check=False)


class Picky(nn.Module):
    """Runs out of memory at 64 pixels and refuses 32."""

    num_classes = 3

    def forward(self, images):
        if images.shape[-1] == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise AssertionError("Input height (32) doesn't match model (48).")


@pytest.mark.parametrize("side, note", [(64, "out of memory"), (32, "Input height (32) doesn't match model (48).")])
def test_a_model_that_cannot_run_does_not_stop_the_others(monkeypatch, side, note):
    honest = models.build_model
    monkeypatch.setattr(models, "build_model", lambda name, size: Picky() if "picky" in name else honest(name, size))
    settings = ModelSettings(size=(side, side), repeats=1, warmup=1)
    picky, fine = benchmark_models(["timm:picky", "timm:test_resnet"], settings)
    assert (picky.note, picky.median, fine.note) == (note, None, "") and fine.median > 0


def test_models_of_fixed_size_are_built_for_the_images():
    assert build_model("timm:test_vit", (96, 64))(torch.zeros(1, 3, 96, 64)).shape == (1, 1000)
    with pytest.raises(KeyError, match="timm has no model 'convnext_tinny'. Did you mean 'convnext_tiny'"):
        build_model("timm:convnext_tinny")


def test_settings_that_do_not_go_together():
    with pytest.raises(BenchmarkError, match="CUDA graphs need a CUDA device, not cpu"):
        benchmark_models(["vmamba_micro"], ModelSettings(graph=True))


def test_models_are_compared_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, seen = vision_ssm.create_model("vmamba_micro"), []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    check_model("vmamba_micro", model, torch.device("cpu"))
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_backend_is_that_of_a_real_call(monkeypatch):
    images = torch.zeros(1, 3, 64, 64)
    ours, theirs = vision_ssm.create_model("vmamba_micro"), build_model("timm:test_resnet")
    used = used_backends(lambda: ours(images))
    assert used["scan_2d"].name == "chunked" and describe_backends(used)[0] == "chunked"
    assert used_backends(lambda: theirs(images)) == {} and describe_backends({}) == ("-", "")
    mixed = {"scan_2d": used["scan_2d"]._replace(name="triton", reason=""), "ssd": used["scan_2d"]}
    assert describe_backends(mixed) == ("scan_2d triton, ssd chunked", used["scan_2d"].reason)
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert describe_backends({}) == ("reference", "VISION_SSM_BACKEND=reference asks for it")


def test_machine_and_versions_are_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine["device"].startswith("cpu: ") and machine["tf32"] == "matmul off, convolution off"
    assert describe_versions()["torch"] == torch.__version__


@pytest.mark.slow  # builds every pair of model and scan; the linter's step of the build runs the tool itself
def test_readme_tables_are_up_to_date(monkeypatch, capsys):
    assert run_tool(monkeypatch, "tools/update_readme.py", "--check") == 0


def test_readme_names_everything():
    page = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in page for name in (*vision_ssm.list_models(), *vision_ssm.list_scans()))


def test_tables_replace_only_what_is_marked():
    page = "before\n<!-- table scans -->\nstale\n<!-- end -->\nafter\n"
    filled = fill_tables(page, ROOT)
    assert filled.startswith("before\n<!-- table scans -->\n| scan |") and filled.endswith("<!-- end -->\nafter\n")
    assert "stale" not in filled and fill_tables(filled, ROOT) == filled
    with pytest.raises(KeyError, match="nothing"):
        fill_tables("<!-- table nothing -->\n<!-- end -->", ROOT)


def test_short_names_of_kernels():
    names = {
        "_forward_kernel": "_forward_kernel",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float)":
            "vectorized_layer_norm_kernel",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<F>(T&)::{lambda()#1}>(int)":
            "elementwise_kernel",
        "Memcpy DtoD (Device -> Device)": "Memcpy DtoD",
        "aten::addmm": "addmm",
    }  # fmt: skip
    assert {kernel: _short_name(kernel) for kernel in names} == names

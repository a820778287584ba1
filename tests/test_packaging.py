"""What a user installs: the list of packages, the place of the kernels, the cost of the import."""

import configparser
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vision_ssm

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import vision_ssm, vision_ssm.kernels as k; from vision_ssm.ops import select_backend;"
    "import sys; assert 'kernels' not in sys.modules; print(k.__name__, k.__file__)"
)


def run(code, cwd, path=()):
    """Output of `code` run in `cwd` with `path` before the PYTHONPATH of this process."""
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_packages_lists_every_folder():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for base in ("vision_ssm", "kernels")
        for init in (ROOT / base).rglob("__init__.py")
    }
    assert listed == {
        name.replace("kernels", "vision_ssm.kernels") if name.startswith("kernels") else name for name in folders
    }


def test_from_the_source_tree():
    """What the import finds, and what it leaves alone: frameworks for dense tasks, drawing, ONNX, the GPU."""
    code = """
import sys, torch
heavy = ("mmcv", "mmseg", "mmdet", "mmengine.runner", "matplotlib", "sklearn", "tensorboard")
assert not {*heavy} & {*sys.modules}, {*heavy} & {*sys.modules}
assert not torch.cuda.is_initialized()
import vision_ssm.integrations.export
assert not [name for name in sys.modules if "onnx" in name.split(".")[0]]
"""
    assert run(PROBE + code, ROOT, [ROOT]).startswith("vision_ssm.kernels")


def test_from_elsewhere(tmp_path):
    assert run(PROBE, tmp_path, [ROOT]).endswith(str(ROOT / "kernels" / "__init__.py"))


def test_without_what_is_optional():
    """Neither Triton nor the medical extra, mmseg or mmdet; and mmcv's operators need nothing imported but the door."""
    code = """
import sys
missing = ("triton", "nibabel", "h5py", "pydicom", "monai", "scipy", "mmseg", "mmdet")
sys.modules.update(dict.fromkeys(missing))  # any import of them fails
import torch, vision_ssm.kernels, vision_ssm.ops as ops
assert vision_ssm.kernels.find("of no operator") is None
x = torch.randn(1, 4, 5)
assert ops.selective_scan(x, x, -torch.rand(4, 2), x[:, :2], x[:, 2:]).isfinite().all()
assert not torch.cuda.is_initialized()
import vision_ssm.data.prepare
assert len(vision_ssm.data.draw_folds(["a", "b"], 2)) == 2
import vision_ssm.integrations.mm
import mmcv.ops
from vision_ssm.registry import MODELS
print("VMamba" in MODELS.module_dict, sys.modules["mmcv._ext"].__file__)
"""
    printed = run(code, ROOT)
    assert printed.startswith("True ") and printed.endswith("mmcv_ext.py")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["normal", "editable", "strict", "compat", "wheel"])
def test_install_modes(mode, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "vision_ssm", "kernels"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    if mode in ("normal", "wheel"):
        if mode == "wheel":
            subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)], check=True
            )
            command.append(str(next(tmp_path.glob("*.whl"))))
        else:
            command.append(str(source))
        subprocess.run(command, check=True)
        python, elsewhere = sys.executable, dict(PYTHONPATH=str(tmp_path / "site"))
        for cwd in (tmp_path, source):
            output = subprocess.run(
                [python, "-c", PROBE], cwd=cwd, env={**os.environ, **elsewhere}, capture_output=True, text=True
            )
            assert output.returncode == 0, output.stderr
            assert output.stdout.startswith(f"vision_ssm.kernels {tmp_path}"), output.stdout
        return
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    settings = [] if mode == "editable" else ["--config-settings", f"editable_mode={mode}"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            *settings,
            "-e",
            str(source),
        ],
        check=True,
    )
    site = next((venv / "lib").glob("python*")) / "site-packages"
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    for cwd in (tmp_path, source):
        output = subprocess.run([str(python), "-c", PROBE], cwd=cwd, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr
        assert output.stdout.startswith(f"vision_ssm.kernels {tmp_path}"), output.stdout


@pytest.mark.slow
def test_import_costs_little_more_than_torch_and_timm():
    def seconds(code):
        start = time.perf_counter()
        run(code, ROOT)
        return time.perf_counter() - start

    pairs = [(seconds("import torch, timm"), seconds("import vision_ssm")) for _ in range(5)]
    plain, ours = (statistics.median(column) for column in zip(*pairs))
    assert ours <= 1.25 * plain, f"import vision_ssm {ours:.2f} s, import torch, timm {plain:.2f} s"


def test_public_names():
    assert sorted(vision_ssm.__all__) == [
        "CheckpointError",
        "LoadReport",
        "__version__",
        "build_routes",
        "build_scan",
        "create_model",
        "import_official",
        "list_models",
        "list_routes",
        "list_scans",
        "list_unets",
        "load_encoder",
        "load_weights",
    ]
    assert all(hasattr(vision_ssm, name) for name in vision_ssm.__all__)


def test_shared_blocks_are_defined_once():
    shared = ("Mlp", "LayerNorm2d", "DropPath", "PatchMerging", "PatchEmbed", "PatchStem", "ConvStem")
    for path in (ROOT / "vision_ssm").rglob("*.py"):
        if "layers" not in path.parts:
            classes = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("class ")]
            assert not [name for name in classes if name.startswith(shared)], path

"""The documentation: tutorials run as they are written, pictures have their commands, every module has its place."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vision_ssm.engine.visualize_command import visualize
from vision_ssm.engine.visualize_options import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(page.stem for page in (DOCS / "tutorials").glob("*.md"))
BIGGEST_PICTURE = 80_000  # bytes
# Runs the blocks of a page, given as json, in order: python in one namespace, sh in a shell.
RUNNER = """
import json, subprocess, sys
space = {"__name__": "__main__"}
for language, line, code in json.load(open(sys.argv[1])):
    if language == "sh":
        result = subprocess.run(["bash", "-euo", "pipefail", "-c", code])
        if result.returncode:
            sys.exit(f"the block in line {line} ended with {result.returncode}")
    else:
        exec(compile("\\n" * line + code, sys.argv[2], "exec"), space)
    sys.stdout.flush()
"""


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Language, line number and text of the blocks of a page that run."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], text[: match.start()].count("\n") + 1, match[2]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("name", PAGES)
def test_tutorial_runs(name, tmp_path):
    page = DOCS / "tutorials" / f"{name}.md"
    found = blocks(page)
    assert found
    for folder in ("tools", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "blocks.json").write_text(json.dumps(found))
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # no link, which would lose the environment of the interpreter
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-c", RUNNER, "blocks.json", str(page)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]


def gallery() -> list[tuple[str, str]]:
    """Commands of the gallery and the pictures they write."""
    commands = [
        " ".join(line.split()) for language, _, code in blocks(DOCS / "gallery.md") if language == "sh"
        for line in code.replace("\\\n", " ").splitlines() if line.startswith("python tools/visualize.py")
    ]  # fmt: skip
    return [(command, shlex.split(command)[shlex.split(command).index("--out") + 1]) for command in commands]


def test_every_picture_has_its_command_and_is_small():
    pictures = {str(path.relative_to(ROOT)) for path in (DOCS / "pictures").iterdir()}
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert pictures == {out for _, out in gallery()}
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < BIGGEST_PICTURE, picture
        assert f"](pictures/{Path(picture).name})" in text, f"{picture} is not shown"
    for command, _ in gallery():
        build_parser().parse_args(shlex.split(command)[2:])  # exits where an option is unknown


@pytest.mark.parametrize("command, out", [pair for pair in gallery() if pair[0].split()[2] == "scan"])
def test_routes_of_the_gallery_are_drawn_again(command, out, tmp_path):
    """Scans need no trained weights: what the command writes today has the size and the frames of what is shown."""
    from PIL import Image

    arguments = shlex.split(command)[2:]
    fresh = tmp_path / Path(out).name
    arguments[arguments.index("--out") + 1] = str(fresh)
    assert visualize(arguments) == 0
    if fresh.suffix == ".svg":
        assert fresh.read_text() == (ROOT / out).read_text()
        return
    with Image.open(fresh) as now, Image.open(ROOT / out) as shown:
        assert getattr(now, "n_frames", 1) == getattr(shown, "n_frames", 1)
        assert abs(now.width - shown.width) <= 4 and abs(now.height - shown.height) <= 4


def test_every_public_module_is_in_the_reference():
    listed = set(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))))
    folders = ("scans", "backbones", "layers", "ops", "unets", "integrations", "analysis")
    modules = {
        f"vision_ssm.{folder}.{path.stem}" for folder in folders for path in (ROOT / "vision_ssm" / folder).glob("*.py")
        if path.stem != "__init__"
    }  # fmt: skip
    assert listed == modules


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="docs/requirements.txt is not installed")
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    for page in ("index", "gallery", "tutorials/own_images", "api/ops"):
        assert (tmp_path / f"{page}.html").stat().st_size > 5000

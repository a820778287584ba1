"""The commands of tools/prepare_data.py."""

import errno
import hashlib
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vision_ssm.data import ImageFolder, progress
from vision_ssm.data.digits import digits_split, write_digits
from vision_ssm.data.prepare import check_folder, main
from vision_ssm.data.writing import PrepareError

ROOT = Path(__file__).resolve().parents[1]
DIGITS = load_digits()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "new" / "digits"
    assert write_digits(out)
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digits_are_complete_and_stratified(digits):
    train, val = ImageFolder(digits, "train", channels=1), ImageFolder(digits, "val", channels=1)
    assert train.classes == val.classes == tuple("0123456789")
    assert len(train) == 1438 and len(val) == 359
    totals = np.bincount(DIGITS.target)
    assert np.bincount(val.labels).tolist() == [round(0.2 * total) for total in totals.tolist()]
    assert (np.bincount(train.labels) + np.bincount(val.labels) == totals).all()
    rows = sorted(int(Path(dataset.path(index)).stem) for dataset in (train, val) for index in range(len(dataset)))
    assert rows == list(range(1797))
    for dataset in (train, val):
        for index in range(len(dataset)):
            assert DIGITS.target[int(Path(dataset.path(index)).stem)] == dataset.labels[index]


def test_stored_pixels_are_the_scans_enlarged(digits):
    for row in (0, 5, 700, 1796):
        (path,) = digits.glob(f"*/*/{row:04d}.png")
        with Image.open(path) as stored:
            assert stored.mode == "L" and stored.size == (32, 32) and stored.format == "PNG"
            pixels = np.asarray(stored)
        scan = Image.fromarray((DIGITS.images[row] * 255 / 16).round().astype(np.uint8))
        assert np.array_equal(pixels, np.asarray(scan.resize((32, 32), Image.Resampling.BICUBIC)))


def test_original_size_keeps_every_grey_level(tmp_path):
    write_digits(tmp_path / "digits8", size=8)
    for path in (tmp_path / "digits8").glob("*/*/*.png"):
        with Image.open(path) as stored:
            levels = np.rint(np.asarray(stored) * (16 / 255))
        assert np.array_equal(levels, DIGITS.images[int(path.stem)])


def test_split_is_fixed_and_listed(digits):
    listed = (digits / "split.txt").read_text().splitlines()
    assert listed == sorted(path.relative_to(digits).as_posix() for path in digits.rglob("*.png"))
    validation = np.flatnonzero(digits_split(DIGITS.target))
    assert hashlib.sha256(validation.astype("<i8").tobytes()).hexdigest()[:16] == "3530be80b9605f4c"
    assert not np.array_equal(digits_split(DIGITS.target), digits_split(DIGITS.target, seed=1))
    readme = (digits / "README.txt").read_text()
    facts = ("CC BY 4.0", "10.24432/C50P49", "1438 training and 359 validation", "RandomState(0)", "32 x 32 (bicubic)")
    for fact in facts:
        assert fact in readme


def test_second_run_changes_nothing(digits, capsys):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert main(["digits", str(digits)]) == 0
    assert "already complete in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_incomplete_or_other_digits_need_overwrite(tmp_path):
    out = tmp_path / "digits"
    write_digits(out, size=8)
    complete = snapshot(out)
    with pytest.raises(PrepareError, match="holds digits of another size, or an incomplete set. Pass --overwrite"):
        write_digits(out, size=9)
    next(out.glob("val/3/*.png")).unlink()
    with pytest.raises(PrepareError, match="Pass --overwrite to replace them"):
        write_digits(out, size=8)
    assert write_digits(out, size=8, overwrite=True)
    assert snapshot(out) == complete
    assert os.listdir(tmp_path) == ["digits"]


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(PrepareError, match="not empty and holds something other .* even with --overwrite"):
            write_digits(tmp_path, size=8, overwrite=overwrite)
    write_digits(tmp_path / "digits", size=8)
    (tmp_path / "digits" / "mine.txt").write_text("precious")
    with pytest.raises(PrepareError, match="something other"):
        write_digits(tmp_path / "digits", size=16, overwrite=True)
    assert (tmp_path / "digits" / "mine.txt").read_text() == "precious"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PrepareError, match="file' is a file; the digits need a folder of their own"):
        write_digits(tmp_path / "file", size=8)
    with pytest.raises(PrepareError, match="cannot write to .*file'.*Choose another folder"):
        write_digits(tmp_path / "file" / "digits", size=8)
    with pytest.raises(PrepareError, match="--size must be at least 8, the size of the scans, got 7"):
        write_digits(tmp_path / "digits", size=7)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PrepareError, match="cannot write to .*Permission denied"):
        write_digits(tmp_path / "digits", size=8)
    tmp_path.chmod(0o700)


def test_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch):
    write_digits(tmp_path / "digits", size=8)
    before = snapshot(tmp_path)
    original, written = Image.Image.save, []

    def save(image, path, *rest, **options):
        if len(written) == 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        original(image, path, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(PrepareError, match="No space left on device. It is as it was before. Free some space"):
        write_digits(tmp_path / "digits", size=9, overwrite=True)
    assert len(written) == 100 and snapshot(tmp_path) == before and os.listdir(tmp_path) == ["digits"]


def test_failure_while_changing_places_brings_the_old_folder_back(tmp_path, monkeypatch):
    write_digits(tmp_path / "digits", size=8)
    before = snapshot(tmp_path)
    original = Path.rename

    def rename(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert main(["digits", str(tmp_path / "digits"), "--size", "9", "--overwrite"]) == 130
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["digits"]


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(PrepareError, match="come with scikit-learn, which does not import .*pip install scikit-learn"):
        write_digits(tmp_path / "digits")


def test_check_of_good_data(digits, capsys):
    reports, problems = check_folder(digits)
    assert problems == [] and [report.split for report in reports] == ["train", "val"]
    train = reports[0]
    assert train.images == 1438 and train.classes == tuple("0123456789") and sum(train.class_counts) == 1438
    assert train.smallest == train.largest == (32, 32) and train.modes == {"PNG L": 1438}
    assert main(["check", str(digits), "--split", "val"]) == 0
    output = capsys.readouterr().out
    assert "no problem found in 359 images" in output and "35 to 37" in output


def test_check_finds_what_is_wrong(tmp_path, capsys):
    for number, (split, name) in enumerate([("train", "a"), ("train", "a"), ("train", "b"), ("val", "a")]):
        path = tmp_path / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20 + number)).save(path)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"\x89PNG")
    (tmp_path / "val" / "c").mkdir()
    reports, problems = check_folder(tmp_path, min_size=22, workers=2)
    assert reports[0].smallest == (21, 40) and reports[0].largest == (22, 40) and len(reports[0].unreadable) == 1
    text = "\n".join(problems)
    assert len(problems) == 4
    assert f"train: cannot read image {str(tmp_path / 'train' / 'a' / '0.png')!r}" in text
    assert "train: smaller than 22 pixels" in text and "1.png' is 21 x 40" in text
    assert "val: class folder 'c' has no image" in text and "do not have the same classes" in text
    assert main(["check", str(tmp_path), "--show", "1", "--list", str(tmp_path / "problems.txt")]) == 1
    output = capsys.readouterr().out
    assert "and 2 more (--list FILE writes all)" in output and "3 problems found" in output
    assert len((tmp_path / "problems.txt").read_text().splitlines()) == 3


def test_check_of_something_else(tmp_path, capsys):
    assert main(["check", str(tmp_path / "absent")]) == 2
    assert "error: data folder" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 2
    assert "is empty: expected one folder per class" in capsys.readouterr().err
    Image.new("L", (8, 8)).save(tmp_path / "flat.png")
    assert main(["check", str(tmp_path)]) == 2
    assert "1 images but no class folders" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "1.png")
    assert main(["check", str(tmp_path), "--list", str(tmp_path / "no" / "list.txt")]) == 2
    assert "cannot write the list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "COMMAND"), (["digit", "x"], "invalid choice"), (["check", "x", "--workers", "0"], "at least 1, got 0")],
)
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_blocks_of_a_long_check(digits, monkeypatch):
    monkeypatch.setattr(progress, "BLOCK", 100)
    assert check_folder(digits, ["val"])[0][0].modes == {"PNG L": 359}


def test_tool_as_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "digits", "digits", "--size", "8"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "prepare_data.py"), run_name="__main__")
    assert end.value.code == 0
    assert "digits written to digits: 1438 train, 359 val images, 8 x 8 pixels" in capsys.readouterr().out
    assert len(list((tmp_path / "digits").glob("*/*/*.png"))) == 1797

"""Drawn organs and lesions, the medical commands of tools/prepare_data.py, and NIfTI to slices."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")
ndimage = pytest.importorskip("scipy.ndimage")

from vision_ssm.data import (  # noqa: E402
    AcdcSlices,
    AcdcVolumes,
    IsicImages,
    NiftiVolumes,
    SynapseSlices,
    SynapseVolumes,
)
from vision_ssm.data.check_medical import check_medical  # noqa: E402
from vision_ssm.data.lesions import FAINT_AT, FAINT_EVERY, draw_lesion, write_lesions  # noqa: E402
from vision_ssm.data.medical_base import ORGANS_CLASSES  # noqa: E402
from vision_ssm.data.organ_layouts import ORGAN_LAYOUTS, write_organs  # noqa: E402
from vision_ssm.data.organs import draw_organs  # noqa: E402
from vision_ssm.data.prepare import main  # noqa: E402
from vision_ssm.data.writing import PrepareError  # noqa: E402

CASES, SIZE, DEPTH = 6, 40, 12
SMALL = dict(cases=CASES, size=SIZE, depth=DEPTH)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("organs")
    for layout in ORGAN_LAYOUTS:
        assert write_organs(root / layout, layout, **SMALL)
    return {layout: root / layout for layout in ORGAN_LAYOUTS}


def windowed(image: np.ndarray) -> np.ndarray:
    return ((np.clip(image, -125, 275) + 125) / 400).astype(np.float32)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("depth, size", [(24, 96), (8, 32), (40, 64)])
def test_organs_are_what_they_claim(depth, size):
    drawn = [draw_organs(5, case, depth, size) for case in range(3)]
    for volume in drawn:
        assert volume.image.shape == volume.labels.shape == (depth, size, size)
        assert volume.image.dtype == np.int16 and volume.labels.dtype == np.uint8
        assert volume.spacing[0] != volume.spacing[1] == volume.spacing[2]
        assert not volume.labels[:2].any() and not volume.labels[-2:].any()  # empty at both ends
        assert volume.image.min() < -900 and volume.image.max() > 250  # air and bone, in Hounsfield units
        counts = np.bincount(volume.labels.ravel(), minlength=6)
        assert counts[0] > counts[1] > 2.5 * counts[5] and (counts[:2] > 0).all()
    if size < 64:
        return
    for volume in drawn:
        assert set(np.unique(volume.labels)) == set(range(len(ORGANS_CLASSES)))
        for label, (low, high) in {1: (70, 150), 2: (80, 160), 3: (110, 210), 5: (130, 260)}.items():
            inside = ndimage.binary_erosion(volume.labels == label, np.ones((1, 3, 3)))
            assert low < np.median(volume.image[inside]) < high, ORGANS_CLASSES[label]
        touching = set()
        for axis in range(3):
            pairs = np.stack([np.delete(volume.labels, 0, axis), np.delete(volume.labels, -1, axis)], -1).reshape(-1, 2)
            touching |= {tuple(sorted(pair)) for pair in np.unique(pairs, axis=0).tolist() if min(pair) and pair[0] != pair[1]}
        assert len(touching) >= 2  # organs lie against each other
        # intensity alone does not do it: the best label for every 10 HU, chosen with the answer at hand
        bins = np.clip(volume.image, -1000, 500).astype(int) // 10 + 100
        guess = np.array([np.bincount(volume.labels[bins == number], minlength=6).argmax() for number in range(151)])[bins]
        dice = [2 * ((guess == k) & (volume.labels == k)).sum() / ((guess == k).sum() + (volume.labels == k).sum()) for k in range(1, 6)]
        assert np.mean(dice) < 0.5
    assert np.ptp([volume.image[volume.labels == 1].mean() for volume in drawn]) > 2  # cases differ


def test_organs_depend_on_seed_and_case_alone():
    first, other = draw_organs(0, 1, 8, 32), draw_organs(1, 1, 8, 32)
    for again in (draw_organs(0, 1, 8, 32),):
        assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
        assert first.spacing == again.spacing
    assert not np.array_equal(first.image, other.image)
    for shape in ((7, 32), (8, 31)):
        with pytest.raises(ValueError, match="at least 8 slices of 32 rows"):
            draw_organs(0, 0, *shape)


@pytest.mark.parametrize("layout", ORGAN_LAYOUTS)
def test_equal_seeds_give_equal_bytes_for_any_number_of_workers(tmp_path, folders, layout):
    write_organs(tmp_path / "again", layout, workers=5, **SMALL)
    one, other = snapshot(folders[layout]), snapshot(tmp_path / "again")
    assert one == other and {"README.txt", "overview.png"} < set(one)
    assert not write_organs(tmp_path / "again", layout, **SMALL)  # complete already
    with pytest.raises(PrepareError, match="holds something else"):
        write_organs(tmp_path / "again", layout, seed=1, **SMALL)
    assert Image.open(folders[layout] / "overview.png").size == (6 * SIZE, 8 * SIZE)
    assert not check_medical(folders[layout], layout, num_classes=6)[0].problems


def test_organs_in_the_form_of_synapse(folders):
    root = folders["synapse"]
    slices, volumes = SynapseSlices(root, classes="organs"), SynapseVolumes(root, classes="organs")
    assert len(slices) == 4 * DEPTH and volumes.cases() == ["case0005", "case0006"]
    assert slices.cases()[DEPTH] == "case0002_slice000"
    drawn = draw_organs(0, 1, DEPTH, SIZE)
    item = slices[DEPTH + 5]
    assert np.array_equal(item["image"][0], windowed(drawn.image[5])) and np.array_equal(item["mask"], drawn.labels[5])
    drawn, volume = draw_organs(0, 5, DEPTH, SIZE), volumes[1]["volume"]
    assert np.array_equal(volume.image[:, 0], windowed(drawn.image)) and np.array_equal(volume.mask, drawn.labels)
    assert volume.spacing == drawn.spacing
    with np.load(root / "train_npz" / "case0002_slice000.npz", allow_pickle=False) as file:
        assert set(file) == {"image", "label"} and file["image"].dtype == np.float32


def test_organs_in_the_form_of_acdc(folders):
    root = folders["acdc"]
    parts = [len(AcdcSlices(root, split, classes="organs")) for split in ("train", "valid")]
    assert parts == [4 * DEPTH, DEPTH]
    volume, drawn = AcdcVolumes(root, classes="organs")[0]["volume"], draw_organs(0, 5, DEPTH, SIZE)
    assert np.array_equal(volume.mask, drawn.labels) and volume.spacing == drawn.spacing


def test_organs_as_nifti(folders):
    root = folders["nifti"]
    volumes = NiftiVolumes(root, "all", window=(-125, 275))
    assert volumes.classes == ORGANS_CLASSES and len(volumes) == 4 and len(NiftiVolumes(root, "test")) == 2
    codes = set()
    for index, volume in enumerate(volumes[index]["volume"] for index in range(4)):
        drawn = draw_organs(0, index, DEPTH, SIZE)
        assert np.array_equal(volume.mask, drawn.labels), "orientation"
        assert np.allclose(volume.image[:, 0], windowed(drawn.image), atol=1e-6)
        assert np.allclose(volume.spacing, drawn.spacing)
        image = nibabel.load(root / "imagesTr" / f"{volume.case}_0000.nii.gz")
        assert image.get_data_dtype() == np.int16
        off_axis = np.abs(image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)).round(6)
        codes.add(("".join(nibabel.aff2axcodes(image.affine)), bool(((off_axis > 0) & (off_axis < 1)).any())))
    assert codes == {("LPS", False), ("RAS", False), ("LAS", True)}


def test_lesions(tmp_path):
    assert write_lesions(tmp_path / "one", train=7, val=2, size=48)
    assert not write_lesions(tmp_path / "one", train=7, val=2, size=48, workers=1)
    write_lesions(tmp_path / "two", train=7, val=2, size=48, workers=5)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    images = IsicImages(tmp_path / "one")
    assert len(images) == 7 and len(IsicImages(tmp_path / "one", "val")) == 2
    image, mask = draw_lesion(0, 0, 2, 48)
    assert np.array_equal(images[2]["mask"], mask.astype(np.float32))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / "train" / "images" / "lesion_00003.png")), image)
    assert Image.open(tmp_path / "one" / "overview.png").size == (7 * 48, 2 * 48)
    contrast = {False: [], True: []}
    for index in range(24):
        image, mask = draw_lesion(3, 1, index, 64)
        assert 0.004 < mask.mean() < 0.5 and image.shape == (64, 64, 3)
        near = ndimage.binary_dilation(mask, iterations=6) & ~ndimage.binary_dilation(mask, iterations=3)
        grey = image.mean(2)
        contrast[index % FAINT_EVERY == FAINT_AT].append(np.median(grey[near]) - np.median(grey[mask]))
    assert np.median(contrast[False]) > 2 * np.median(contrast[True]) > 5  # some hardly show, all are darker


@pytest.mark.parametrize("arguments, message", [
    (["organs", "X", "--layout", "nifti", "--cases", "3"], "--cases must be at least 4, got 3"),
    (["organs", "X", "--layout", "nifti", "--size", "8"], "--size must be at least 32, got 8"),
    (["organs", "X", "--layout", "nifti", "--depth", "7"], "--depth must be at least 8, got 7"),
    (["organs", "X", "--layout", "nifti", "--seed", "-1"], "--seed must be from 0"),
    (["lesions", "X", "--train", "0"], "--train must be at least 1, got 0"),
    (["lesions", "X", "--seed", "-1"], "--seed must be from 0"),
    (["nifti", "X", "Y"], "does not exist"),
    (["nifti", "X", "Y", "--window", "3", "3"], "window must be (low, high)"),
    (["nifti", "X", "Y", "--orientation", "LLS"], "one side for each of the axes"),
    (["check", "X", "--layout", "isic"], "does not exist"),
])  # fmt: skip
def test_commands_refuse_before_they_write(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ") and not list(tmp_path.iterdir())


def test_commands(tmp_path, capsys):
    out = str(tmp_path / "o")
    flags = ["--layout", "synapse", "--cases", "4", "--size", "32", "--depth", "8"]
    assert main(["organs", out, *flags]) == 0 and "written to" in capsys.readouterr().out
    assert main(["organs", out, *flags]) == 0 and "already complete in" in capsys.readouterr().out
    made = next(line for line in (tmp_path / "o" / "README.txt").read_text().splitlines() if "Made by" in line)
    assert " ".join(flags) in made
    assert main(["lesions", str(tmp_path / "l"), "--train", "2", "--val", "1", "--size", "32"]) == 0
    assert main(["check", out, "--layout", "synapse", "--num-classes", "6"]) == 0
    assert main(["check", str(tmp_path / "l"), "--layout", "isic", "--list", str(tmp_path / "list")]) == 0
    printed = capsys.readouterr().out
    assert "no problem found in 3 images" in printed and "class lesion" in printed
    path = tmp_path / "l" / "train" / "masks" / "lesion_00002.png"
    path.write_bytes(path.read_bytes()[:30])
    assert main(["check", str(tmp_path / "l"), "--layout", "isic", "--list", str(tmp_path / "list")]) == 1
    assert "lesion_00002.png" in (tmp_path / "list").read_text()
    with pytest.raises(PrepareError, match="a folder of their own"):
        write_lesions(tmp_path / "list")


def test_nifti_to_slices(tmp_path, folders, capsys):
    root, out = folders["nifti"], tmp_path / "slices"
    assert main(["nifti", str(root), str(out)]) == 0
    assert "4 training and 2 test cases" in capsys.readouterr().out
    slices, volumes = SynapseSlices(out, classes="organs"), SynapseVolumes(out, classes="organs")
    drawn = draw_organs(0, 2, DEPTH, SIZE)  # the one whose file is rotated
    item = slices[slices.cases().index("organs_003_slice006")]
    assert np.allclose(item["image"][0], windowed(drawn.image[6]), atol=1e-6)
    assert np.array_equal(item["mask"], drawn.labels[6])
    volume, drawn = volumes[0]["volume"], draw_organs(0, 4, DEPTH, SIZE)
    assert volume.case == "organs_005" and np.array_equal(volume.mask, drawn.labels)
    assert np.allclose(volume.spacing, drawn.spacing)
    assert "--window -125 275" in (out / "README.txt").read_text()
    assert main(["nifti", str(root), str(out)]) == 0 and "already complete" in capsys.readouterr().out
    assert main(["nifti", str(root), str(out), "--percentiles"]) == 2 and "not empty" in capsys.readouterr().err
    before = snapshot(root)
    assert main(["nifti", str(root), str(root)]) == 2 and snapshot(root) == before


def test_nifti_to_slices_with_a_drawn_split(tmp_path, folders, capsys):
    root, out = tmp_path / "plain", tmp_path / "slices"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
        for path in (folders["nifti"] / f"{kind}Tr").iterdir():
            (root / kind / path.name.replace("_0000", "")).write_bytes(path.read_bytes())
    assert main(["nifti", str(root), str(out), "--test", "0.5", "--num-classes", "6", "--orientation", "LIA"]) == 0
    split = json.loads((out / "splits.json").read_text())[0]
    assert SynapseVolumes(out, classes="organs").cases() == split["val"] and len(split["val"]) == 2
    assert SynapseSlices(out, classes="organs")[3]["image"].shape == (1, DEPTH, SIZE)  # coronal slices
    assert main(["nifti", str(root), str(tmp_path / "other"), "--split-file", str(out / "splits.json")]) == 0
    assert SynapseVolumes(tmp_path / "other", classes="organs").cases() == split["val"]
    capsys.readouterr()
    assert main(["nifti", str(root), str(tmp_path / "few"), "--num-classes", "3"]) == 2
    assert "holds the labels 3, 4, 5, but 3 classes" in capsys.readouterr().err and not (tmp_path / "few").exists()
    assert main(["nifti", str(root), str(tmp_path / "scaled"), "--rescale", "1", "1024"]) == 2
    assert "unsigned" in capsys.readouterr().err

"""Medical data sets in the published folders, pictures with masks, splits, augmentations and the checks of folders."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")

from vision_ssm.data import (  # noqa: E402
    AcdcSlices,
    AcdcVolumes,
    Draw,
    EpochSampler,
    IsicImages,
    IsicVolumes,
    MaskFolder,
    MaskFolderVolumes,
    MedicalDataError,
    NiftiSlices,
    NiftiVolumes,
    SynapseSlices,
    SynapseVolumes,
    UnreadableImageError,
    draw_folds,
    draw_split,
    fixed_split,
    medical_transform,
)
from vision_ssm.data.check_medical import check_dataset, check_medical  # noqa: E402
from vision_ssm.data.medical_base import SYNAPSE_CLASSES, as_spacing, class_palette  # noqa: E402
from vision_ssm.data.medical_cases import dataset_labels  # noqa: E402
from vision_ssm.data.medical_pictures import read_mask, read_picture, read_soft_mask  # noqa: E402
from vision_ssm.data.medical_splits import read_splits  # noqa: E402
from vision_ssm.registry import DATASETS  # noqa: E402

SIZE = 24


def picture(seed: int, shape: tuple[int, ...] = (SIZE, SIZE)) -> np.ndarray:
    return np.random.RandomState(seed).rand(*shape).astype(np.float32)


def labels(seed: int, shape: tuple[int, ...] = (SIZE, SIZE), classes: int = 9) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, classes, shape).astype(np.float32)


def synapse(root: Path, train: str = "train_npz", test: str = "test_vol_h5", lists: str = "lists/lists_Synapse") -> Path:
    for folder in (train, test, lists):
        (root / folder).mkdir(parents=True)
    stems = [f"case0005_slice{number:03d}" for number in range(4)]
    for number, stem in enumerate(stems):
        np.savez(root / train / f"{stem}.npz", image=picture(number), label=labels(number))
    with h5py.File(root / test / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = picture(9, (3, SIZE, SIZE)), labels(9, (3, SIZE, SIZE))
    (root / lists / "train.txt").write_text("\n".join(stems[::-1]) + "\n")  # the list gives the order
    (root / lists / "test_vol.txt").write_text("case0001\n")
    return root


def acdc(root: Path, lists: bool = True) -> Path:
    for split in ("train", "valid", "test"):
        (root / split).mkdir(parents=True)
    for number in range(2):
        for split in ("train", "valid"):
            name = f"case_001_sliceED_{number}.npz"
            np.savez(root / split / name, img=picture(number), label=labels(number, classes=4))
    np.savez(root / "test" / "case_002_volume_ED.npz", img=picture(1, (3, 20, SIZE)), label=labels(1, (3, 20, SIZE), 4))
    if lists:
        (root / "lists_ACDC").mkdir()
        for split in ("train", "valid", "test"):
            names = sorted(os.listdir(root / split))
            (root / "lists_ACDC" / f"{split}.txt").write_text("\n".join(names))
    return root


def isic(root: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            pixels = (200 * picture(number, (30, 40, 3)) + 20).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / "images" / f"ISIC_{number}.png")
            mask = np.zeros((30, 40), dtype=np.uint8)
            mask[8:20, 10:30] = 255
            Image.fromarray(mask).save(root / split / "masks" / f"ISIC_{number}_segmentation.png")
    return root


def mask_folder(root: Path, count: int = 10, classes: int = 2) -> Path:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        Image.fromarray((255 * picture(number)).astype(np.uint8)).save(root / "images" / f"p{number}.png")
        Image.fromarray(labels(number, classes=classes).astype(np.uint8)).save(root / "masks" / f"p{number}.png")
    return root


def nifti(root: Path, cases: int = 5, depth: int = 4, ct: bool = True) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    affine = np.diag([-1.5, -1.5, 5, 1])
    for number in range(cases):
        image = (1500 * picture(number, (20, 22, depth)) - 1000).astype(np.int16)
        mask = labels(number, (20, 22, depth), 3).astype(np.uint8)
        mask[..., 0] = 0
        nibabel.save(nibabel.Nifti1Image(image, affine), root / "imagesTr" / f"c{number}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / "labelsTr" / f"c{number}.nii.gz")
    content = dict(channel_names={"0": "CT" if ct else "MR"}, labels={"background": 0, "tumour": 2, "organ": 1})
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in ("image", "mask")) and one["case"] == other["case"]


MSVM = dict(train="train_slice", test="test_vol", lists="lists_Synapse")


@pytest.mark.parametrize("names", [{}, MSVM, dict(lists="list_Synapse")])
def test_synapse(tmp_path, names):
    root = synapse(tmp_path / "Synapse", **names)
    slices = SynapseSlices(root)
    assert slices.cases() == [f"case0005_slice{number:03d}" for number in (3, 2, 1, 0)] and len(slices) == 4
    assert slices.metainfo["classes"] == SYNAPSE_CLASSES and len(set(slices.metainfo["palette"])) == 9
    item = slices[-1]
    assert item["case"] == "case0005_slice000" and item["index"] == 3
    assert item["image"].dtype == torch.float32 and torch.equal(item["image"][0], torch.from_numpy(picture(0)))
    assert item["mask"].dtype == torch.int64 and torch.equal(item["mask"], torch.from_numpy(labels(0)).long())
    volume = SynapseVolumes(root)[0]["volume"]
    assert volume.case == "case0001" and volume.spacing == (1, 1, 1) and volume.affine is None
    assert np.array_equal(volume.image[:, 0], picture(9, (3, SIZE, SIZE)))
    assert np.array_equal(volume.mask, labels(9, (3, SIZE, SIZE)))
    with pytest.raises(IndexError):
        slices[4]


def test_lists_elsewhere_and_absent(tmp_path):
    root = synapse(tmp_path / "Synapse")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.txt").write_text("case0005_slice002.npz\ncase0009_slice001\n")
    with pytest.raises(MedicalDataError, match=r"1 of 2 files that .*train.txt.* case0009_slice001.npz"):
        SynapseSlices(root, list_dir=tmp_path / "mine")
    (tmp_path / "mine" / "train.txt").write_text("case0005_slice002\n")
    assert SynapseSlices(root, list_dir=tmp_path / "mine").cases() == ["case0005_slice002"]
    (root / "lists" / "lists_Synapse" / "val.txt").write_text("case0005_slice000\n")
    assert SynapseSlices(root, "val").cases() == ["case0005_slice000"]
    (tmp_path / "mine" / "train.txt").write_text("\n")
    with pytest.raises(MedicalDataError, match="is empty"):
        SynapseSlices(root, list_dir=tmp_path / "mine")
    with pytest.raises(MedicalDataError, match="list of cases"):
        SynapseVolumes(root, list_dir=tmp_path / "mine")
    with pytest.raises(MedicalDataError, match="point the data root at '.*Synapse'"):  # one level too high
        SynapseSlices(tmp_path)
    root = acdc(tmp_path / "acdc", lists=False)
    with pytest.warns(UserWarning, match="all 2 files"):
        assert len(AcdcSlices(root)) == 2
    with pytest.raises(MedicalDataError, match="data folder .* does not exist"):
        AcdcSlices(tmp_path / "absent")


BAD_ARRAYS = [
    (dict(image=picture(0)), "has no array 'label'"),
    (dict(image=picture(0), label=labels(0)[:-1]), r"image is \(24, 24\) and label \(23, 24\)"),
    (dict(image=picture(0, (3, 24, 24)), label=labels(0, (3, 24, 24))), r"must be \(H, W\)"),
    (dict(image=400 * picture(0) - 125, label=labels(0)), r"intensities from -\d+.* to 27\d.*scaled to \[0, 1\]"),
    (dict(image=picture(0) * np.nan, label=labels(0)), "not finite"),
    (dict(image=picture(0), label=labels(0) + 5), "holds the labels 9, 10, 11, 12, 13, but 9 classes"),
    (dict(image=picture(0), label=labels(0) / 2), "fractions"),
    (dict(image=picture(0).astype(str), label=labels(0)), "not numbers"),
]


@pytest.mark.parametrize("arrays, message", BAD_ARRAYS)
def test_slices_that_cannot_be_used(tmp_path, arrays, message):
    root = synapse(tmp_path / "Synapse")
    np.savez(root / "train_npz" / "case0005_slice001.npz", **arrays)
    slices = SynapseSlices(root)
    slices[0]
    with pytest.raises(MedicalDataError, match=message) as caught:
        slices[2]
    assert "case0005_slice001.npz" in str(caught.value)
    (report, _) = check_medical(root, "synapse")
    assert len(report.problems) == 1 and report.problems[0] == f"train: {caught.value}"


def test_a_damaged_slice_and_another_range(tmp_path):
    root = synapse(tmp_path / "Synapse")
    path = root / "train_npz" / "case0005_slice001.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MedicalDataError, match="cannot read .*slice001.npz"):
        SynapseSlices(root)[2]
    np.savez(path, image=100 * picture(0), label=labels(0))
    assert SynapseSlices(root, value_range=None)[2]["image"].max() > 1


def test_acdc(tmp_path):
    root = acdc(tmp_path / "acdc")
    assert AcdcSlices(root)[1]["case"] == "case_001_sliceED_1" and AcdcSlices(root, "valid")[0]["image"].shape == (1, 24, 24)
    volume = AcdcVolumes(root)[0]["volume"]
    assert volume.case == "case_002_volume_ED" and volume.image.shape == (3, 1, 20, 24) and volume.mask.max() == 3
    assert AcdcVolumes(root, "valid")[0]["volume"].image.shape == (1, 1, 24, 24)  # a slice is a volume of one
    assert AcdcVolumes(root, spacing=(10, 1.5, 1.5))[0]["volume"].spacing == (10, 1.5, 1.5)
    np.savez(root / "test" / "case_002_volume_ED.npz", img=picture(1), label=labels(1, classes=4), spacing=[0, 1, 1])
    with pytest.raises(ValueError, match="three positive numbers"):
        AcdcVolumes(root)[0]
    assert as_spacing(None) == (1, 1, 1)


def test_isic(tmp_path):
    root = isic(tmp_path / "isic17")
    item = IsicImages(root)[1]
    assert item["image"].shape == (3, 30, 40) and item["image"].min() == 0 and item["image"].max() == 255
    assert item["mask"].dtype == torch.float32 and item["mask"].unique().tolist() == [0, 1] and item["case"] == "ISIC_1"
    small = IsicImages(root, transform=dict(policy="isic", size=17))[1]
    assert small["image"].shape == (3, 17, 17) and 2 < len(small["mask"].unique())  # soft edges
    volume = IsicVolumes(root, size=20)[0]["volume"]
    assert volume.image.shape == (1, 3, 20, 20) and volume.mask.shape == (1, 20, 20)
    assert set(np.unique(volume.mask)) == {0, 1} and 0.15 < volume.mask.mean() < 0.25  # 12 x 20 of 30 x 40
    assert IsicVolumes(root, size=None)[1]["volume"].mask.sum() == 240
    (root / "val" / "masks" / "ISIC_1_segmentation.png").rename(root / "val" / "masks" / "ISIC_7_segmentation.png")
    with pytest.raises(MedicalDataError, match=r"1 images .* no mask: ISIC_1.png; 1 masks .*ISIC_7_segmentation.png"):
        IsicVolumes(root)
    Image.new("L", (41, 30)).save(root / "train" / "masks" / "ISIC_0_segmentation.png")
    with pytest.raises(MedicalDataError, match=r"ISIC_0.png' is 30 x 40 pixels, its mask .* 30 x 41"):
        IsicImages(root)[0]
    with pytest.raises(ValueError, match="binary"):
        IsicImages(root, classes=("background", "a", "b"))


def test_pictures_keep_their_depth(tmp_path):
    values = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    for ending in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"a.{ending}")
        image = read_picture(tmp_path / f"a.{ending}", 1)
        assert image.dtype == np.float32 and np.allclose(image[0] * 65535, values, atol=1e-2)
        assert read_picture(tmp_path / f"a.{ending}").shape == (3, 1, 4)
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(UnreadableImageError, match=name):
            read_picture(tmp_path / name)
    Image.fromarray(np.full((2, 3, 3), (255, 0, 51), dtype=np.uint8)).save(tmp_path / "c.bmp")
    assert np.allclose(read_picture(tmp_path / "c.bmp")[:, 0, 0], [1, 0, 0.2])


def test_masks_of_all_kinds(tmp_path):
    shapes = np.array([[0, 0, 1], [1, 1, 0]])
    grey = Image.fromarray((shapes * 255).astype(np.uint8))
    forms = {
        "binary.png": grey, "bits.png": grey.convert("1"), "rgb.png": grey.convert("RGB"),
        "rgba.png": grey.convert("RGBA"), "ones.tif": Image.fromarray(shapes.astype(np.uint8)),
        "deep.png": Image.fromarray((shapes * 65535).astype(np.uint16)),
        "palette.png": Image.fromarray(shapes.astype(np.uint8), "P"),
    }  # fmt: skip
    forms["palette.png"].putpalette([9, 9, 9, 200, 0, 0])
    for name, image in forms.items():
        image.save(tmp_path / name)
        assert np.array_equal(read_mask(tmp_path / name), shapes), name
        assert np.array_equal(read_soft_mask(tmp_path / name), shapes.astype(np.float32)), name
    large = np.kron(shapes, np.ones((16, 16))).astype(np.uint8)
    Image.fromarray(large * 255).save(tmp_path / "m.jpg", quality=60)
    assert np.array_equal(read_mask(tmp_path / "m.jpg"), large)
    with pytest.raises(MedicalDataError, match="m.jpg' is a JPEG"):
        read_mask(tmp_path / "m.jpg", 3)
    Image.fromarray(np.array([[0, 2, 4]], dtype=np.uint8)).save(tmp_path / "k.png")
    assert read_mask(tmp_path / "k.png", 5).tolist() == [[0, 2, 4]]
    with pytest.raises(MedicalDataError, match="holds the labels 4, but 4 classes"):
        read_mask(tmp_path / "k.png", 4)
    with pytest.raises(MedicalDataError, match="k.png' holds the values 0, 2, 4; a mask of two classes"):
        read_mask(tmp_path / "k.png")
    Image.fromarray(np.array([[[255, 0, 0]]], dtype=np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(MedicalDataError, match="colour.png' is in colour"):
        read_mask(tmp_path / "colour.png")


def test_mask_folder_with_a_split_file(tmp_path):
    root = mask_folder(tmp_path / "mine")
    train = MaskFolder(root, transform=dict(policy="none", size=(16, 20)))
    val = MaskFolderVolumes(root, spacing=(1, 0.2, 0.2))
    assert len(train) == 8 and len(val) == 2 and not set(train.cases()) & set(val.cases())
    assert read_splits(root / "splits.json")[0] == {"train": train.cases(), "val": val.cases()}
    item = train[0]
    assert item["image"].shape == (3, 16, 20) and item["mask"].shape == (16, 20) and item["mask"].dtype == torch.int64
    volume = val[1]["volume"]
    number = int(volume.case[1:])
    assert np.array_equal(volume.mask[0], labels(number, classes=2)) and volume.spacing == (1, 0.2, 0.2)
    assert np.allclose(volume.image[0, 0], (255 * picture(number)).astype(np.uint8) / 255)
    assert len(MaskFolder(root, "all")) == 10
    Image.new("L", (24, 24)).save(root / "images" / "late.png")
    with pytest.raises(MedicalDataError, match="1 images in .* have no mask: late.png"):
        MaskFolder(root)
    Image.new("L", (24, 24)).save(root / "masks" / "late.png")
    with pytest.raises(MedicalDataError, match="does not name 1 cases that are there: late"):
        MaskFolder(root)
    Image.new("L", (24, 24)).save(root / "images" / "late.tif")
    with pytest.raises(MedicalDataError, match="which one counts"):
        MaskFolder(root)
    with pytest.raises(ValueError, match="channels must be 1"):
        MaskFolder(root, channels=4)


def test_mask_folder_divided_by_folders(tmp_path):
    mask_folder(tmp_path / "train", 3)
    mask_folder(tmp_path / "val", 2)
    assert (len(MaskFolder(tmp_path)), len(MaskFolderVolumes(tmp_path, channels=1))) == (3, 2)
    assert not (tmp_path / "splits.json").exists()
    assert [report.label for report in check_medical(tmp_path, "masks")] == ["train", "val"]


def test_nifti_slices_are_cached(tmp_path):
    root = nifti(tmp_path / "task")
    options = dict(window=(-125, 275), cache_dir=tmp_path / "cache")
    train = NiftiSlices(root, **options)
    assert train.metainfo["classes"] == ("background", "organ", "tumour")
    assert len(train) == 16 and len(NiftiSlices(root, foreground_only=True, **options)) == 12
    volumes = NiftiVolumes(root, "train", window=(-125, 275))
    assert len(volumes) == 4 and len(NiftiVolumes(root, window=(-125, 275))) == 1
    volume = volumes[1]["volume"]
    assert volume.spacing == (5, 1.5, 1.5) and volume.image.min() == 0 and volume.image.max() == 1
    for depth in range(4):
        item = train[4 + depth]
        assert item["case"] == f"{volume.case}_slice{depth:03d}"
        assert np.array_equal(item["image"].numpy(), volume.image[depth])
        assert np.array_equal(item["mask"].numpy(), volume.mask[depth])
    folders = sorted(path.name for path in (tmp_path / "cache").iterdir())
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")}
    NiftiSlices(root, **options)[0]
    assert stamp == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")}  # nothing is redone
    # a damaged slice is made again
    damaged = tmp_path / "cache" / folders[0] / "slice0001.npz"
    before = train[1]["image"]
    damaged.write_bytes(damaged.read_bytes()[:50])
    (tmp_path / "cache" / folders[0] / "slice0002.npz").unlink()
    assert torch.equal(NiftiSlices(root, **options)[1]["image"], before)
    assert (tmp_path / "cache" / folders[0] / "slice0002.npz").is_file()
    # other settings and changed files make new slices
    NiftiSlices(root, window=(-200, 300), cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 8
    image = nibabel.load(root / "imagesTr" / f"{volume.case}_0000.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) - 100, image.affine), image.get_filename())
    assert not torch.equal(NiftiSlices(root, **options)[4]["image"], item["image"])
    assert len(list((tmp_path / "cache").iterdir())) == 9
    assert not [path for path in (tmp_path / "cache").rglob(".*")]
    (tmp_path / "file").write_text("")
    with pytest.raises(MedicalDataError, match="cannot write slices to the cache"):
        NiftiSlices(root, window=(-125, 275), cache_dir=tmp_path / "file" / "cache")


def test_nifti_units_and_classes(tmp_path):
    root = nifti(tmp_path / "task", cases=3)
    for number in range(3):
        path = root / "imagesTr" / f"c{number}_0000.nii.gz"
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1024, image.affine), path)
    with pytest.raises(MedicalDataError, match=r"c\d_0000.nii.gz' has intensities from 2\d to 152\d.*unsigned"):
        NiftiVolumes(root, window=(-125, 275))[0]
    assert "unsigned" in check_medical(root, "nifti")[0].problems[0]
    fixed = NiftiVolumes(root, window=(-125, 275), rescale=(1, -1024))[0]["volume"]
    assert 0.5 < (fixed.image == 0).mean() < 0.65  # below -125 of -1000 .. 500
    assert NiftiVolumes(root, window=(-125, 275), check_units=False)[0]["volume"].image.max() == 1
    assert NiftiVolumes(root)[0]["volume"].image.max() == 1  # percentiles need no unit
    with pytest.raises(MedicalDataError, match="holds the labels 2, but 2 classes"):
        NiftiVolumes(root, classes=("background", "organ"))[0]
    (root / "dataset.json").write_text(json.dumps(dict(labels={"0": "background", "1": "a", "2": "b"})))
    assert dataset_labels(root) == ("background", "a", "b")  # the Decathlon's form
    for content in ("{", '{"labels": {"a": [1, 2]}}', '{"labels": {"background": 0, "a": 3}}'):
        (root / "dataset.json").write_text(content)
        with pytest.raises(MedicalDataError, match="dataset.json"):
            NiftiSlices(root)
    (root / "dataset.json").unlink()
    with pytest.raises(MedicalDataError, match="no dataset.json that names the classes"):
        NiftiSlices(root)


def test_empty_masks_are_counted(tmp_path):
    root = nifti(tmp_path / "task", cases=3)
    path = root / "labelsTr" / "c1.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    (report,) = check_medical(root, "nifti")
    assert not report.problems and report.facts["empty masks"] == "1"
    assert report.warnings == ["train: 1 of 3 masks are empty (background only): c1"]
    assert NiftiSlices(root, "all", window=None, foreground_only=True).cases()[0] == "c0_slice001"
    for number in (0, 2):
        os.replace(root / "labelsTr" / "c1.nii.gz", root / "labelsTr" / f"c{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    (report,) = check_medical(root, "nifti")
    assert report.warnings[0] == "train: all 3 masks that were read are empty (background only)"
    with pytest.raises(MedicalDataError, match="no slice of the split 'all' .* holds a label"):
        NiftiSlices(root, "all", foreground_only=True)


def test_registry_builds_them(tmp_path):
    roots = dict(
        Synapse=synapse(tmp_path / "s"), Acdc=acdc(tmp_path / "a"), Isic=isic(tmp_path / "i"),
        MaskFolder=mask_folder(tmp_path / "m"), Nifti=nifti(tmp_path / "n"),
    )  # fmt: skip
    kinds = {
        "SynapseSlices", "SynapseVolumes", "AcdcSlices", "AcdcVolumes", "IsicImages", "IsicVolumes", "MaskFolder",
        "MaskFolderVolumes", "NiftiSlices", "NiftiVolumes",
    }  # fmt: skip
    for kind in kinds:
        root = next(root for name, root in roots.items() if kind.startswith(name))
        dataset = DATASETS.build(dict(type=f"vision_ssm.{kind}", root=str(root)))
        assert len(dataset) and set(dataset.metainfo) == {"classes", "palette"} and kind in repr(dataset)
        assert set(dataset[0]) in ({"volume"}, {"image", "mask", "case", "index"})
        with pytest.raises(TypeError):
            DATASETS.build(dict(type=f"vision_ssm.{kind}", root=str(root), splitt="train"))
        assert not check_dataset(dataset, full=False).problems
    with pytest.raises(ValueError, match="unknown classes 'synapsi'. Did you mean 'synapse'"):
        SynapseSlices(roots["Synapse"], classes="synapsi")
    for classes in (("background",), ("a", "a")):
        with pytest.raises(ValueError, match="at least two different names"):
            SynapseSlices(roots["Synapse"], classes=classes)
    assert len(set(class_palette(30))) == 30
    with pytest.raises(TypeError, match="expected a medical data set"):
        check_dataset(_Two())


class _Two:
    num_classes, classes = 2, ("a", "b")

    def __len__(self):
        return 1


@pytest.mark.parametrize("policy", ["synapse", "isic", "msvmunet", "none"])
def test_augmentation_depends_on_the_draw_alone(tmp_path, policy):
    dataset = SynapseSlices(synapse(tmp_path / "s"), transform=dict(policy=policy, size=20))

    def epoch(workers: int, start: int = 0) -> list[dict]:
        sampler = EpochSampler(dataset, seed=3)
        sampler.set_epoch(1)
        return list(DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=workers))

    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    alone = epoch(0)
    assert np.array_equal(np.random.get_state()[1], state)  # the global generator is as it was
    for one, other in zip(alone, epoch(2)):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["mask"], other["mask"])
    results = [dataset[Draw(0, (0, 0, position))] for position in range(12)]
    assert all(item["image"].shape == (1, 20, 20) and item["mask"].shape == (20, 20) for item in results)
    assert all(item["mask"].dtype == torch.int64 and 0 <= item["mask"].min() <= item["mask"].max() < 9 for item in results)
    assert same(results[4], dataset[Draw(0, (0, 0, 4))])
    assert policy == "none" or not all(same(results[0], item) for item in results)


def test_image_and_mask_move_together():
    y, x = np.indices((40, 40))
    mask = (np.hypot(y - 14, x - 24) < 9).astype(np.int64) * 2
    image = np.stack([mask / 2, 1 - mask / 2]).astype(np.float32)
    quiet = dict(noise=0, blur=0, contrast=(1, 1), most=10)
    # each interpolation may move the border by a part of a pixel; apart they would differ in a tenth of the picture
    for policy, options in (("synapse", {}), ("isic", {}), ("msvmunet", quiet)):
        transform = medical_transform(policy, size=40, **options)
        moved = 0
        for seed in range(40):
            np.random.seed(seed)
            picture_, labels_ = transform(image, mask)
            assert picture_.shape == image.shape and set(np.unique(labels_)) <= {0, 2}
            assert ((picture_[0] > 0.5) != (labels_ == 2)).mean() < 0.035
            moved += not np.array_equal(labels_, mask)
        assert moved > 20, policy


def test_augmentations_follow_the_papers():
    image, mask = picture(0, (1, 16, 16)), labels(0, (16, 16)).astype(np.int64)
    images = np.stack([image[0], mask / 8.0]).astype(np.float32)
    turns = [np.rot90(images, k, axes=(1, 2)) for k in range(4)]
    turned = [np.flip(turn, axis) for turn in turns for axis in (1, 2)]
    np.random.seed(1)
    transform = medical_transform("synapse", size=16)
    found = [transform(images, mask) for _ in range(400)]
    exact = sum(any(np.array_equal(result, option) for option in turned) for result, _ in found)
    same_ = sum(np.array_equal(result, images) for result, _ in found)
    assert 160 < exact < 250 and 70 < same_ < 140  # 1/2 turned, 1/4 as it was, 1/4 rotated by a few degrees
    assert all(np.array_equal(np.rint(8 * result[1]), labels_) for result, labels_ in found)
    fixed = medical_transform("isic", size=16, angle=90.0)
    options = [np.rot90(flip(images), k, axes=(1, 2)) for k in (0, 1) for flip in (
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[:, :, ::-1], lambda a: a[:, ::-1, ::-1])]
    results = [fixed(images, mask) for _ in range(60)]
    hits = [sum(np.allclose(result, option) for result, _ in results) for option in options]
    assert sum(hits) == 60 and min(hits) > 0
    assert all(np.array_equal(medical_transform("msvmunet", size=16, most=0)(image, mask)[0], image) for _ in range(9))
    noisy = [medical_transform("msvmunet", size=16, most=10)(image, mask)[0] for _ in range(6)]
    assert max(np.abs(result).max() for result in noisy) > 2  # the published noise drowns slices in [0, 1]
    np.random.seed(0)
    large = medical_transform("none", size=32)(image, mask)
    assert large[0].shape == (1, 32, 32) and np.array_equal(large[1][::31, ::31], mask[::15, ::15])


BAD_TRANSFORMS = [
    (dict(policy="synapze"), ValueError, "Did you mean 'synapse'"),
    (dict(policy="isic", sizes=3), TypeError, "sizes"),
    (dict(size=0), ValueError, "size must be a positive integer"),
    (dict(policy="synapse", degrees=0), ValueError, "degrees must be at least 1"),
    (dict(policy="msvmunet", noise=-1), ValueError, "noise must not be negative"),
]


@pytest.mark.parametrize("options, error, message", BAD_TRANSFORMS)
def test_transforms_say_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        medical_transform(**options)


def test_splits_are_fixed(tmp_path):
    cases = [f"case{number:02d}_slice{part}" for number in range(10) for part in range(3)]
    split = draw_split(cases, val=0.2, test=0.1, group=r"(case\d+)")
    patients = {part: {case[:6] for case in names} for part, names in split.items()}
    assert [len(split[part]) for part in ("train", "val", "test")] == [21, 6, 3]
    assert sum(map(len, patients.values())) == 10  # no patient is in two parts
    assert split == draw_split(cases[::-1], val=0.2, test=0.1, group=r"(case\d+)") != draw_split(cases, seed=1)
    folds = draw_folds(cases, 4, group=r"case\d+")
    assert sorted(case for fold in folds for case in fold["val"]) == cases
    assert all(sorted(fold["train"] + fold["val"]) == cases for fold in folds)
    file = tmp_path / "made" / "splits.json"
    chosen = fixed_split(file, cases, "val", fold=2, folds=4, group=r"case\d+")
    assert chosen == folds[2]["val"] and read_splits(file) == folds
    assert fixed_split(file, cases, "val", fold=2, seed=7) == chosen  # the file decides, not the seed
    assert fixed_split(file, cases, "all") == cases
    with pytest.raises(MedicalDataError, match=r"names 1 cases that are not there: case00_slice0 and does not name 1"):
        fixed_split(file, [*cases[1:], "new"], "val")
    for options, message in ((dict(fold=4), "has 4 folds"), (dict(folds=5), "has 4 folds")):
        with pytest.raises(MedicalDataError, match=message):
            fixed_split(file, cases, "val", **options)
    with pytest.raises(MedicalDataError, match="no part 'test'"):
        fixed_split(file, cases, "test")
    (tmp_path / "file").write_text("")
    with pytest.raises(MedicalDataError, match="cannot write the split file"):
        fixed_split(tmp_path / "file" / "splits.json", cases, "val")


BAD_SPLITS = [
    ("{", "cannot read the split file"), ("{}", "is no split file"), ("[]", "is no split file"),
    ('[{"train": ["a"]}]', "is no split file"), ('[{"train": [1], "val": []}]', "is no split file"),
    ('[{"train": ["a", "b"], "val": ["b"]}]', "fold 0: case 'b' is in 'train' and in 'val'"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", BAD_SPLITS)
def test_split_files_that_are_none(tmp_path, text, message):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(MedicalDataError, match=message):
        fixed_split(tmp_path / "splits.json", ["a", "b"], "val")


BAD_DRAWS = [
    (lambda: draw_split(["a", "a", "b"]), MedicalDataError, "named twice: a"),
    (lambda: draw_split(["a"]), MedicalDataError, "too few"),
    (lambda: draw_split(["a", "b", "c"], val=0.6, test=0.5), ValueError, "sum below 1"),
    (lambda: draw_split(["a", "b"], group="case"), MedicalDataError, "does not fit the case 'a'"),
    (lambda: draw_folds(["a", "b"], 1), ValueError, "at least 2 folds"),
    (lambda: draw_folds(["a", "b"], 3), MedicalDataError, "cannot be divided into 3 folds"),
]


@pytest.mark.parametrize("draw, error, message", BAD_DRAWS)
def test_splits_that_cannot_be_drawn(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_check_medical_says_what_it_cannot_do(tmp_path):
    for root, layout, options, message in (
        (tmp_path, "synapses", {}, "unknown layout 'synapses'. Did you mean 'synapse'"),
        (tmp_path / "no", "synapse", {}, "does not exist"),
        (tmp_path, "isic", dict(splits=["trian"]), "no split 'trian' here. Did you mean 'train'"),
        (tmp_path, "nifti", {}, "no dataset.json"),
    ):
        with pytest.raises(MedicalDataError, match=message):
            check_medical(root, layout, **options)
    reports = check_medical(isic(tmp_path / "i"), "isic")
    assert [report.images for report in reports] == [3, 2] and reports[0].counts == {"background": 2880, "lesion": 720}
    assert reports[0].facts["intensities"] == "0 to 255"
    (report,) = check_medical(nifti(tmp_path / "n"), "nifti", num_classes=4)
    assert report.warnings == ["train: 1 of 4 classes occur in no mask: label 3"]
    assert report.facts["spacing D, H, W (mm)"] == "5 to 5, 1.5 to 1.5, 1.5 to 1.5"

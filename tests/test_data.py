"""Images, data sets, transforms, samplers and collation."""

import itertools
import pickle
import random
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Subset

from vision_ssm.data import (
    Draw,
    EpochSampler,
    ImageFolder,
    RepeatedAugmentSampler,
    UnreadableImageError,
    build_transform,
    check_same_classes,
    collate,
    image_folder,
    load_image,
    read_header,
    samplers,
    seeded,
    transform_settings,
)
from vision_ssm.engine.loops import remaining_batches

TRAIN = dict(
    train=True, input_size=32, auto_augment="rand-m9-mstd0.5-inc1", erasing_prob=0.5, erasing_count=2,
    color_jitter=None, vflip=0.3,
)


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """(height, width, 3) uint8: smooth colours with some noise."""
    generator = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width))[..., None] + generator.integers(0, 120, 3)
    return (ramp + generator.integers(0, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(0) if pixels is None else pixels).save(path, **options)
    return path


def cut(path: Path, keep: float = 0.5) -> Path:
    """Drop the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clean data folder: train and val with three classes of five images."""
    root = tmp_path_factory.mktemp("images")
    for split, name, number in itertools.product(("train", "val"), ("ant", "bee", "cow"), range(5)):
        write(root / split / name / f"{number}.png", picture(hash_of(split, name, number)))
    return root


def hash_of(split: str, name: str, number: int) -> int:
    return sum(map(ord, split + name)) * 10 + number


# ---------------------------------------------------------------- decoding

def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 127, 129, 256], [257, 32768, 65278, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_image(tmp_path / name))
        assert pixels.shape == (2, 4, 3) and pixels.dtype == np.uint8
        assert (pixels[..., 0] == [[0, 0, 1, 1], [1, 128, 254, 255]]).all()
        assert (pixels == pixels[..., :1]).all()


def test_thirty_two_bit_integers_are_read_as_sixteen_bit_if_they_fit(tmp_path):
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "fits.tif")
    assert np.asarray(load_image(tmp_path / "fits.tif", channels=1)).tolist() == [[0, 255]]
    Image.fromarray(np.array([[0, 65536]], dtype=np.int32)).save(tmp_path / "beyond.tif")
    with pytest.raises(UnreadableImageError, match="beyond.tif.*integer pixels from 0 to 65536 do not fit 16 bits"):
        load_image(tmp_path / "beyond.tif")


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match="float.tif.*no agreed range; convert the file to 8 or 16 bit"):
        load_image(tmp_path / "float.tif")


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 200, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.asarray(load_image(tmp_path / "rgba.png")).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 204, 244]]]

    grey = np.array([[[40, 255], [40, 0]]], dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "la.png")
    assert np.asarray(load_image(tmp_path / "la.png", channels=1)).tolist() == [[40, 255]]

    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png")
    assert np.asarray(load_image(tmp_path / "palette.png")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    palette.save(tmp_path / "hole.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "hole.png")).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]

    Image.fromarray(rgba[..., :3]).save(tmp_path / "key.png", transparency=(0, 0, 200))
    assert np.asarray(load_image(tmp_path / "key.png"))[0, 2].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path):
    colours = {(0, 255, 255, 0): (255, 0, 0), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255)}
    for ink, colour in colours.items():
        Image.new("CMYK", (16, 16), ink).save(tmp_path / "cmyk.jpg", quality=95)
        with Image.open(tmp_path / "cmyk.jpg") as stored:
            assert stored.mode == "CMYK"
        assert np.abs(np.asarray(load_image(tmp_path / "cmyk.jpg")).astype(int) - colour).max() <= 3


def test_grey_black_and_white_and_luma(tmp_path):
    Image.new("1", (4, 2), 1).save(tmp_path / "binary.png")
    assert (np.asarray(load_image(tmp_path / "binary.png")) == 255).all()
    Image.new("L", (4, 2), 77).save(tmp_path / "grey.png")
    assert (np.asarray(load_image(tmp_path / "grey.png")) == 77).all()
    Image.new("RGB", (4, 2), (100, 200, 50)).save(tmp_path / "colour.png")
    grey = load_image(tmp_path / "colour.png", channels=1)
    assert grey.mode == "L" and grey.getpixel((0, 0)) == round(0.299 * 100 + 0.587 * 200 + 0.114 * 50)
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"):
        load_image(tmp_path / "colour.png", channels=4)


UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    pixels = picture(1, 5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), UPRIGHT[orientation](pixels))


def test_damaged_exif_does_not_lose_the_image(tmp_path):
    write(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow mentions the damage
        assert load_image(tmp_path / "a.jpg").size == (48, 40)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_damaged_files_raise_one_kind_of_error(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}")
    good = path.read_bytes()
    generator = random.Random(ending)
    with pytest.raises(UnreadableImageError, match=f"cannot read image .*a.{ending}"):
        load_image(cut(path))
    for trial in range(60):
        damaged = bytearray(good[: generator.randrange(len(good))] if trial % 3 == 0 else good)
        for _ in range(generator.randrange(1, 8) if damaged else 0):
            damaged[generator.randrange(min(len(damaged), 400))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_image(path).mode == "RGB"
        except UnreadableImageError:
            pass


def test_header_without_decoding(tmp_path):
    path = cut(write(tmp_path / "a.jpg"), keep=0.9)
    assert read_header(path) == ((40, 48), "RGB", "JPEG")
    with pytest.raises(UnreadableImageError, match="absent.jpg"):
        read_header(tmp_path / "absent.jpg")


# ---------------------------------------------------------------- the data set

def test_layout(tmp_path):
    write(tmp_path / "val" / "zebra" / "deep" / "er" / "1.PNG")
    write(tmp_path / "val" / "zebra" / "0.JpEg")
    write(tmp_path / "val" / "Ape" / "b.tiff")
    write(tmp_path / "val" / "Ape" / ".hidden.png")
    write(tmp_path / "val" / ".cache" / "c.png")
    (tmp_path / "val" / "Ape" / "notes.txt").write_text("not an image")
    (tmp_path / "val" / "zebra" / "loop").symlink_to(tmp_path / "val" / "zebra")
    dataset = ImageFolder(tmp_path, "val")
    assert dataset.classes == ("Ape", "zebra") and dataset.metainfo == dict(classes=("Ape", "zebra"))
    assert dataset.class_to_index == {"Ape": 0, "zebra": 1}
    assert dataset.labels.tolist() == [0, 1, 1] and len(dataset) == 3
    relative = [Path(dataset.path(index)).relative_to(tmp_path / "val").as_posix() for index in range(3)]
    assert relative == ["Ape/b.tiff", "zebra/0.JpEg", "zebra/deep/er/1.PNG"]
    assert ImageFolder(tmp_path / "val").labels.tolist() == [0, 1, 1]
    assert "3 images, 2 classes" in repr(dataset)


def test_samples(folder):
    dataset = ImageFolder(folder, "train")
    sample = dataset[7]
    assert sample["path"] == str(folder / "train" / "bee" / "2.png")
    assert type(sample["label"]) is int and sample["label"] == 1
    assert sample["image"].dtype == torch.float32
    expected = torch.from_numpy(picture(hash_of("train", "bee", 2))).permute(2, 0, 1) / 255  # (H, W, C) -> (C, H, W)
    assert torch.equal(sample["image"], expected)
    assert torch.equal(dataset[-8]["image"], expected) and torch.equal(dataset[np.int64(7)]["image"], expected)
    assert ImageFolder(folder, "train", channels=1)[7]["image"].shape == (1, 40, 48)
    for index in (15, -16):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 15 images"):
            dataset[index]


def test_chosen_classes(folder):
    dataset = ImageFolder(folder, "train", classes=["cow", "ant"])
    assert dataset.classes == ("cow", "ant") and dataset.labels.tolist() == [0] * 5 + [1] * 5
    assert dataset[0]["path"].endswith("cow/0.png")
    with pytest.raises(ValueError, match="no folder for class 'bees'. Did you mean 'bee'.*allow_empty_classes=True"):
        ImageFolder(folder, "train", classes=["ant", "bees"])
    padded = ImageFolder(folder, "train", classes=["ant", "bees"], allow_empty_classes=True)
    assert padded.classes == ("ant", "bees") and padded.labels.tolist() == [0] * 5
    with pytest.raises(ValueError, match="classes holds 'ant' more than once"):
        ImageFolder(folder, "train", classes=["ant", "bee", "ant"])
    with pytest.raises(TypeError, match="classes must be a list of names, got the string 'ant'"):
        ImageFolder(folder, "train", classes="ant")


def test_missing_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no 'imagez' in .* Did you mean 'images0?'"):
        ImageFolder(folder.parent / "imagez", "train")
    with pytest.raises(FileNotFoundError, match="there is no 'vall' in .* Did you mean 'val'?"):
        ImageFolder(folder, "vall")
    with pytest.raises(FileNotFoundError, match="there is no 'nothing' in .*holds no folder at all"):
        ImageFolder(tmp_path / "nothing" / "below", "train")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file' is a file, not a folder"):
        ImageFolder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file' is a file, not a folder"):
        ImageFolder(tmp_path / "file", "train")


def test_folders_that_hold_something_else(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' is empty: expected one folder per class"):
        ImageFolder(tmp_path, "empty")
    write(tmp_path / "flat" / "1.png")
    write(tmp_path / "flat" / "2.png")
    with pytest.raises(ValueError, match="holds 2 images but no class folders: expected one folder .*ann_file"):
        ImageFolder(tmp_path, "flat")
    with pytest.raises(ValueError, match="holds the splits 'train', 'val', not classes: choose one, split='train'"):
        ImageFolder(folder)
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no image in the 1 class folders of .*texts.*looked for \.bmp, .*\.jpeg"):
        ImageFolder(tmp_path, "texts", allow_empty_classes=True)


def test_class_folder_without_an_image(tmp_path):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "c" / "1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="class folder without an image in .*: 'b' .*allow_empty_classes=True"):
        ImageFolder(tmp_path)
    dataset = ImageFolder(tmp_path, allow_empty_classes=True)
    assert dataset.classes == ("a", "b", "c") and dataset.labels.tolist() == [0, 2]


def test_number_of_classes(folder):
    dataset = ImageFolder(folder, "train")
    dataset.check_num_classes(3)
    dataset.check_num_classes(1000)
    with pytest.raises(
        ValueError, match=r"labels out of range: .* 3 classes .* up to 2 \('cow'\).*num_classes=2 .* Set num_classes=3"
    ):
        dataset.check_num_classes(2)


def test_same_classes(folder, tmp_path):
    train = ImageFolder(folder, "train")
    check_same_classes(train, ImageFolder(folder, "val"))
    write(tmp_path / "val" / "ant" / "1.png")
    write(tmp_path / "val" / "dog" / "1.png")
    with pytest.raises(
        ValueError, match="(?s)same classes.*3 and 2.*train': 'bee', 'cow'; only in .*val': 'dog'.*classes="
    ):
        check_same_classes(train, ImageFolder(tmp_path, "val"))
    with pytest.raises(ValueError, match="the names are the same, in another order"):
        check_same_classes(train, ImageFolder(folder, "val", classes=["bee", "ant", "cow"]))


def test_small_images_are_named(tmp_path):
    write(tmp_path / "a" / "1.png", picture(0, 32, 32))
    small = write(tmp_path / "a" / "2.png", picture(0, 60, 31))
    with pytest.raises(ValueError, match=r"a/2\.png' is 60 x 31 pixels \(height x width\), smaller than .* of 32"):
        ImageFolder(tmp_path, min_size=32)
    assert len(ImageFolder(tmp_path, min_size=31)) == 2
    small.unlink()
    dataset = ImageFolder(tmp_path, min_size=32)
    write(tmp_path / "a" / "1.png", picture(0, 16, 40))
    with pytest.raises(ValueError, match=r"a/1\.png' is 16 x 40 pixels"):
        dataset[0]


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """Class a: 0 good, 1 cut PNG, 2 cut JPEG; class b: 0 no image at all, 1 good."""
    write(tmp_path / "a" / "0.png", picture(1))
    cut(write(tmp_path / "a" / "1.png", picture(2)))
    cut(write(tmp_path / "a" / "2.jpg", picture(3)), keep=0.9)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes(b"")
    write(tmp_path / "b" / "1.png", picture(4))
    return tmp_path


def test_unreadable_files_are_replaced_and_counted(damaged):
    dataset = ImageFolder(damaged)
    assert dataset.skipped == 0 and dataset.skip_report() == ""
    with pytest.warns(UserWarning) as record:
        samples = [dataset[index] for index in range(5)] + [dataset[1]]
    assert len(record) == 1
    assert f"cannot read image {str(damaged / 'a' / '1.png')!r}" in str(record[0].message)
    assert "counted without a warning" in str(record[0].message)
    last = str(damaged / "b" / "1.png")
    assert [sample["path"] for sample in samples] == [str(damaged / "a" / "0.png")] + [last] * 5
    assert [sample["label"] for sample in samples] == [0, 1, 1, 1, 1, 1]
    assert dataset.skipped == 3
    assert dataset.skipped_paths() == [str(damaged / name) for name in ("a/1.png", "a/2.jpg", "b/0.png")]
    assert dataset.skip_report().startswith("3 of 5 files of") and "a/1.png" in dataset.skip_report()


def test_the_last_file_is_replaced_by_the_first(damaged):
    cut(damaged / "b" / "1.png")
    with pytest.warns(UserWarning, match="b/1.png"):
        assert ImageFolder(damaged)[4]["path"] == str(damaged / "a" / "0.png")


def test_strict_names_the_unreadable_file(damaged):
    dataset = ImageFolder(damaged, strict=True)
    with pytest.raises(UnreadableImageError, match=r"cannot read image .*a/2\.jpg.*truncated"):
        dataset[2]
    with pytest.raises(UnreadableImageError, match=r"a/1\.png"):
        list(DataLoader(dataset, num_workers=1, collate_fn=collate))


def test_nothing_but_unreadable_files(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning), pytest.raises(UnreadableImageError, match="3 files in a row .*_data.py check"):
        ImageFolder(tmp_path)[0]


def test_unreadable_files_of_workers_are_counted(damaged):
    dataset = ImageFolder(damaged, transform=dict(train=False, input_size=32))
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate))
    assert [batch["label"].tolist() for batch in batches] == [[0, 1], [1, 1], [1]]
    assert dataset.skipped == 3


def annotated(folder: Path, tmp_path: Path, text: str, **options) -> ImageFolder:
    (tmp_path / "list.txt").write_bytes(text.encode())
    return ImageFolder(folder, "train", ann_file=tmp_path / "list.txt", **options)


def test_annotation_file(folder, tmp_path):
    write(tmp_path / "data" / "with space.png")
    text = "\ufeffcow/1.png 1\r\n\r\n./ant/0.png   0\r\ncow/1.png 1\n"
    dataset = annotated(folder, tmp_path, text)
    assert [Path(dataset.path(index)).name for index in range(len(dataset))] == ["1.png", "0.png"]
    assert dataset.labels.tolist() == [1, 0] and dataset.classes == ("0", "1")
    assert annotated(folder, tmp_path, "ant/0.png A\nbee/0.png 1\n", classes=["A", "B"]).labels.tolist() == [0, 1]
    (tmp_path / "data" / "list.txt").write_text("with space.png 0\n")
    assert ImageFolder(tmp_path / "data", ann_file="list.txt")[0]["path"] == str(tmp_path / "data" / "with space.png")
    assert annotated(folder, tmp_path, "ant/0.png 2", allow_empty_classes=True).classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ant/0.png 0\nant/1.png\n", {}, r"list.txt, line 2: expected 'relative/path label', got 'ant/1.png'"),
        ("ant/0.png cat\n", {}, "line 1: label 'cat' is not a number from 0"),
        ("ant/0.png -1\n", {}, "line 1: label '-1' is not a number from 0"),
        ("ant/0.png aunt\n", dict(classes=["ant", "bee"]), "label 'aunt' .*of the 2 classes. Did you mean 'ant'"),
        ("\nant/0.png 2\n", dict(classes=["a", "b"]), r"line 2: label 2 is out of range for 2 classes \(0 to 1\)"),
        ("/etc/x.png 0\n", {}, "line 1: '/etc/x.png' is absolute"),
        ("ant/0.png 0\nant/0.png 1\n", {}, "line 2: 'ant/0.png' has label 1, but label 0 in line 1"),
        ("ant/0.png 1\n", {}, "has no image of class '0'. Pass allow_empty_classes=True"),
        (" \n", {}, "list.txt' is empty: expected lines"),
    ],
)
def test_annotation_file_with_errors(folder, tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        annotated(folder, tmp_path, text, **options)


def test_annotation_file_or_its_images_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="line 2: 'ant/9.png' does not exist in .*train"):
        annotated(folder, tmp_path, "ant/0.png 0\nant/9.png 0\n")
    with pytest.raises(FileNotFoundError, match="line 1: 'aunt/0.png' does not exist"):
        annotated(folder, tmp_path, "aunt/0.png 0\n")
    with pytest.raises(FileNotFoundError, match="annotation file 'absent.txt' exists neither in"):
        ImageFolder(folder, "train", ann_file="absent.txt")
    (tmp_path / "binary.txt").write_bytes(struct.pack("<4I", *[0xFFFE8090] * 4))
    with pytest.raises(ValueError, match="binary.txt' is not UTF-8 text"):
        ImageFolder(folder, "train", ann_file=tmp_path / "binary.txt")


def test_wrong_options(folder):
    with pytest.raises(TypeError, match="ImageFolder got unknown keyword 'strikt'.*Did you mean 'strict'.*ann_file"):
        ImageFolder(folder, "train", strikt=True)
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"):
        ImageFolder(folder, "train", channels=2)
    with pytest.raises(ValueError, match="the transform is for 1 channels, the dataset reads 3: write channels=1"):
        ImageFolder(folder, "train", transform=dict(train=False, channels=1))


def test_pickled_and_spawned_workers_see_the_same(folder):
    dataset = ImageFolder(folder, "train", transform=TRAIN)
    copy = pickle.loads(pickle.dumps(dataset))
    draw = Draw(3, (0, 1, 2))
    assert torch.equal(copy[draw]["image"], dataset[draw]["image"])
    sampler = EpochSampler(dataset, seed=4)
    loader = DataLoader(
        dataset, batch_size=15, sampler=sampler, num_workers=1, collate_fn=collate, multiprocessing_context="spawn",
    )
    assert torch.equal(next(iter(loader))["image"], torch.stack([dataset[draw]["image"] for draw in sampler]))


# ---------------------------------------------------------------- transforms

def checker(mode: str = "RGB", height: int = 24, width: int = 24) -> Image.Image:
    return Image.fromarray(picture(5, height, width)).convert(mode)


def test_evaluation_normalises_and_crops():
    image = Image.new("RGB", (64, 64), (51, 102, 204))
    tensor = build_transform(False, 32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))(image)
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
    assert torch.allclose(tensor.mean((1, 2)), torch.tensor([0.2, 0.8, 0.5]), atol=1e-6)
    whole = build_transform(False, 24, crop_pct=1.0, mean=0, std=1)(checker())
    assert torch.equal(whole, torch.from_numpy(picture(5, 24, 24)).permute(2, 0, 1) / 255)  # (H, W, C) -> (C, H, W)
    wide = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (20, 1)))
    centre = build_transform(False, 20, crop_pct=1.0, channels=1, mean=0, std=1)(wide)[0, 0] * 255
    assert torch.equal(centre.round(), torch.arange(80.0, 160.0, 4))
    squashed = build_transform(False, (20, 30), crop_pct=1.0, crop_mode="squash", channels=1, mean=0, std=1)(wide)
    assert squashed.shape == (1, 20, 30) and squashed[0, 0, 0] * 255 < 4 and squashed[0, 0, -1] * 255 > 232
    bordered = build_transform(False, 20, crop_pct=1.0, crop_mode="border", channels=1, mean=0.5, std=1)(wide)
    assert torch.allclose(bordered[0, 0], torch.zeros(20), atol=0.01)


@pytest.mark.parametrize("options", [dict(policy="none"), dict(scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=None)])
def test_training_without_augmentation_is_the_image(options):
    tensor = build_transform(True, 24, mean=0, std=1, **options)(checker())
    assert torch.equal(tensor, build_transform(False, 24, crop_pct=1.0, mean=0, std=1)(checker()))


@pytest.mark.parametrize(
    ("policy", "rest"),
    [
        ("imagenet", dict(scale=(1, 1), ratio=(1, 1), color_jitter=None)),
        ("small", dict(rotation=0, zoom=(1, 1), padding=0)),
    ],
)
def test_flips_and_erasing(policy, rest):
    plain = build_transform(False, 24, crop_pct=1.0)(checker())
    rest = dict(policy=policy, **rest)
    assert torch.equal(build_transform(True, 24, **rest | dict(hflip=1.0))(checker()), plain.flip(-1))
    assert torch.equal(build_transform(True, 24, **rest | dict(hflip=0, vflip=1.0))(checker()), plain.flip(-2))
    erased = build_transform(True, 24, **rest | dict(hflip=0, erasing_prob=1.0, erasing_mode="const"))(checker())
    hole = (erased == 0).all(0)
    assert 6 <= hole.sum() <= 24 * 24 // 2 and torch.equal(erased[:, ~hole], plain[:, ~hole])
    noisy = build_transform(True, 24, **rest | dict(hflip=0, erasing_prob=1.0, erasing_mode="pixel"))(checker())
    changed = (noisy != plain).any(0)
    assert 6 <= changed.sum() <= 24 * 24 // 2 and noisy[:, changed].unique().numel() > 20


def test_colour_options():
    image = checker()
    rest = dict(scale=(1, 1), ratio=(1, 1), hflip=0, mean=0, std=1)
    plain = build_transform(True, 24, color_jitter=None, **rest)(image)
    assert not torch.equal(build_transform(True, 24, color_jitter=0.9, **rest)(image), plain)
    assert torch.equal(build_transform(True, 24, color_jitter=0.9, color_jitter_prob=0.0, **rest)(image), plain)
    grey = build_transform(True, 24, color_jitter=None, grayscale_prob=1.0, **rest)(image)
    assert torch.equal(grey[0], grey[1]) and not torch.equal(plain[0], plain[1])
    blur = build_transform(True, 24, color_jitter=None, gaussian_blur_prob=1.0, **rest)
    assert min(blur(image).diff().abs().mean() for _ in range(10)) < 0.9 * plain.diff().abs().mean()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("auto_augment", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4-d2", "3a"])
def test_policies_work_on_colour_and_grey(mode, auto_augment):
    channels = 3 if mode == "RGB" else 1
    transform = build_transform(
        True, (32, 48), channels=channels, auto_augment=auto_augment, interpolation="random", erasing_prob=0.5,
    )
    tensors = [transform(checker(mode, 40, 60)) for _ in range(40)]
    assert all(tensor.shape == (channels, 32, 48) and tensor.isfinite().all() for tensor in tensors)
    assert len({tensor.sum().item() for tensor in tensors}) == 40


@pytest.mark.parametrize("auto_augment", ["rand-m10-inc1", "rand-m10-inc1-tweights", "original-mstd3", "augmix-m10"])
def test_largest_magnitude(auto_augment):
    transform = build_transform(True, 16, auto_augment=auto_augment, color_jitter=None, mean=0, std=1)
    tensors = [transform(checker()) for _ in range(200)]
    assert all(tensor.isfinite().all() for tensor in tensors)
    if auto_augment == "rand-m10-inc1":
        assert any((tensor == 0).all() for tensor in tensors)  # posterised to no bits


def test_small_images_are_shifted_not_cut():
    image = Image.new("L", (16, 16))
    image.putpixel((8, 8), 255)
    transform = build_transform(True, 16, policy="small", channels=1, mean=0, std=1, rotation=0, zoom=(1, 1), padding=3)
    places = {tuple(transform(image)[0].nonzero()[0].tolist()) for _ in range(600)}
    assert places == set(itertools.product(range(5, 12), repeat=2))
    turned = build_transform(True, 16, policy="small", channels=1, mean=0, std=1, rotation=30, padding=0, fill=255)
    assert max(turned(Image.new("L", (16, 16)))[0, 0, 0].item() for _ in range(50)) > 0.5


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        (True, dict(hflipp=1), TypeError, "train_transform got unknown keyword 'hflipp'.*Did you mean 'hflip'"),
        (False, dict(hflip=1), TypeError, "eval_transform got unknown keyword 'hflip'.*Valid keywords: .*crop_pct"),
        (True, dict(policy="small", scale=(1, 1)), TypeError, "small_image_transform got unknown keyword 'scale'"),
        (True, dict(policy="smal"), ValueError, "unknown policy 'smal'. Did you mean 'small'.*imagenet, small, none"),
        (False, dict(policy="none"), ValueError, "policy 'none' belongs to training"),
        (False, dict(crop_mode="centre"), ValueError, "unknown crop_mode 'centre'. Did you mean 'center'"),
        (False, dict(crop_pct=0), ValueError, "crop_pct must be above 0 and at most 1, got 0"),
        (False, dict(interpolation="cubic"), ValueError, "unknown interpolation 'cubic'. Did you mean 'bicubic'"),
        (False, dict(interpolation="random"), ValueError, "unknown interpolation 'random'"),
        (True, dict(erasing_mode="noise"), ValueError, "unknown erasing_mode 'noise'.* Valid: pixel, rand, const"),
        (True, dict(erasing_prob=25), ValueError, "erasing_prob is a probability between 0 and 1, got 25"),
        (True, dict(erasing_count=0), ValueError, "erasing_count must be at least 1, got 0"),
        (True, dict(hflip=-0.1), ValueError, "hflip is a probability between 0 and 1, got -0.1"),
        (True, dict(scale=(1, 0.5)), ValueError, r"scale must be a pair \(low, high\) with 0 < low <= high"),
        (True, dict(color_jitter=(1, 2)), ValueError, r"color_jitter must be one strength.* got \(1, 2\)"),
        (True, dict(auto_augment="random"), ValueError, "timm cannot read auto_augment 'random'.*'rand-m9-mstd0.5"),
        (True, dict(policy="small", padding=32), ValueError, r"padding must be .* than the image \(32 pixels\)"),
        (True, dict(policy="small", rotation=-1), ValueError, "rotation and shear are largest angles in degrees"),
        (True, dict(policy="small", padding_mode="wrap"), ValueError, "unknown padding_mode 'wrap'"),
        (True, dict(mean=(1, 2)), ValueError, "mean has 2 values, the images have 3 channels"),
        (True, dict(channels=1, std=(1, 2, 3)), ValueError, "std has 3 values, the images have 1 channels"),
        (True, dict(std=0), ValueError, "std must be positive"),
        (True, dict(channels=2), ValueError, r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        (True, dict(input_size=(1, 2, 3)), ValueError, "input_size must be a positive integer or a pair"),
        (True, dict(input_size=0), ValueError, "input_size must be a positive integer or a pair"),
    ],
)
def test_wrong_transform_options(train, options, error, message):
    with pytest.raises(error, match=message):
        build_transform(train, **{"input_size": 32, **options})


def test_settings_of_a_model():
    config = dict(
        input_size=(3, 256, 192), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), interpolation="bilinear", crop_pct=0.9
    )
    settings = transform_settings(SimpleNamespace(pretrained_cfg=config))
    assert settings == dict(config, input_size=(256, 192), channels=3, crop_mode="center")
    assert build_transform(False, **settings)(checker("RGB", 300, 300)).shape == (3, 256, 192)
    grey = transform_settings(config, channels=1)
    assert grey["mean"] == pytest.approx((0.4,)) and grey["std"] == pytest.approx((0.2,))
    assert build_transform(False, **grey)(checker("L", 300, 300)).shape == (1, 256, 192)
    assert transform_settings({})["mean"] == (0.485, 0.456, 0.406)
    with pytest.raises(TypeError, match="expected a model with a pretrained_cfg.* got Linear"):
        transform_settings(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- samplers

def pretend(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(samplers, "get_dist_info", lambda: (rank, world_size))


def coordinates(draws) -> list[tuple]:
    return [(int(draw), draw.coordinates) for draw in draws]


def test_order_depends_on_seed_and_epoch_only():
    sampler = EpochSampler(range(50), seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first != sorted(first)
    assert coordinates(sampler) == coordinates(first) == coordinates(EpochSampler(range(50), seed=3))
    orders = {tuple(first)}
    for seed, epoch in ((3, 1), (4, 0), (2, 1)):
        other = EpochSampler(range(50), seed=seed)
        other.set_epoch(epoch)
        orders.add(tuple(other))
    assert len(orders) == 4
    assert list(EpochSampler(range(5), shuffle=False)) == list(range(5))
    assert isinstance(EpochSampler(range(5)).seed, int)


def test_processes_share_an_epoch(monkeypatch):
    whole = coordinates(EpochSampler(range(11), seed=1))
    parts, uneven = [], []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        parts.append(EpochSampler(range(11), seed=1))
        uneven.append(EpochSampler(range(11), seed=1, round_up=False))
    assert [len(part) for part in parts] == [4, 4, 4] and [len(part) for part in uneven] == [4, 4, 3]
    dealt = [coordinates(part) for part in parts]
    together = [dealt[position % 3][position // 3] for position in range(12)]
    assert together[:11] == whole and together[11][0] == whole[0][0]
    assert sorted(itertools.chain(*map(coordinates, uneven))) == sorted(whole)


class Sized(list):
    """Images of which nothing but the width and height is known."""

    def get_data_info(self, index: int) -> dict:
        width, height = self[int(index)]
        return dict(width=width, height=height)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_one_aspect_ratio(drop_last):
    """As many as announced, whatever the order; else processes would wait for each other."""
    draw = random.Random(0)
    for _ in range(200):
        images = Sized((draw.choice([3, 5]), 4) for _ in range(draw.randint(1, 30)))
        size = draw.randint(1, 5)
        sampler = samplers.AspectRatioBatchSampler(EpochSampler(images, seed=draw.randint(0, 99)), size, drop_last)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(len(batch) == size for batch in batches[: len(images) // size])
        found = sorted(itertools.chain(*batches))
        assert found == sorted(set(found)) and len(found) == (len(images) // size * size if drop_last else len(images))
        mixed = [batch for batch in batches if len({images[int(index)] for index in batch}) > 1]
        assert len(mixed) <= 2
    with pytest.raises(ValueError, match="batch_size"):
        samplers.AspectRatioBatchSampler(EpochSampler(images), 0)


@pytest.mark.parametrize("kind", [EpochSampler, RepeatedAugmentSampler])
def test_endless(kind):
    sampler, single = kind(range(30), seed=2, endless=True), kind(range(30), seed=2)
    epochs = []
    for epoch in (5, 6, 7):
        single.set_epoch(epoch)
        epochs += coordinates(single)
    sampler.set_epoch(5)
    assert coordinates(itertools.islice(sampler, 90)) == epochs and len(sampler) == 30


def test_wrong_sampler_options():
    with pytest.raises(ValueError, match="cannot sample from an empty dataset"):
        EpochSampler([])
    with pytest.raises(ValueError, match="the seed of a sampler must not be negative, got -1"):
        EpochSampler(range(3), seed=-1)
    with pytest.raises(ValueError, match="num_repeats must be at least 1, got 0"):
        RepeatedAugmentSampler(range(3), num_repeats=0)
    with pytest.raises(ValueError, match="selected_round and selected_ratio must not be negative"):
        RepeatedAugmentSampler(range(3), selected_round=-1)
    with pytest.raises(TypeError, match="RepeatedAugmentSampler got unknown keyword 'repeats'.*num_repeats"):
        RepeatedAugmentSampler(range(3), repeats=3)


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 4), (300, 2), (1030, 3), (257, 1)])
@pytest.mark.parametrize(
    "options", [{}, dict(num_repeats=2), dict(num_repeats=1.5, selected_ratio=1.2, selected_round=64)]
)
def test_repeats_like_timm(monkeypatch, size, world_size, options):
    order = np.array(list(EpochSampler(range(size), seed=9)))
    drawn = []
    for rank in range(world_size):
        pretend(monkeypatch, rank, world_size)
        ours = RepeatedAugmentSampler(range(size), shuffle=False, **options)
        timm = RepeatAugSampler(range(size), world_size, rank, shuffle=False, **options)
        assert list(ours) == list(timm) and len(ours) == len(timm)
        shuffled = RepeatedAugmentSampler(range(size), seed=9, **options)
        assert list(shuffled) == order[list(timm)].tolist()
        drawn += [draw.coordinates for draw in shuffled]
    assert len(set(drawn)) == len(drawn)


def test_draw_is_an_integer():
    draw = pickle.loads(pickle.dumps(Draw(7, (1, 2, 3))))
    assert draw == 7 and draw.coordinates == (1, 2, 3) and [0] * 8 == [*[0] * draw, 0]


# ---------------------------------------------------------------- reproducibility

def loader_of(folder: Path, workers: int, sampler: type = EpochSampler, **options) -> DataLoader:
    dataset = ImageFolder(folder, "train", transform=TRAIN)
    return DataLoader(
        dataset, batch_size=4, sampler=sampler(dataset, seed=1), num_workers=workers, collate_fn=collate,
        persistent_workers=workers > 0, **options,
    )


def epochs_of(loader: DataLoader, epochs) -> list[dict]:
    batches = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        one["path"] == two["path"]
        and torch.equal(one["label"], two["label"])
        and torch.equal(one["image"], two["image"])
        for one, two in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("sampler", [EpochSampler, RepeatedAugmentSampler])
def test_augmentation_depends_on_seed_and_epoch_not_on_workers(folder, sampler):
    batches = epochs_of(loader_of(folder, 0, sampler), (0, 1))
    torch.manual_seed(1)
    random.seed(1)
    assert same(batches, epochs_of(loader_of(folder, 0, sampler), (0, 1)))
    assert same(batches, epochs_of(loader_of(folder, 2, sampler), (0, 1)))
    first, second = (
        dict(zip(itertools.chain(*(batch["path"] for batch in part)), torch.cat([batch["image"] for batch in part]),
                 strict=True))
        for part in (batches[:4], batches[4:])
    )
    common = first.keys() & second.keys()
    assert common and not any(torch.equal(first[path], second[path]) for path in common)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [EpochSampler, RepeatedAugmentSampler])
def test_resuming_in_mid_epoch(folder, workers, sampler):
    unbroken = epochs_of(loader_of(folder, 0, sampler), (0, 1, 2))  # 4 batches per epoch
    resumed = loader_of(folder, workers, sampler)
    resumed.sampler.set_epoch(1)
    rest = list(remaining_batches(resumed, 2))
    assert same(unbroken[4 + 2:], rest + epochs_of(resumed, (2,)))


def test_skipped_samples_are_not_decoded(folder, monkeypatch):
    read = []

    def reading(path: str, channels: int) -> Image.Image:
        read.append(path)
        return load_image(path, channels)

    monkeypatch.setattr(image_folder, "load_image", reading)
    loader = loader_of(folder, 0)
    batches = list(remaining_batches(loader, 3))
    assert len(batches) == 1 and read == batches[0]["path"] and len(read) == 3


def test_copies_of_repeated_augmentation_differ(folder):
    batch = next(iter(DataLoader(
        dataset := ImageFolder(folder, "train", transform=TRAIN), batch_size=15,
        sampler=RepeatedAugmentSampler(dataset, seed=0), collate_fn=collate,
    )))
    assert len(set(batch["path"])) == 5
    assert batch["image"].flatten(1).unique(dim=0).shape[0] == 15


def states() -> tuple:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def test_loading_leaves_the_global_generators_alone(folder):
    dataset = ImageFolder(folder, "train", transform=TRAIN)
    sampler = RepeatedAugmentSampler(dataset, seed=0)
    before = states()
    assert len([dataset[draw] for draw in sampler]) == 15
    assert states() == before
    with pytest.raises(ZeroDivisionError), seeded(1):
        random.random()
        raise ZeroDivisionError
    assert states() == before
    with seeded(1, 2):
        first = random.random(), np.random.rand(), torch.rand(1).item()
    with seeded(1, 3):
        assert not set(first) & {random.random(), np.random.rand(), torch.rand(1).item()}
    with seeded(1, 2):
        assert first == (random.random(), np.random.rand(), torch.rand(1).item())


def test_plain_indices_use_the_global_generators(folder):
    dataset = ImageFolder(folder, "train", transform=TRAIN)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first, second = dataset[0]["image"], dataset[0]["image"]
    assert not torch.equal(first, second)
    subset = Subset(dataset, [4, 5])
    assert not torch.equal(subset[Draw(0, (1, 2))]["image"], subset[Draw(0, (1, 2))]["image"])


def test_mmengine_builds_it_all_from_a_config(folder):
    loader = Runner.build_dataloader(
        ConfigDict(
            dataset=dict(type="vision_ssm.ImageFolder", root=str(folder), split="train", transform=TRAIN),
            sampler=dict(type="vision_ssm.RepeatedAugmentSampler", num_repeats=3),
            collate_fn=dict(type="vision_ssm.collate"),
            batch_size=4,
            num_workers=0,
        ),
        seed=1,
    )
    assert same(list(loader), list(loader_of(folder, 0, RepeatedAugmentSampler)))


# ---------------------------------------------------------------- collation

def test_collate():
    samples = [dict(image=torch.full((1, 2, 3), float(i)), label=i, path=f"{i}.png") for i in range(3)]
    batch = collate(samples)
    assert batch["image"].shape == (3, 1, 2, 3) and batch["image"].dtype == torch.float32
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [0, 1, 2]
    assert batch["path"] == ["0.png", "1.png", "2.png"]
    samples[2]["image"] = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"'0.png' is \(1, 2, 3\), '2.png' is \(1, 2, 4\). .*fixed input_size"):
        collate(samples)

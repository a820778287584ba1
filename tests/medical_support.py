"""Small medical data sets in every layout on disk, and small runs on them."""

from pathlib import Path

import numpy as np
import pytest
from engine_support import CONFIGS, read_config
from mmengine.config import Config
from PIL import Image

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")

MEDICAL = CONFIGS / "medical"
ORGANS = MEDICAL / "vmunet_micro_organs.py"
SIZE = 32
HU = (-90, 60, 130, 190, 240, 20)  # of the background and five classes
MICRO = dict(name="vmunet_micro", dims=8, depths=(1, 1), decoder_depths=(1, 1))


def draw_case(seed: int, classes: int = 6, depth: int = 4, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Discs of the foreground classes in a row over a noisy ground; the first slice is empty. Values in [0, 1]."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((depth, size, size), np.uint8)
    for number in range(1, classes):
        centre = ((number % 3 + 0.7) * size / 3.4, (number // 3 + 0.9) * size / 3.6) + generator.uniform(-1, 1, 2)
        labels[1:, (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < (size / 9) ** 2] = number
    image = np.asarray(HU)[labels % len(HU)] + generator.normal(0, 8, labels.shape)
    return np.clip((image + 125) / 400, 0, 1).astype(np.float32), labels


def write_synapse(root: Path, classes: int = 6) -> Path:
    for folder in ("train_npz", "test_vol_h5", "lists/lists_Synapse"):
        (root / folder).mkdir(parents=True)
    image, labels = draw_case(0, classes)
    names = [f"case0001_slice{number:03}" for number in range(len(image))]
    for name, picture, mask in zip(names, image, labels, strict=True):
        np.savez(root / "train_npz" / f"{name}.npz", image=picture, label=mask)
    image, labels = draw_case(1, classes)
    with h5py.File(root / "test_vol_h5" / "case0002.npy.h5", "w") as file:
        file["image"], file["label"] = image, labels
    (root / "lists/lists_Synapse/train.txt").write_text("\n".join(names))
    (root / "lists/lists_Synapse/test_vol.txt").write_text("case0002")
    return root


def write_acdc(root: Path) -> Path:
    (root / "lists_ACDC").mkdir(parents=True)
    for number, part in enumerate(("train", "valid", "test")):
        (root / part).mkdir()
        image, labels = draw_case(number, 4)
        if part == "test":
            files = {"case_003.npz": (image, labels)}
        else:
            slices = enumerate(zip(image[1:], labels[1:], strict=True))
            files = {f"case_{number:03}_slice{place:03}.npz": pair for place, pair in slices}
        for name, (picture, mask) in files.items():
            np.savez(root / part / name, img=picture, label=mask)
        (root / "lists_ACDC" / f"{part}.txt").write_text("\n".join(files))
    return root


def write_isic(root: Path) -> Path:
    for number, part in enumerate(("train", "val")):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        image, labels = draw_case(number, 2)
        for place in (1, 2, 3):
            picture = np.repeat(np.uint8(255 * image[place])[..., None], 3, 2)
            Image.fromarray(picture).save(root / part / "images" / f"ISIC_{place:07}.png")
            Image.fromarray(255 * labels[place]).save(root / part / "masks" / f"ISIC_{place:07}.png")
    return root


def write_nifti(root: Path, cases: int = 5) -> Path:
    """nnU-Net's layout in Hounsfield units: one case to test, the others to train and validate."""
    affine = np.diag([-1.5, -1.5, 4.0, 1.0])  # runs to the left, posterior and superior, as slices are shown
    for number in range(cases):
        part = "Ts" if number == cases - 1 else "Tr"
        image, labels = draw_case(number)
        for folder, values in (("images", image * 400 - 125), ("labels", labels)):
            (root / f"{folder}{part}").mkdir(parents=True, exist_ok=True)
            suffix = "_0000" if folder == "images" else ""
            stored = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)
            nibabel.save(stored, root / f"{folder}{part}" / f"case_{number}{suffix}.nii.gz")
    return root


WRITERS = {"Synapse": write_synapse, "Acdc": write_acdc, "Isic": write_isic, "Nifti": write_nifti}


def shrink(cfg: Config, work_dir: Path, size: int = SIZE) -> Config:
    """`cfg` for a run of seconds: small images, batches of 2, no workers; the model stays."""
    cfg.work_dir = str(work_dir)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        if "size" in loader.dataset:
            loader.dataset.size = size
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.transform.size = size
    cfg.model.inference.size = (size, size)
    cfg.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    return cfg


def small_run(data: Path, work_dir: Path, epochs: int = 2) -> Config:
    """The config of the drawn organs, cut down to a run of seconds, with an encoder that rests for an epoch."""
    cfg = shrink(read_config(ORGANS), work_dir)
    cfg.model.unet = dict(MICRO, drop_path_rate=0.1)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(root=str(data), classes="organs")
    cfg.train_dataloader.batch_size = 4
    cfg.train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
    cfg.param_scheduler = [
        dict(type="LinearLR", start_factor=0.5, begin=0, end=1, by_epoch=True, convert_to_iter_based=True)
    ]
    cfg.custom_hooks = [
        dict(type="vision_ssm.FreezeEncoderHook", epochs=1), dict(type="EMAHook", momentum=0.1),
    ]  # fmt: skip
    return cfg

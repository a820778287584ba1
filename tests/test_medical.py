"""Medical segmentation on the Runner: the model, hooks, runs, test and prediction; a mask lies where its scan does."""

import copy
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_support import EXACT, ROOT, differences, run_python, runs_are_exact
from medical_support import MICRO, SIZE, draw_case, h5py, nibabel, small_run, write_isic, write_nifti
from mmengine.config import Config
from PIL import Image
from scipy.spatial.transform import Rotation
from test_medical_data import dicom_series
from torch import nn

from vision_ssm import CheckpointError
from vision_ssm.data.medical_cases import Reading
from vision_ssm.data.medical_volume import Volume
from vision_ssm.engine import MedicalPredictor, MedicalSegmentor, Runner, draw_montage, overlay, read_training
from vision_ssm.engine.commands import test as run_test
from vision_ssm.engine.config import UsageError
from vision_ssm.engine.medical import batch_dice
from vision_ssm.engine.medical_figures import class_colors, shown_slices
from vision_ssm.engine.medical_hooks import FreezeEncoderHook, StopOnPlateauHook
from vision_ssm.engine.predict_command import predict as run_predict

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")
DICE_CE = dict(kind="dice_ce")
orientations = nibabel.orientations


def segmentor(num_classes: int = 6, **options) -> MedicalSegmentor:
    options = {"loss": DICE_CE if num_classes > 1 else dict(kind="dice_bce"), "inference": dict(size=None), **options}
    return MedicalSegmentor(MICRO, num_classes, **options)


class Bright(nn.Module):
    """A U-Net's stand-in: class 1 where the first channel exceeds 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.6 - x[:, :1], (x[:, :1] - 0.6) * self.weight], 1)


@pytest.fixture(scope="module")
def organs(tmp_path_factory) -> Path:
    """Folder of small volumes; not to be changed."""
    return write_nifti(tmp_path_factory.mktemp("organs"))


# Model


def test_modes_of_the_model():
    torch.manual_seed(0)
    model = segmentor().eval()
    image, labels = draw_case(0)
    pixels, mask = torch.from_numpy(image)[:, None], torch.from_numpy(labels).long()
    batch = model.data_preprocessor(dict(image=pixels, mask=mask, case=list("abcd"), index=torch.arange(4)), True)
    scores = model(**batch)
    assert scores.shape == (4, 6, SIZE, SIZE) and torch.equal(scores, model.unet(pixels))
    losses = model(**batch, mode="loss")
    assert set(losses) == {"loss_ce", "loss_dice", "dice"}
    assert losses["loss_ce"].item() == pytest.approx(nn.functional.cross_entropy(scores, mask).item(), rel=1e-5)
    volume = Volume(image[:, None], labels.astype(np.int64), (4.0, 1.5, 1.5), None, "one")
    (found,) = model(**model.data_preprocessor(dict(volume=[volume])), mode="predict")
    assert found["case"] == "one" and found["spacing"] == (4.0, 1.5, 1.5) and found["target"] is volume.mask
    assert np.array_equal(found["prediction"], scores.argmax(1).numpy())


def test_binary_masks_may_be_soft():
    torch.manual_seed(0)
    model = segmentor(1).eval()
    mask = torch.rand(2, SIZE, SIZE)
    batch = dict(image=torch.rand(2, 3, SIZE, SIZE), mask=mask, case=["a", "b"])
    losses = model(**model.data_preprocessor(batch), mode="loss")
    expected = nn.functional.binary_cross_entropy_with_logits(model.unet(batch["image"])[:, 0], mask)
    assert losses["loss_bce"].item() == pytest.approx(expected.item(), rel=1e-5)
    labels = model.predict_labels(batch["image"].numpy())
    assert np.array_equal(labels, (model.unet(batch["image"])[:, 0] >= 0).numpy())


def test_training_and_evaluation_see_the_same_intensities():
    model = segmentor(2, normalize=dict(mean=(0.5, 0.2, 0.1), std=(0.5, 1.0, 2.0))).eval()
    image = torch.rand(2, 3, SIZE, SIZE)
    given = model.data_preprocessor(dict(image=image, mask=torch.zeros(2, SIZE, SIZE).long(), case=["a", "b"]))["image"]
    expected = (image - torch.tensor([0.5, 0.2, 0.1])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    assert torch.allclose(given, expected)
    seen = []
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model.predict_labels(image.numpy(), batch=2)
    assert torch.allclose(seen[0], expected)


def test_dice_of_a_batch():
    scores = torch.full((1, 3, 2, 4), -1.0)
    predicted = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    scores.scatter_(1, predicted[None, None], 1.0)
    mask = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 0]]])
    assert batch_dice(scores, mask).item() == pytest.approx((2 * 3 / 7 + 0) / 2)
    assert batch_dice(-scores[:, 1:2], (mask != 1).float()).item() == pytest.approx(2 * 4 / 9)
    assert batch_dice(scores[..., :2], mask[..., :2]).item() == pytest.approx(0)  # one false voxel of class 1
    assert batch_dice(scores[..., :1, :2], mask[..., :1, :2]).isnan()  # nothing there, nothing found


def test_inference_settings_of_model_and_call():
    model = segmentor(2, inference=dict(size=None, keep_largest=[1]))
    model.unet = Bright()
    image = np.zeros((2, 1, SIZE, SIZE), np.float32)
    image[:, 0, 4:12, 4:12] = 1
    image[:, 0, 20:24, 20:24] = 1
    assert model.predict_labels(image).sum() == 2 * 64
    assert model.predict_labels(image, keep_largest=False).sum() == 2 * (64 + 16)
    assert model.predict_labels(image, keep_largest=False, window=(16, 16), flips=("both",)).sum() == 2 * (64 + 16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MedicalSegmentor(dict(dims=8), 2, DICE_CE), ValueError, "unet needs the name of a model"),
        (lambda: MedicalSegmentor(dict(name="vmunet_micro", num_classes=2), 2, DICE_CE), ValueError, "set model.num_classes alone"),
        (lambda: MedicalSegmentor(dict(name="vmunet_mikro"), 2, DICE_CE), KeyError, "Did you mean 'vmunet_micro'"),
        (lambda: segmentor(inference=dict(sizes=3)), TypeError, "inference has no keyword 'sizes'. Did you mean 'size'"),
        (lambda: segmentor(normalize=dict(meen=1)), TypeError, "normalize got unknown keyword 'meen'"),
        (lambda: segmentor(normalize=dict(mean=0.5, std=0)), ValueError, "std must be positive"),
        (lambda: segmentor(loss=dict(kind="dice")), ValueError, "unknown loss 'dice'"),
        (lambda: segmentor()(mode="los"), ValueError, "unknown mode 'los'. Did you mean 'loss'"),
        (lambda: segmentor()(torch.rand(1, 1, 32, 32), mode="loss"), ValueError, "needs the masks"),
        (lambda: segmentor()(torch.rand(1, 1, 32, 32), mode="predict"), ValueError, "needs volumes"),
        (lambda: segmentor().check_classes(("background", "a")), ValueError, "2 classes .*background, a.*num_classes=6"),
        (lambda: FreezeEncoderHook(0), ValueError, "at least 1, got 0"),
        (lambda: StopOnPlateauHook(0), ValueError, "at least 1 epoch, got 0"),
    ],
)
def test_wrong_use_is_explained(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("num_classes", "value", "highest"), [(6, 6, 5), (1, 3, 1), (2, -1, 1)])
def test_labels_beyond_the_classes_are_named(num_classes, value, highest):
    mask = torch.zeros(2, 8, 8).long()
    mask[1, 3, 3] = value
    with pytest.raises(ValueError, match=f"mask of case_b has label {value}; .*labels lie in 0 .. {highest}"):
        segmentor(num_classes).data_preprocessor(dict(image=torch.rand(2, 1, 8, 8), mask=mask, case=["a", "case_b"]))


# Pictures


def test_overlays_show_labels_where_they_are(tmp_path):
    picture = np.full((64, 128, 3), 100, np.uint8)
    labels = np.zeros((64, 128), np.uint8)
    labels[16:32, 20:60] = 1
    labels[40:50, 80:100] = 2
    colors = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    drawn = overlay(picture, labels, colors)
    assert drawn.shape == (256, 512, 3) and not (picture != 100).any()
    assert drawn[8, 8].tolist() == [100] * 3
    assert drawn[4 * 24, 4 * 40].tolist() == [154, 65, 65]  # the area is tinted
    assert drawn[4 * 16, 4 * 40].tolist() == [255, 0, 0] and drawn[4 * 50 - 1, 4 * 90].tolist() == [0, 0, 255]  # its edge
    assert overlay(picture, labels, colors, spacing=(3.0, 1.0)).shape[:2] == (384, 256)  # as high as 64 x 3 mm
    with pytest.raises(ValueError, match="differ in size"):
        overlay(picture, labels[1:], colors)
    with pytest.raises(ValueError, match="labels 0 to 2 do not all have one of the 2 colours"):
        overlay(picture, labels, colors[:2])
    assert class_colors(dict(palette=[(0, 0, 0), (9, 9, 9)]), 3).tolist()[1] == [9, 9, 9]
    volume = np.zeros((10, 4, 4), int)
    assert shown_slices(volume, 3) == [1, 5, 8]
    volume[[2, 5, 6]] = 1
    assert shown_slices(volume, 2) == [2, 6] and shown_slices(volume, 9) == [2, 5, 6]
    image, labels = draw_case(0)
    meta = dict(classes=("background", *"abcde"))
    draw_montage(image[:, None], labels, tmp_path / "montage.png", "a case", meta, (4, 1.5, 1.5))
    assert min(Image.open(tmp_path / "montage.png").size) > 300


# Runs


@pytest.fixture(scope="module")
def trained(organs, tmp_path_factory) -> tuple[Config, Path]:
    cfg = small_run(organs, tmp_path_factory.mktemp("run"))
    cfg.default_hooks.checkpoint.update(every_iterations=1, keep=20)
    Runner.from_cfg(copy.deepcopy(cfg)).train()
    cfg.dump(Path(cfg.work_dir) / "config.py")
    return cfg, Path(cfg.work_dir)


def test_training_leaves_its_record(trained):
    cfg, folder = trained
    state = read_training(folder / "epoch_2.pth")
    loss = state["history"]["iterations"][:, 1]
    assert len(loss) == 2 * 3 and loss[-1] < loss[0]
    history = json.loads((folder / "history.json").read_text())
    assert {"val_dice", "val_dice/liver", "train_loss", "train_accuracy"} <= set(history[-1])
    assert read_training(folder / "best_dice.pth")["meta"]["metric"] == "dice"
    assert state["meta"]["dataset_meta"]["classes"][1] == "liver"
    rows = list(csv.DictReader((folder / "per_case.csv").open()))
    assert len(rows) == 5 and {row["class"] for row in rows} == {"liver", "spleen", "kidney", "stomach", "aorta"}
    summary = json.loads((folder / "per_class.json").read_text())
    assert summary["cases"] == 1 and summary["mean"]["dice"] == pytest.approx(history[-1]["val_dice"])
    assert (folder / "curves.png").is_file() and (folder / "predictions.png").stat().st_size > 10_000


def test_the_encoder_rests_for_an_epoch(trained):
    _, folder = trained
    first, rested, moved = (
        read_training(folder / name)["unaveraged_state_dict"] for name in ("iter_1.pth", "epoch_1.pth", "epoch_2.pth")
    )
    encoder = [name for name in first if ".encoder." in name]
    assert encoder and all(torch.equal(first[name], rested[name]) for name in encoder)
    assert any(not torch.equal(first[name], rested[name]) for name in first if ".decoder." in name)
    assert sum(not torch.equal(moved[name], rested[name]) for name in encoder) > 0.8 * len(encoder)


@runs_are_exact
@pytest.mark.parametrize("start", [2, 4])  # with the encoder at rest, and after
def test_resume_is_exact(organs, trained, tmp_path, start):
    cfg = small_run(organs, tmp_path)
    shutil.copy(trained[1] / f"iter_{start}.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text(f"iter_{start}.pth\n")
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    resumed, expected = (read_training(folder / "epoch_2.pth") for folder in (tmp_path, trained[1]))
    for part in EXACT:
        assert differences(resumed[part], expected[part], part) == []


def test_a_standing_loss_ends_the_run_and_a_resumed_one(organs, tmp_path):
    cfg = small_run(organs, tmp_path, epochs=9)
    cfg.train_cfg.val_interval = 9
    cfg.model.unet.drop_path_rate = 0.0
    cfg.train_dataloader.sampler.shuffle = False
    cfg.train_dataloader.dataset.transform = dict(policy="none", size=SIZE)
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.custom_hooks = [dict(type="vision_ssm.StopOnPlateauHook", patience=2)]
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    assert runner.epoch == 3 and (tmp_path / "epoch_3.pth").is_file()
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history) == 3 and "val_dice" in history[-1]  # validated where it stopped
    assert (tmp_path / "predictions.png").is_file()
    cfg.resume = True
    resumed = Runner.from_cfg(cfg)
    resumed.train()
    assert resumed.epoch == 3


def test_accumulation_and_bf16(organs, tmp_path):
    cfg = small_run(organs, tmp_path, epochs=1)
    cfg.optim_wrapper.update(precision="bf16", accumulative_counts=2)
    Runner.from_cfg(cfg).train()
    assert read_training(tmp_path / "epoch_1.pth")["history"]["iterations"].isfinite()[:, 1].all()


def test_wrong_runs_end_before_training(organs, tmp_path):
    cfg = small_run(organs, tmp_path)
    cfg.model.num_classes = 9
    with pytest.raises(ValueError, match="6 classes with the background .*liver.* set model.num_classes=6"):
        Runner.from_cfg(cfg).build_training()
    cfg = small_run(organs, tmp_path)
    del cfg.default_hooks["record"]
    cfg.custom_hooks = [dict(type="vision_ssm.StopOnPlateauHook", patience=1)]
    with pytest.raises(ValueError, match="needs RecordHook"):
        Runner.from_cfg(cfg).train()


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(organs, tmp_path):
    states = []
    for name, batch in (("one", 4), ("two", 2)):
        cfg = small_run(organs, tmp_path / name, epochs=1)
        cfg.model.unet.drop_path_rate = 0.0
        cfg.model.loss = dict(kind="dice_ce", weights=(1.0, 0.0))  # Dice is that of a process' own images
        cfg.optim_wrapper.optimizer = dict(type="SGD", lr=0.01)
        cfg.custom_hooks = []
        cfg.train_dataloader.batch_size = batch
        cfg.val_dataloader.dataset.split = "all"
        cfg.dump(tmp_path / f"{name}.py")
        if name == "one":
            Runner.from_cfg(cfg).train()
        else:
            process = run_python(
                "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tools" / "train.py",
                tmp_path / "two.py", "--launcher", "pytorch",
            )  # fmt: skip
            assert process.returncode == 0, process.stderr[-4000:]
        states.append(read_training(tmp_path / name / "epoch_1.pth"))
        states[-1]["cases"] = json.loads((tmp_path / name / "per_class.json").read_text())
    first, second = states
    assert second["meta"]["world_size"] == 2 and second["cases"]["cases"] == 4
    for name, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][name], rtol=0, atol=1e-5), name
    assert first["cases"]["mean"]["dice"] == pytest.approx(second["cases"]["mean"]["dice"], abs=1e-3)


def test_command_test_prints_classes(organs, trained, tmp_path, capsys):
    cfg, folder = trained
    options = ["--data-root", str(organs), "--work-dir", str(tmp_path / "test"), "--out", str(tmp_path / "cases.csv")]
    assert run_test([str(folder / "config.py"), str(folder / "best_dice.pth"), *options]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("liver", "aorta", "DSC", "missed", "1 volumes"))
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert {row["case"] for row in rows} == {"case_4"} and len(rows) == 5
    assert json.loads((tmp_path / "test" / "per_class.json").read_text())["empty_masks"] == "defined"
    assert (tmp_path / "test" / "predictions.png").is_file()


# Prediction


def way_to(axes: str, affine: np.ndarray) -> np.ndarray:
    """How voxels with this affine are turned so that their axes run towards these sides."""
    return orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(axes))


def turned_copy(source: Path, target: Path, axes: str, rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """A scan stored along other axes and rotated in the world; returns its voxels and affine."""
    scan = nibabel.load(source)
    transform = way_to(axes, scan.affine)
    voxels = orientations.apply_orientation(scan.get_fdata(dtype=np.float32), transform)
    turn = np.eye(4)
    turn[:3, :3], turn[:3, 3] = rotation.as_matrix(), (12.0, -7.0, 33.0)
    affine = turn @ scan.affine @ orientations.inv_ornt_aff(transform, scan.shape)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), target)
    return voxels, affine


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAR", "PIL"])
def test_mask_lies_where_the_scan_does(organs, tmp_path, axes):
    """Every voxel of the mask file says what the scan holds at the same place of the world."""
    rotation = Rotation.from_euler("xyz", (8, -5, 12), degrees=True)
    voxels, affine = turned_copy(organs / "imagesTs" / "case_4_0000.nii.gz", tmp_path / "scan.nii.gz", axes, rotation)
    model = segmentor(2)
    model.unet = Bright()
    predictor = MedicalPredictor(model, Reading(window=(-125.0, 275.0)), device="cpu")
    volume = predictor.read(tmp_path / "scan.nii.gz")
    assert volume.image.shape == (4, 1, SIZE, SIZE)  # axial slices, however they are stored
    mask = nibabel.load(predictor.save(volume, predictor(volume), tmp_path / "out"))
    labels = np.asarray(mask.dataobj)
    assert mask.shape == voxels.shape and np.allclose(mask.affine, affine, atol=1e-5)
    stored = nibabel.load(tmp_path / "scan.nii.gz").affine
    assert np.array_equal(mask.affine.astype(np.float32), stored.astype(np.float32))
    assert np.array_equal(labels == 1, (voxels + 125) / 400 > 0.6) and 0 < labels.mean() < 0.5
    world = nibabel.affines.apply_affine(mask.affine, np.argwhere(labels == 1)).mean(0)
    found = nibabel.affines.apply_affine(affine, np.argwhere((voxels + 125) / 400 > 0.6)).mean(0)
    assert np.allclose(world, found, atol=1e-3)


def test_from_training_to_the_mask_of_a_turned_scan(organs, trained, tmp_path, capsys):
    """The whole way by commands: the same organs are found whichever way the scan is stored."""
    cfg, folder = trained
    source = organs / "imagesTs" / "case_4_0000.nii.gz"
    rotation = Rotation.from_euler("xyz", (8, -5, 12), degrees=True)
    voxels, affine = turned_copy(source, tmp_path / "turned.nii.gz", "PIL", rotation)
    options = ["--flips", "--montage", "--overlays", "--device", "cpu", "--out", str(tmp_path / "out")]
    command = [str(folder / "config.py"), str(folder / "epoch_2.pth"), "--volume", str(source)]
    assert run_predict([*command, str(tmp_path / "turned.nii.gz"), *options]) == 0
    assert "turned_mask.nii.gz" in capsys.readouterr().out
    plain, turned = (nibabel.load(tmp_path / "out" / f"{name}_mask.nii.gz") for name in ("case_4_0000", "turned"))
    assert turned.shape == voxels.shape and np.allclose(turned.affine, affine, atol=1e-5)
    expected = orientations.apply_orientation(np.asarray(plain.dataobj), way_to("PIL", plain.affine))
    assert np.array_equal(expected, np.asarray(turned.dataobj))
    assert (tmp_path / "out" / "turned_montage.png").is_file() and (tmp_path / "out" / "turned_overlays").is_dir()


def test_arrays_and_pictures(organs, tmp_path, capsys):
    image, labels = draw_case(3)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["image"] = image
        file.attrs["spacing"] = (4.0, 1.5, 1.0)
    model = segmentor(2)
    model.unet = Bright()
    predictor = MedicalPredictor(model, Reading(), device="cpu", stretch=True)
    volume = predictor.read(tmp_path / "scan.h5")
    mask = nibabel.load(predictor.save(volume, predictor(volume), tmp_path))
    assert mask.header.get_zooms() == (1.0, 1.5, 4.0)
    assert np.array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0) == 1, image > 0.6)
    folder = write_isic(tmp_path / "isic") / "val" / "images"
    picture = predictor.read(folder / "ISIC_0000001.png")
    assert picture.image.shape == (1, 3, SIZE, SIZE) and picture.image.max() == pytest.approx(255)
    file = predictor.save(picture, predictor(picture), tmp_path)
    assert file.name == "ISIC_0000001_mask.png" and set(np.unique(np.asarray(Image.open(file)))) <= {0, 255}


def test_dicom_series(tmp_path):
    image, _ = draw_case(3)
    hounsfield = np.rint(image * 400 - 125).astype(int)
    turn = Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix()
    dicom_series(tmp_path / "series", hounsfield, turn=turn)
    model = segmentor(2)
    model.unet = Bright()
    predictor = MedicalPredictor(model, Reading(window=(-125.0, 275.0)), device="cpu")
    volume = predictor.read(tmp_path / "series")
    mask = nibabel.load(predictor.save(volume, predictor(volume), tmp_path))
    assert np.allclose(mask.affine, volume.grid.affine) and np.allclose(mask.header.get_zooms(), (0.8, 1.5, 4.0))
    found = np.asarray(mask.dataobj).transpose(2, 1, 0) == 1  # in the order of the series
    assert np.array_equal(found, (hounsfield + 125) / 400 > 0.6) and found.any()


def test_wrong_predictions_are_explained(organs, trained, tmp_path, capsys):
    _, folder = trained
    command = [str(folder / "config.py"), str(folder / "epoch_2.pth")]
    scan = str(organs / "imagesTs" / "case_4_0000.nii.gz")
    for arguments, message in (
        ([*command, "--volume", "gone.nii.gz"], "there is no image 'gone.nii.gz'"),
        ([*command, "--volume", scan, "--out", "a.png"], "--out a.png should be a folder"),
        ([*command, "--volume", scan, scan], "would be written to one file"),
        ([str(ROOT / "configs/classification/quickstart_digits.py"), "x.pth", "--volume", scan], "--volume is for medical"),
    ):
        with pytest.raises(SystemExit):
            run_predict([*arguments, "--out", str(tmp_path)] if "--out" not in arguments else arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="needs a config of a MedicalSegmentor"):
        MedicalPredictor.from_config(Config(dict(model=dict(type="vision_ssm.ImageClassifier"))), command[1])
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError):
        MedicalPredictor.from_config(Config.fromfile(command[0]), tmp_path / "other.pth")

"""Checkpoints of whole segmentation and detection models, official ones included, in the tools."""

import copy
import shutil
from pathlib import Path

import golden_cases
import pytest
import torch
from dense_support import detection_config, segmentation_config, write_dense_pictures
from engine_support import ROOT, differences
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.backbones.vmamba import VMamba
from vision_ssm.engine import Runner, commands
from vision_ssm.engine.config import UsageError
from vision_ssm.engine.dense import DensePredictor
from vision_ssm.engine.official import find_checkpoint
from vision_ssm.engine.predict_command import predict
from vision_ssm.engine.whole_model import has_heads, load_whole_model
from vision_ssm.integrations.official_models import OFFICIAL_MODELS

CASE = "vmamba/vmamba_tiny_s1l8_dense_96x160"


@pytest.fixture(scope="module")
def official_names() -> dict[str, tuple[str, bool]]:
    """The original's name of every tensor of a dense VMamba of ours, and whether it joins the first two axes."""
    weights = golden_cases.weights(golden_cases.load(CASE))
    names = list(weights)
    tagged = {name: torch.tensor(float(i)).expand(weights[name].shape) for i, name in enumerate(names)}
    found = {key: names[int(value.flatten()[0])] for key, value in VMamba.official_keys(tagged).items()}
    return {key: (name, key.endswith(("A_log", "mixer.core.D"))) for key, name in found.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_dense_pictures(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module", params=["segmentation", "detection"])
def run(request, pictures, tmp_path_factory) -> Path:
    """Work dir of a run of one iteration, and its last checkpoint under official names, ``official.pth``."""
    work_dir = tmp_path_factory.mktemp(request.param)
    if request.param == "segmentation":
        cfg = segmentation_config(pictures, work_dir, 1)
        cfg.train_cfg.val_interval = 2
    else:
        cfg = detection_config(pictures, work_dir, 1)
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    Runner.from_cfg(cfg).train()
    cfg.dump(work_dir / "config.py")
    names = request.getfixturevalue("official_names")
    state = {}
    for key, value in trained(work_dir)["state_dict"].items():
        if key.startswith("backbone."):
            name, joined = names[key.removeprefix("backbone.")]
            key, value = f"backbone.{name}", value.flatten(0, 1) if joined else value
        state[key] = value
    state["data_preprocessor.mean"] = torch.zeros(3, 1, 1)  # of older releases
    torch.save({"meta": {"epoch": 12}, "state_dict": state, "optimizer": {"state": {}}}, work_dir / "official.pth")
    return work_dir


def trained(work_dir: Path) -> dict:
    return torch.load(checkpoint_of(work_dir), map_location="cpu", weights_only=True)


def checkpoint_of(work_dir: Path) -> Path:
    return next(path for path in (work_dir / "iter_1.pth", work_dir / "epoch_1.pth") if path.exists())


def build(cfg: Config) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(copy.deepcopy(cfg.model))


def test_command_takes_official_weights(run, tmp_path, capsys):
    assert commands.test([str(run / "config.py"), str(run / "official.pth"), "--work-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "│" in line and ("mIoU" in line or "mAP" in line)]


def test_training_starts_from_official_weights(run, tmp_path):
    cfg = Config.fromfile(str(run / "config.py"))
    cfg.work_dir, cfg.load_from = str(tmp_path), str(run / "official.pth")
    cfg.custom_hooks = [dict(type="EMAHook")]  # copies what was loaded, under our names
    cfg.optim_wrapper.optimizer.lr = 0.0
    Runner.from_cfg(cfg).train()
    before, after = trained(run)["state_dict"], trained(tmp_path)["state_dict"]
    weights = [key for key in before if "running_" not in key and "num_batches" not in key]
    assert differences({key: before[key] for key in weights}, {key: after[key] for key in weights}) == []


def test_predictor_has_the_same_weights_under_either_names(run):
    cfg = Config.fromfile(str(run / "config.py"))
    own, official = (DensePredictor(cfg, run / name, "cpu") for name in (checkpoint_of(run).name, "official.pth"))
    assert differences(own.model.state_dict(), official.model.state_dict()) == []
    assert own.classes == official.classes


def test_classes_of_a_data_set_that_knows_its_own(run):
    cfg = Config.fromfile(str(run / "config.py"))
    dataset = cfg.test_dataloader.dataset
    dataset.pop("metainfo")
    dataset.type = "CityscapesDataset" if cfg.default_scope == "mmseg" else "CocoDataset"
    predictor = DensePredictor(cfg, run / "official.pth", "cpu")
    assert predictor.classes[:2] == (("road", "sidewalk") if cfg.default_scope == "mmseg" else ("person", "bicycle"))


def test_other_heads_are_refused_and_named(run, tmp_path):
    cfg = Config.fromfile(str(run / "config.py"))
    model = build(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.load(run / "official.pth", weights_only=True)["state_dict"]
    last = [key for key in state if key.endswith("head.conv_seg.bias") or key.endswith("fc_cls.bias")][0]
    for change, message in (
        (lambda given: given.update({last: torch.zeros(81)}), rf"{last}: \(81,\) in the file, \(\d+,\) in the model"),
        (lambda given: given.pop(last), rf"{last}: missing in the file"),
        (lambda given: given.update({"neck.more.weight": torch.zeros(1)}), r"neck.more.weight: \(1,\) in the file, missing"),
    ):
        given = dict(state)
        change(given)
        with pytest.raises(CheckpointError, match=f"are not those of this config's model(?s:.*){message}"):
            load_whole_model(model, given, "file.pth")
    given = {key: value for key, value in state.items() if key != "backbone.patch_embed.0.weight"}
    with pytest.raises(CheckpointError, match="missing from the file: stem.conv1.weight"):
        load_whole_model(model, given, "file.pth")
    assert differences(before, model.state_dict()) == []


def test_backbone_of_an_official_model_computes_what_the_original_does(pictures, tmp_path):
    case = golden_cases.load(CASE)
    cfg = segmentation_config(pictures, tmp_path)
    cfg.model.backbone = dict(type="vision_ssm.VMamba", variant="vmamba_tiny_s1l8")
    cfg.model.decode_head.in_channels = [96, 192, 384, 768]
    cfg.model.auxiliary_head.in_channels = 384
    model = build(cfg).eval()
    state = {f"backbone.{key}": value for key, value in golden_cases.weights(case).items()}
    state |= {key: value + 1 for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    report = load_whole_model(model, state, "upernet.pth")
    assert report.complete and not report.ignored
    assert torch.equal(model.decode_head.conv_seg.bias, state["decode_head.conv_seg.bias"])
    with torch.inference_mode():
        maps = model.backbone(golden_cases.images(case["input"]))
    for expected, feature in zip(case["outputs"]["features"], maps, strict=True):
        assert golden_cases.sample_error(expected, feature) < case["tolerance"]


def test_models_without_parts_beside_their_backbone_are_none():
    classifier = torch.nn.Module()
    classifier.backbone = vision_ssm.create_model("vmamba_micro")
    assert not has_heads(classifier) and not has_heads(torch.nn.Linear(1, 1))
    classifier.decode_head = torch.nn.Linear(1, 1)
    assert has_heads(classifier)


# The word "official"


def test_official_is_fetched_for_the_config(run, tmp_path, monkeypatch, capsys):
    """From the cache here; what downloads do is in test_download.py."""
    monkeypatch.setenv("VISION_SSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    shutil.copy(run / "official.pth", tmp_path / "cache" / "upernet.pth")
    links = {"mine": ("https://drive.google.com/file/d/1/view", "upernet.pth")}
    monkeypatch.setattr("vision_ssm.engine.official.OFFICIAL_MODELS", links)
    config = tmp_path / "mine.py"
    config.write_text(f"_base_ = {str(run / 'config.py')!r}")
    cfg = Config.fromfile(str(config))
    assert find_checkpoint("official", cfg, str(config)) == str(tmp_path / "cache" / "upernet.pth")
    assert find_checkpoint("other.pth", cfg, str(config)) == "other.pth"
    picture = next(Path(cfg.data_root).glob("images/validation/*.jpg"))
    assert predict([str(config), "official", str(picture), "--score", "0", "--out", "one.png"]) == 0
    links["mine"] = (links["mine"][0], "other.pth")
    with pytest.raises(SystemExit):
        commands.test([str(config), "official"])
    error = capsys.readouterr().err
    assert "is a web page" in error and f"put it at {tmp_path / 'cache' / 'other.pth'}" in error


def test_official_for_classifiers_and_where_there_is_none(run, tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_SSM_CACHE", str(tmp_path))
    file = tmp_path / "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    file.write_bytes(b"")
    model = dict(type="vision_ssm.ImageClassifier", backbone=dict(name="vmamba_tiny_s1l8"))
    assert find_checkpoint("official", Config(dict(model=model)), "x.py") == str(file)
    model["backbone"] = dict(name="vmamba_micro")
    with pytest.raises(UsageError, match="official weights for x.py: .*no official weights are published for it"):
        find_checkpoint("official", Config(dict(model=model)), "x.py")
    with pytest.raises(UsageError, match="no official weights are published for the whole model of run.py: they are for the configs"):
        find_checkpoint("official", Config.fromfile(str(run / "config.py")), "run.py")


def test_every_official_model_has_a_config_a_link_and_a_file_of_its_own():
    configs = {path.stem for path in (ROOT / "configs").glob("*/*.py") if path.parent.name != "_base_"}
    assert set(OFFICIAL_MODELS) <= configs and len(OFFICIAL_MODELS) == 39
    links, files = zip(*OFFICIAL_MODELS.values(), strict=True)
    assert len(set(links)) == len(set(files)) == 39
    assert all(link.startswith("https://") for link in links) and all(file.endswith(".pth") for file in files)

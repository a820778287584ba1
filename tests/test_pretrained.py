"""What model.pretrained of a config names: a file, the published weights, or one of several."""

import pytest
import torch

import vision_ssm
from vision_ssm.download import DownloadError
from vision_ssm.engine import ImageClassifier, MedicalSegmentor, TopDownPose, commands
from vision_ssm.engine.timm_models import create_classifier
from vision_ssm.integrations import mm
from vision_ssm.integrations.checks import check_config

LOSS = dict(type="CrossEntropyLoss")
SMALL = dict(name="vssd_micro_d48", depths=(1, 1, 1, 1))


def classifier(**options) -> ImageClassifier:
    return ImageClassifier(**{"backbone": SMALL, "num_classes": 3, "loss": LOSS, **options})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of downloads, and a net that answers nothing."""
    monkeypatch.setenv("VISION_SSM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: pytest.fail("asked the net"))
    return tmp_path / "cache"


def save_official(model, file, value: float) -> None:
    """Weights of `model` as the official file has them, all alike."""
    torch.save({"model": {key: torch.full_like(tensor, value) for key, tensor in model.state_dict().items()}}, file)


def test_true_takes_the_published_weights_from_the_cache(cache, monkeypatch):
    cls = vision_ssm.factory.find_family("vmamba_micro")
    monkeypatch.setitem(cls.published, "vmamba_micro", dict(url="https://nowhere.org/w.pth", file="w.pth"))
    save_official(vision_ssm.create_model("vmamba_micro", num_classes=3), cache / "w.pth", 0.25)
    model = classifier(backbone=dict(name="vmamba_micro"), pretrained=True)
    assert all((tensor == 0.25).all() for tensor in model.backbone.parameters())
    model = classifier(backbone=dict(name="vmamba_micro", in_chans=1), num_classes=5, pretrained=True, reset_head=True)
    assert (model.backbone.stages[0].blocks[0].norm1.weight == 0.25).all()
    assert (model.backbone.stem.conv1.weight == 0.75).all()  # three colours, added
    assert not (model.backbone.head.weight == 0.25).any()


def test_a_tag_chooses_among_several(cache, monkeypatch):
    several = {tag: dict(url=f"https://nowhere.org/{tag}.pth", file=f"{tag}.pth", tag=tag) for tag in ("one", "two")}
    cls = vision_ssm.factory.find_family("vmamba_micro")
    monkeypatch.setattr(cls, "weights_of", classmethod(lambda cls, name: several))
    for value, tag in ((1.0, "one"), (2.0, "two")):
        save_official(vision_ssm.create_model("vmamba_micro", num_classes=3), cache / f"{tag}.pth", value)
    for name, pretrained, value in (
        ("vmamba_micro", True, 1.0), ("vmamba_micro", "two", 2.0), ("vmamba_micro.two", True, 2.0),
    ):  # fmt: skip
        model = classifier(backbone=dict(name=name), pretrained=pretrained)
        assert (model.backbone.norm.weight == value).all(), (name, pretrained)
    with pytest.raises(KeyError, match="vmamba_micro has no weights 'tow'. Did you mean 'two'"):
        classifier(backbone=dict(name="vmamba_micro"), pretrained="tow")


def test_a_pose_model_and_an_encoder_take_them_too(cache, monkeypatch):
    cls = vision_ssm.factory.find_family("vmamba_micro")
    monkeypatch.setitem(cls.published, "vmamba_micro", dict(url="https://nowhere.org/w.pth", file="w.pth"))
    save_official(vision_ssm.create_model("vmamba_micro"), cache / "w.pth", 0.5)
    pose = TopDownPose(dict(name="vmamba_micro", out_indices=(3,)), pretrained=True)
    assert (pose.backbone.stem.conv1.weight == 0.5).all()
    unet = dict(name="encoder_unet", encoder="vmamba_micro")
    segmentor = MedicalSegmentor(unet, num_classes=2, loss={}, pretrained=True)
    assert (segmentor.unet.encoder.stem.conv1.weight == 0.5).all()


def test_backbones_of_dense_models_take_them_too(cache, monkeypatch):
    several = {tag: dict(url=f"https://nowhere.org/{tag}.pth", file=f"{tag}.pth", tag=tag) for tag in ("one", "two")}
    cls = vision_ssm.factory.find_family("vmamba_micro")
    monkeypatch.setattr(cls, "weights_of", classmethod(lambda cls, name: several))
    for value, tag in ((1.0, "one"), (2.0, "two")):
        save_official(vision_ssm.create_model("vmamba_micro"), cache / f"{tag}.pth", value)
    for checkpoint, value in ((True, 1.0), ("two", 2.0)):
        init_cfg = dict(type="Pretrained", checkpoint=checkpoint)
        check_config(dict(model=dict(backbone=dict(type="vision_ssm.VMamba", variant="vmamba_micro", init_cfg=init_cfg))), True)
        backbone = mm.VMamba("vmamba_micro", init_cfg=init_cfg)
        backbone.init_weights()
        assert (backbone.stem.conv1.weight == value).all()
    with pytest.raises(KeyError, match="vmamba_micro has no weights 'tow'. Did you mean 'two'"):
        mm.check_weights("vmamba_micro", dict(type="Pretrained", checkpoint="tow"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no official weights are published for it \\(model vmamba_micro\\)"):
        mm.check_weights("vmamba_micro", dict(type="Pretrained", checkpoint=True))


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: classifier(pretrained="no.pth"), FileNotFoundError,
         r"no weight file no.pth for vssd_micro_d48: model.pretrained is a file, True for the published weights"),
        (lambda: classifier(backbone=dict(name="vmamba_micro"), pretrained="no.pth"), FileNotFoundError,
         "model.pretrained is a file, or None for random weights"),
        (lambda: classifier(backbone=dict(name="vmamba_micro"), pretrained=True), ValueError,
         r"no official weights are published for it \(model vmamba_micro\)"),
        (lambda: classifier(backbone=dict(name="timm:convnext_atto"), pretrained=True), ValueError,
         "timm:convnext_atto is one of timm's, whose weights are not fetched here"),
        (lambda: MedicalSegmentor(dict(name="vmunet_isic"), num_classes=1, loss={}, pretrained="no.pth"),
         FileNotFoundError, "no weight file no.pth for vmunet_isic: .*True for the published weights"),
        (lambda: MedicalSegmentor(dict(name="plain_unet_micro"), num_classes=1, loss={}, pretrained=True),
         ValueError, "no weights are published for the encoder of plain_unet_micro"),
        (lambda: TopDownPose(dict(name="vmamba_micro", out_indices=(3,)), pretrained="no.pth"), FileNotFoundError,
         "no weight file no.pth for vmamba_micro"),
        (lambda: classifier(reset_head=True), ValueError, "set pretrained=FILE, or True, as well"),
    ],
)  # fmt: skip
def test_what_there_is_not(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_false_is_nothing():
    torch.manual_seed(0)
    fresh = create_classifier(num_classes=3, **SMALL)
    torch.manual_seed(0)
    assert torch.equal(classifier(pretrained=False).backbone.norm.weight, fresh.norm.weight)


def test_a_command_says_how_to_get_what_it_cannot_download(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **options):
        raise DownloadError("https://nowhere.org/w.pth could not be downloaded")

    monkeypatch.setattr("vision_ssm.published.fetch", unreachable)
    config = "configs/classification/vmamba_tiny_s1l8_finetune.py"
    with pytest.raises(SystemExit):
        commands.train([config, "--work-dir", str(tmp_path), "--cfg-options", "model.pretrained=True"])
    message = capsys.readouterr().err
    assert "error: https://nowhere.org/w.pth could not be downloaded" in message and "Traceback" not in message

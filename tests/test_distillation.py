"""A teacher in training: its part of the loss, its absence from everything else, what cannot work."""

import copy
import math
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from engine_support import EXACT, ROOT, differences, run_python, runs_are_exact, small_config
from mmengine.config import Config

import vision_ssm
from vision_ssm import CheckpointError
from vision_ssm.data import load_image
from vision_ssm.engine import Distillation, ImageClassifier, Runner, distillation_loss, read_training
from vision_ssm.engine.checkpoint import fingerprint
from vision_ssm.engine.config import check_option
from vision_ssm.engine.optim import parameter_groups
from vision_ssm.engine.predict import Predictor

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # short runs

STUDENT = dict(
    name="groupmamba_micro", in_chans=1, dims=(8, 16), depths=(1, 1), mlp_ratios=(1, 2), stem_dim=4, drop_path_rate=0.1
)
CROSS_ENTROPY = dict(type="CrossEntropyLoss")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Weights of a tiny timm model, as DeiT stores them."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    file = tmp_path_factory.mktemp("teacher") / "test_resnet.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


def classifier(teacher: Path, student: dict = STUDENT, **options) -> ImageClassifier:
    distillation = dict(teacher="test_resnet", checkpoint=str(teacher), **options)
    return ImageClassifier(dict(student), 3, CROSS_ENTROPY, distillation=distillation)


def config(data: Path, work_dir: Path, teacher: Path, epochs: int = 2, **options) -> Config:
    cfg = small_config(data, work_dir, epochs)
    cfg.model.backbone = dict(STUDENT)
    cfg.model.distillation = dict(teacher="test_resnet", checkpoint=str(teacher), **options)
    cfg.default_hooks.checkpoint.update(every_iterations=4, keep=20)
    return cfg


def by_hand(logits: torch.Tensor, teacher: torch.Tensor, kind: str, t: float) -> float:
    """The formula, number by number."""
    total = 0.0
    for ours, theirs in zip(logits.tolist(), teacher.tolist()):
        t = t if kind == "soft" else 1.0
        p, q = ([math.exp(v / t) / sum(math.exp(w / t) for w in row) for v in row] for row in (ours, theirs))
        if kind == "hard":
            total -= math.log(p[theirs.index(max(theirs))]) / len(logits)
        else:
            total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q)) * t**2 / logits.numel()
    return total


@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("hard", 3.0), ("soft", 1.0), ("soft", 3.0)])
def test_loss_is_the_formula(kind, temperature):
    ours, theirs = 2 * torch.randn(4, 5).double(), 2 * torch.randn(4, 5).double()
    loss = distillation_loss(ours, theirs, kind, temperature)
    assert loss.item() == pytest.approx(by_hand(ours, theirs, kind, temperature), rel=1e-12)
    if kind == "soft":
        assert distillation_loss(theirs, theirs, kind, temperature).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("kind", "alpha", "temperature"), [("hard", 0.5, 1.0), ("soft", 0.25, 2.0), ("soft", 0.0, 1.0)])
def test_loss_of_a_classifier(kind, alpha, temperature, teacher):
    model = classifier(teacher, kind=kind, alpha=alpha, temperature=temperature).train()
    image, label = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 1])
    model.backbone.stages.eval()  # no dropped paths: two passes must agree
    first, second = model.backbone(image)
    reference = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    reference.load_state_dict(torch.load(teacher)["model"])
    with torch.no_grad():
        lesson = by_hand(second, reference(image), kind, temperature)
    base = torch.nn.functional.cross_entropy(first, label).item()
    losses = model(image, label, mode="loss")
    assert losses["loss"].item() == pytest.approx((1 - alpha) * base + alpha * lesson, rel=1e-5)
    assert losses["top1"].item() == (first.argmax(1) == label).float().mean().item() * 100
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_teacher_is_no_part_of_the_model(teacher):
    model = classifier(teacher).train()
    names = [set(model.state_dict()), {name for name, _ in model.named_parameters()}, len(list(model.modules()))]
    image, label = torch.randn(2, 1, 32, 32), torch.tensor([0, 1])
    state = torch.random.get_rng_state()
    frozen = model.distillation.prepare("cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    before = copy.deepcopy(frozen.state_dict())
    model(image, label, mode="loss")["loss"].backward()
    model.train()
    assert model.distillation.prepare("cpu") is frozen and not any(part.training for part in frozen.modules())
    assert differences(before, frozen.state_dict()) == []
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in frozen.parameters())
    after = [set(model.state_dict()), {name for name, _ in model.named_parameters()}, len(list(model.modules()))]
    assert after == names and not any("teacher" in name and "head.teacher" not in name for name in names[0])
    grouped = [parameter for group in parameter_groups(model, 1e-3, 0.05) for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in model.parameters()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # a moving average is made like this
        assert twin.distillation._model is None and model.distillation._model is frozen


def test_teacher_sees_the_mixed_images(data, tmp_path, teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(Distillation, "teach", lambda self, image: seen.append(image) or torch.zeros(len(image), 3))
    runner = Runner.from_cfg(config(data, tmp_path, teacher, epochs=1))
    runner.bare_model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    runner.train()
    assert len(seen) > 2 and len(seen) % 2 == 0
    assert all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2]))


def test_precision_of_the_teacher(teacher):
    image = torch.randn(2, 1, 32, 32)
    exact = classifier(teacher).distillation.teach(image)
    with torch.autocast("cpu", torch.bfloat16):
        same, rounded = (classifier(teacher, autocast=value).distillation.teach(image) for value in (False, True))
    assert torch.equal(exact, same) and rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded) and torch.allclose(exact, rounded, atol=0.05)


def test_teacher_of_our_own(tmp_path):
    model = vision_ssm.create_model("groupmamba_micro", num_classes=3, in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    options = dict(teacher="groupmamba_micro", checkpoint=str(tmp_path / "teacher.pth"), kind="soft")
    student = ImageClassifier(STUDENT, 3, CROSS_ENTROPY, distillation=options).train()
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(student.distillation.teach(image), model(image))


@pytest.mark.parametrize("distillation", [None, dict(kind="none"), dict(kind="none", teacher="x", checkpoint="y")])
def test_without_a_teacher_the_second_classifier_is_frozen(distillation, caplog):
    model = ImageClassifier(STUDENT, 3, CROSS_ENTROPY, distillation=distillation).train()
    assert model.distillation is None
    image, label = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 1])
    model.backbone.stages.eval()
    loss = model(image, label, mode="loss")["loss"]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model.backbone(image)[0], label))
    loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.head.teacher.weight", "backbone.head.teacher.bias"}
    assert frozen == {name for name, parameter in model.named_parameters() if parameter.grad is None}
    names = [name for group in parameter_groups(model, 1e-3, 0.05) for name in group["param_names"]]
    assert not frozen & set(names)


def test_single_classifier_is_not_touched():
    model = ImageClassifier({**STUDENT, "distilled": False}, 3, CROSS_ENTROPY)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kind="soft"), ValueError, "needs a teacher with weights"),
        (dict(teacher="test_resnet"), ValueError, "needs a teacher with weights"),
        (dict(teacher="test_resnets", checkpoint="x"), KeyError, "unknown teacher 'test_resnets'.*Did you mean 'test_resnet'"),
        (dict(teacher="test_resnet", checkpoint="x", kind="sof"), ValueError, "unknown kind of distillation 'sof'. Did you mean 'soft'"),
        (dict(teacher="test_resnet", checkpoint="x", alpha=1.5), ValueError, r"alpha in \[0, 1\].*got 1.5 and 1.0"),
        (dict(teacher="test_resnet", checkpoint="x", temperature=0), ValueError, "temperature above 0"),
        (dict(teacher="test_resnet", file="x"), TypeError, "distillation got unknown keyword 'file'"),
    ],
)  # fmt: skip
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        ImageClassifier(STUDENT, 3, CROSS_ENTROPY, distillation=options)


def test_student_with_one_classifier(teacher):
    model = classifier(teacher, {**STUDENT, "distilled": False}).train()
    with pytest.raises(TypeError, match="needs a model with two classifiers"):
        model(torch.randn(2, 1, 32, 32), torch.tensor([0, 1]), mode="loss")


def test_missing_weights_are_named_before_training(data, tmp_path):
    cfg = config(data, tmp_path, tmp_path / "regnety.pth")
    cfg.model.distillation.teacher = "regnety_160.deit_in1k"
    runner = Runner.from_cfg(cfg)
    with pytest.raises(FileNotFoundError) as error:
        runner.train()
    message = str(error.value)
    assert str(tmp_path / "regnety.pth") in message
    assert "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth" in message
    assert not list(tmp_path.glob("*.pth")) and runner.iter == 0


def test_weights_of_another_model(teacher, tmp_path):
    model = ImageClassifier(
        STUDENT, 3, CROSS_ENTROPY, distillation=dict(teacher="test_vit", checkpoint=str(teacher))
    )
    with pytest.raises(CheckpointError, match="does not fit the teacher test_vit with 3 classes and 1 channels"):
        model.distillation.prepare("cpu")
    other = ImageClassifier(STUDENT, 4, CROSS_ENTROPY, distillation=dict(teacher="test_resnet", checkpoint=str(teacher)))
    with pytest.raises(CheckpointError, match="size mismatch for fc.weight"):
        other.distillation.prepare("cpu")


@runs_are_exact
def test_resume_is_exact_and_checkpoints_hold_no_teacher(data, teacher, tmp_path):
    Runner.from_cfg(config(data, tmp_path / "unbroken", teacher, kind="soft")).train()
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "unbroken" / "iter_4.pth", tmp_path / "resumed")
    moved = shutil.copy(teacher, tmp_path / "moved.pth")  # the place of the teacher's file does not count
    cfg = config(data, tmp_path / "resumed", Path(moved), kind="soft")
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    unbroken, resumed = (read_training(tmp_path / name / "epoch_2.pth") for name in ("unbroken", "resumed"))
    for part in EXACT:
        assert differences(unbroken[part], resumed[part], part) == []
    bare = set(ImageClassifier(STUDENT, 3, CROSS_ENTROPY).state_dict())
    averaged = {key.removeprefix("module.") for key in unbroken["unaveraged_state_dict"]} - {"steps"}
    assert set(unbroken["state_dict"]) == averaged == bare

    (tmp_path / "moved.pth").unlink()
    cfg = config(data, tmp_path / "tested", Path(moved))  # an evaluation asks for no teacher
    cfg.load_from = str(tmp_path / "unbroken" / "epoch_2.pth")
    assert 0 <= Runner.from_cfg(cfg).test()["top1"] <= 100


def test_what_of_a_teacher_counts_for_a_resume(data, teacher, tmp_path):
    one, two = (fingerprint(config(data, tmp_path, file)) for file in (teacher, Path("elsewhere.pth")))
    assert one == two and one["model.distillation.teacher"] == "'test_resnet'"
    assert fingerprint(config(data, tmp_path, teacher, alpha=0.4)) != one
    check_option(config(data, tmp_path, teacher), "model.distillation.temperature")


@pytest.mark.parametrize("name", ["groupmamba_micro", "vcmamba_micro"])
def test_prediction_averages_the_two_classifiers(name, data, tmp_path):
    model = vision_ssm.create_model(name, num_classes=3, in_chans=1).eval()
    torch.save(model.state_dict(), tmp_path / "student.pth")
    predictor = Predictor.from_weights(name, tmp_path / "student.pth", device="cpu")
    file = next((data / "val").rglob("*.png"))
    (found,) = predictor([file]).values()
    with torch.no_grad():
        image = predictor.transform(load_image(str(file), 1))[None]
        expected = model(image).softmax(1).sort(descending=True).values[0]
    assert [value for _, value in found] == pytest.approx(expected.tolist())


@pytest.mark.slow
def test_two_processes(data, teacher, tmp_path):
    cfg = config(data, tmp_path / "run", teacher, epochs=1)
    cfg.dump(tmp_path / "two.py")
    process = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tools" / "train.py",
        tmp_path / "two.py", "--launcher", "pytorch",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    state = read_training(tmp_path / "run" / "epoch_1.pth")
    assert state["meta"]["world_size"] == 2 and torch.isfinite(state["history"]["iterations"][:, 1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
def test_cuda_graphs_change_nothing(kind, data, teacher, tmp_path):
    losses = []
    for graphs in (False, True):
        cfg = config(data, tmp_path / str(graphs), teacher, kind=kind)
        cfg.model.cuda_graphs = graphs
        model = Runner.from_cfg(cfg).train()
        recorded = model.graphed is not None and model.graphed._recording is not None
        assert recorded is graphs and model.backbone.head.teacher.weight.requires_grad is (kind != "none")
        losses.append(read_training(tmp_path / str(graphs) / "epoch_2.pth")["history"]["iterations"][:, 1])
    assert torch.allclose(*losses, rtol=0, atol=1e-2)

"""Parts of the training engine: optimizer groups, precision, classifier, metrics, checkpoints, the watch for NaN."""

import copy
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_support import BATCH, CLASSES, EXACT, ITERATIONS, differences, plain, runs_are_exact, small_config
from mmengine.logging import MessageHub
from mmengine.runner import EpochBasedTrainLoop
from timm.models import group_parameters
from torch import nn

from vision_ssm import CheckpointError, create_model
from vision_ssm.engine import (
    ClassificationMetric,
    EpochTrainLoop,
    GraphedCall,
    ImageClassifier,
    MixedPrecisionOptimWrapper,
    NonFiniteError,
    ParameterGroups,
    ProgressHook,
    RecordHook,
    Runner,
    build_loss,
    find_non_finite,
    parameter_groups,
    read_training,
    write_checkpoint,
)
from vision_ssm.engine.checkpoint import (
    fingerprint,
    fingerprint_differences,
    is_plain,
    pack_messages,
    preserved_rng,
    rng_state,
    set_rng_state,
    unpack_messages,
)
from vision_ssm.engine.config import prepare_training
from vision_ssm.engine.graphs import check_graphs

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # accumulated gradients

LABEL_SMOOTHING = dict(type="LabelSmoothingCrossEntropy", smoothing=0.1)
MICRO = dict(name="vmamba_micro", in_chans=1, dims=8, depths=(1, 1))


@pytest.fixture
def classifier() -> ImageClassifier:
    return ImageClassifier(backbone=MICRO, num_classes=3, loss=LABEL_SMOOTHING)


def batch(count: int = 4, classes: int = 3) -> dict:
    return dict(
        image=torch.randn(count, 1, 32, 32),
        label=torch.arange(count) % classes,
        path=[f"picture_{index}.png" for index in range(count)],
    )


# Parameter groups


def test_every_parameter_is_in_exactly_one_group(classifier):
    for options in ({}, dict(layer_decay=0.7), dict(decay=["*.A_log"], no_decay=["*mlp.fc1.weight"], layer_decay=0.5)):
        groups = parameter_groups(classifier, 1e-3, 0.05, **options)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(parameter) for parameter in classifier.parameters()}


def decays(groups: list[dict]) -> dict[str, float]:
    return {name: group["weight_decay"] for group in groups for name in group["param_names"]}


def test_weight_decay_follows_dimensions_model_and_patterns(classifier):
    exempt = {f"backbone.{name}" for name in classifier.backbone.no_weight_decay()}
    assert any(name.endswith(".A_log") for name in exempt) and any(name.endswith(".dt_proj_bias") for name in exempt)
    found = decays(parameter_groups(classifier, 1e-3, 0.05))
    for name, parameter in classifier.named_parameters():
        assert found[name] == (0.0 if parameter.ndim <= 1 or name in exempt else 0.05), name
    found = decays(
        parameter_groups(classifier, 1e-3, 0.05, decay=["*.A_log", "*.dt_proj_bias"], no_decay=["head.weight"])
    )
    for name, parameter in classifier.named_parameters():
        if name.endswith((".A_log", ".dt_proj_bias")):
            assert parameter.ndim > 1 and found[name] == 0.05, name
    assert found["backbone.head.weight"] == 0.0


def test_only_named_parameters_are_spared_if_asked(classifier):
    groups = parameter_groups(classifier, 1e-3, 0.05, no_decay=["*norm*"], only_named=True)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    for group in groups:
        for name in group["param_names"]:
            assert (group["weight_decay"] == 0.0) is ("norm" in name), name


def test_layer_decay_is_that_of_the_group_matcher(classifier):
    backbone = classifier.backbone
    layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    assert last >= 3  # stem, two blocks, head
    groups = parameter_groups(classifier, 1.0, 0.05, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    for name, layer in layers.items():
        assert rates[f"backbone.{name}"] == 0.5 ** (last - layer), name
    assert rates["backbone.head.weight"] == 1.0 and min(rates.values()) == 0.5**last


def test_frozen_parameters_are_left_out(classifier):
    classifier.backbone.stem.requires_grad_(False)
    names = decays(parameter_groups(classifier, 1e-3, 0.05))
    assert names and not any(".stem." in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decay=["*.A_lgo"]), r"decay='\*\.A_lgo' matches no trainable parameter.* Did you mean 'A_log'"),
        (dict(decay=["*.A_log"], no_decay=["*A_log"]), "matches both decay="),
        (dict(layer_decay=1.5), r"layer_decay must lie in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_group_options(classifier, options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(classifier, 1e-3, 0.05, **options)


def test_layer_decay_needs_a_group_matcher():
    with pytest.raises(ValueError, match="layer_decay needs a model with group_matcher"):
        parameter_groups(nn.Linear(2, 2), 1e-3, 0.05, layer_decay=0.5)


def build_wrapper(model, optimizer=None, paramwise=None, **wrapper):
    optimizer = optimizer or dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    return ParameterGroups(dict(optimizer=optimizer, **wrapper), paramwise)(model)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "lamb"])
def test_optimizers_of_torch_and_timm(classifier, name):
    wrapper = build_wrapper(classifier, dict(type=name, lr=1e-3, weight_decay=0.05))
    assert isinstance(wrapper, MixedPrecisionOptimWrapper)
    assert type(wrapper.optimizer).__name__.lower() == name.lower()
    assert {group["weight_decay"] for group in wrapper.optimizer.param_groups} == {0.0, 0.05}


def test_an_optimizer_may_be_given_as_a_class(classifier):
    assert type(build_wrapper(classifier, dict(type=torch.optim.NAdam, lr=1e-3)).optimizer) is torch.optim.NAdam


@pytest.mark.parametrize(
    ("optimizer", "paramwise", "error", "message"),
    [
        (dict(type="AdanW", lr=1e-3), None, ValueError, "unknown optimizer 'AdanW'. Did you mean 'AdamW'"),
        (dict(type="AdamW", lr=1e-3), dict(layer_deacy=0.5), TypeError, "layer_deacy.*Did you mean 'layer_decay'"),
        (dict(type="AdamW"), None, ValueError, "needs a learning rate"),
        (dict(type="AdamW", lr="abc"), None, TypeError, "optim_wrapper.optimizer.lr takes a number, got 'abc'"),
        (dict(type="AdamW", lr=1e-3, weight_decay=[1]), None, TypeError, r"optimizer.weight_decay takes a number, got \[1\]"),
    ],
)
def test_wrong_optimizers(classifier, optimizer, paramwise, error, message):
    with pytest.raises(error, match=message):
        build_wrapper(classifier, optimizer, paramwise)


# Precision, accumulation, clipping


def test_bf16_runs_matrix_products_in_bfloat16_on_the_cpu():
    model = nn.Linear(4, 4)
    wrapper = build_wrapper(model, precision="bf16")
    with wrapper.optim_context(model):
        assert model(torch.randn(2, 4)).dtype is torch.bfloat16
    wrapper.update_params(model(torch.randn(2, 4)).square().mean())
    assert all(parameter.dtype is torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp16", "needs a GPU; on the CPU use 'bf16'"), ("bf61", "unknown precision 'bf61'. Did you mean 'bf16'")],
)
def test_wrong_precision(precision, message):
    with pytest.raises(ValueError, match=message):
        build_wrapper(nn.Linear(2, 2), precision=precision)


def test_accumulated_gradients_equal_one_large_batch():
    images = torch.randn(8, 4, dtype=torch.float64)
    results = []
    for count in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        wrapper = build_wrapper(
            model, dict(type="SGD", lr=0.1), accumulative_counts=count, clip_grad=dict(max_norm=0.05)
        )
        wrapper.initialize_count_status(model, 0, count)
        for part in images.chunk(count):
            wrapper.update_params(model(part).square().mean())
        results.append(model.weight.detach())
    assert torch.allclose(*results, rtol=1e-12, atol=0)
    torch.manual_seed(0)
    start = nn.Linear(4, 3).double()
    moved = torch.cat([(start.weight - results[0]).flatten() / 0.1])
    assert moved.norm() <= 0.05  # clipped


def test_checkpoints_wait_for_the_optimizer_step():
    model = nn.Linear(2, 2)
    wrapper = build_wrapper(model, accumulative_counts=3)
    wrapper.initialize_count_status(model, 0, 10)
    assert [count for count in range(1, 11) if wrapper.at_boundary(count)] == [3, 6, 9, 10]


# Classifier


def test_modes_of_the_classifier(classifier):
    data = classifier.data_preprocessor(batch())
    logits = classifier(data["image"])
    assert logits.shape == (4, 3)
    losses = classifier(**data, mode="loss")
    smoothed = nn.functional.cross_entropy(logits, data["label"], label_smoothing=0.1)
    assert torch.allclose(losses["loss"], smoothed)
    assert losses["top1"] == (logits.argmax(1) == data["label"]).float().mean() * 100
    results = classifier(**data, mode="predict")
    assert [result["path"] for result in results] == data["path"]
    assert [result["label"] for result in results] == [0, 1, 2, 0]
    assert torch.equal(torch.stack([result["logits"] for result in results]), logits)
    with pytest.raises(ValueError, match="unknown mode 'lose'. Did you mean 'loss'"):
        classifier(**data, mode="lose")


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "SoftTargetCrossEntropy", "BinaryCrossEntropy"])
def test_mixing_gives_soft_targets_and_leaves_the_batch_alone(name):
    model = ImageClassifier(backbone=MICRO, num_classes=3, loss=dict(type=name), mixup=dict(cutmix_alpha=1.0))
    data = batch()
    kept = {key: data[key].clone() for key in ("image", "label")}
    mixed = model.data_preprocessor(data, training=True)
    assert mixed["label"].shape == (4, 3) and torch.allclose(mixed["label"].sum(1), torch.ones(4))
    assert not torch.equal(mixed["image"], kept["image"])
    assert torch.equal(data["image"], kept["image"]) and torch.equal(data["label"], kept["label"])
    assert model(**mixed, mode="loss")["loss"].isfinite()
    assert torch.equal(model.data_preprocessor(data, training=False)["image"], kept["image"])
    with pytest.raises(ValueError, match="holds 3: use an even batch_size and drop_last=True"):
        model.data_preprocessor(batch(3), training=True)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_names_the_file(classifier, label):
    data = batch()
    data["label"][2] = label
    with pytest.raises(ValueError, match=rf"label {label} of picture_2\.png is out of range.* num_classes=3"):
        classifier.data_preprocessor(data, training=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(loss=dict(type="CrossEntropy")),
            ValueError,
            "unknown loss 'CrossEntropy'. Did you mean 'CrossEntropyLoss'",
        ),
        (dict(loss=dict(type="BinaryCrossEntropy", smothing=0.1)), TypeError, "Did you mean 'smoothing'"),
        (dict(mixup=dict(mixup_alpha=0.8)), ValueError, "mixup gives soft targets, which loss 'LabelSmoothing"),
        (dict(loss=dict(type="SoftTargetCrossEntropy")), ValueError, "needs soft targets: set mixup"),
        (dict(mixup=dict(mixup_alhpa=0.8)), TypeError, "Did you mean 'mixup_alpha'"),
        (dict(backbone=dict(dims=8)), ValueError, "needs the name of a model"),
        (dict(backbone=dict(name="vmamba_mirco")), KeyError, "Did you mean 'vmamba_micro'"),
        (dict(reset_head=True), ValueError, "set pretrained=FILE"),
    ],
)
def test_wrong_classifiers(options, error, message):
    with pytest.raises(error, match=message):
        ImageClassifier(**{**dict(backbone=MICRO, num_classes=3, loss=LABEL_SMOOTHING), **options})


def test_pretrained_head_of_another_size_is_replaced_only_when_asked(classifier, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": classifier.state_dict()}, file)
    options = dict(backbone=MICRO, num_classes=5, loss=LABEL_SMOOTHING, pretrained=str(file))
    with pytest.raises(CheckpointError, match=r"3 classes in the file and 5 in the model; pass\s+reset_head=True"):
        ImageClassifier(**options)
    model = ImageClassifier(**options, reset_head=True)
    assert torch.equal(
        model.backbone.stem.state_dict().popitem()[1], classifier.backbone.stem.state_dict().popitem()[1]
    )
    assert model.backbone.head.weight.shape[0] == 5


# Metrics


def metric_of(logits: torch.Tensor, labels: list[int], classes=None, **options):
    metric = ClassificationMetric(**options)
    metric.dataset_meta = dict(classes=classes or tuple("abcdefghij"[: logits.shape[1]]))
    rows = [dict(logits=row, label=label, path=f"{i}.png") for i, (row, label) in enumerate(zip(logits, labels))]
    metric.process(None, rows[:3])
    metric.process(None, rows[3:])
    return metric, metric.evaluate(len(rows))


def test_metrics_against_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    labels = torch.randint(6, (50,), generator=generator).tolist()  # class 6 has no image
    metric, found = metric_of(logits, labels)
    order = logits.argsort(1, descending=True)
    top = {k: 100 * np.mean([label in row[:k] for row, label in zip(order.tolist(), labels)]) for k in (1, 5)}
    assert found["top1"] == pytest.approx(top[1]) and found["top5"] == pytest.approx(top[5])
    per_class = [np.mean([order[i, 0] == c for i in range(50) if labels[i] == c]) for c in range(6)]
    assert found["mean_class_accuracy"] == pytest.approx(100 * np.mean(per_class))
    assert found["cross_entropy"] == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor(labels)).item())
    rows = metric.evaluation.per_class()
    assert [row["images"] for row in rows] == [labels.count(c) for c in range(7)]
    assert rows[2]["accuracy"] == pytest.approx(100 * per_class[2]) and np.isnan(rows[6]["accuracy"])
    confusion = metric.evaluation.confusion
    assert confusion.sum() == 50 and confusion.trace() == sum(row["correct"] for row in rows)
    wrong = confusion[0].clone()
    wrong[0] = 0
    assert rows[0]["mistaken_for"] == "abcdefg"[int(wrong.argmax())]


def test_metrics_do_not_reward_equal_or_broken_logits():
    _, found = metric_of(torch.zeros(4, 7), [0, 1, 5, 6])
    assert found["top1"] == 25 and found["top5"] == 50
    broken = torch.full((4, 7), float("nan"))
    metric, found = metric_of(broken, [0, 1, 5, 6])
    assert found["top1"] == 0 and found["top5"] == 0


def test_metrics_without_top5_for_few_classes_and_with_prefix():
    _, found = metric_of(torch.eye(4), [0, 1, 2, 3], prefix="val")
    assert set(found) == {"val/top1", "val/mean_class_accuracy", "val/cross_entropy"} and found["val/top1"] == 100


def test_metric_names_the_file_of_an_impossible_label():
    with pytest.raises(ValueError, match=r"label 4 of 1\.png is out of range: the model has 4 classes"):
        metric_of(torch.eye(4), [0, 4, 2, 3])


# Checkpoints


def test_random_state_round_trip_through_a_file(tmp_path):
    for draw in (lambda: random.gauss(0, 1), lambda: np.random.normal(), lambda: torch.randn(1).item()):
        draw()
    write_checkpoint({"state_dict": {}, "rng": rng_state()}, tmp_path / "state.pth")
    first = random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist(), random.random(), np.random.rand()
    set_rng_state(read_training(tmp_path / "state.pth")["rng"])
    assert first == (random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist(), random.random(), np.random.rand())
    before = rng_state()
    with preserved_rng():
        random.random(), np.random.rand(), torch.rand(1)
    assert differences(before, rng_state()) == []


def test_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "epoch_1.pth"
    write_checkpoint({"state_dict": {"weight": torch.ones(3)}}, file)

    class Unsaveable:
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"state_dict": {"weight": torch.zeros(1000)}, "x": Unsaveable()}, file)
    assert torch.equal(read_training(file)["state_dict"]["weight"], torch.ones(3))


def test_full_disk_is_reported_and_leaves_the_last_checkpoint(tmp_path):
    write_checkpoint({"state_dict": {"weight": torch.ones(10)}}, tmp_path / "epoch_1.pth")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(CheckpointError, match="could not write checkpoint") as error:
            write_checkpoint({"state_dict": {"weight": torch.zeros(1_000_000)}}, tmp_path / "epoch_1.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.search(r"MiB written, [\d.]+ MiB free", str(error.value)) and "are untouched" in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pth"]
    assert torch.equal(read_training(tmp_path / "epoch_1.pth")["state_dict"]["weight"], torch.ones(10))


def test_checkpoints_hold_nothing_that_could_be_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": {"weight": torch.ones(1)}, "payload": Payload()}, tmp_path / "bad.pth")
    try:
        read_training(tmp_path / "bad.pth")
    except CheckpointError:
        pass
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(1)}, "is not a checkpoint of a training run"),
        (None, "truncated, corrupt, or no checkpoint"),
    ],
)
def test_unusable_checkpoints(tmp_path, content, message):
    file = tmp_path / "file.pth"
    if content is None:
        torch.save({"state_dict": {"weight": torch.zeros(10_000)}}, file)
        file.write_bytes(file.read_bytes()[:20_000])
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        read_training(file)


def test_message_hub_survives_as_plain_values(tmp_path):
    hub = MessageHub.get_instance("test_message_hub")
    for value in range(2000):
        hub.update_scalar("train/loss", value / 7)
    hub.update_info("best_value", 12.5)
    hub.update_info("unsaveable", object())
    packed = pack_messages(hub)
    write_checkpoint({"state_dict": {}, "hub": packed}, tmp_path / "hub.pth")
    other = MessageHub.get_instance("test_message_hub_restored")
    unpack_messages(other, read_training(tmp_path / "hub.pth")["hub"])
    assert other.get_info("best_value") == 12.5 and other.get_info("unsaveable") is None
    assert other.get_scalar("train/loss").mean(20) == hub.get_scalar("train/loss").mean(20)
    other.update_scalar("train/loss", 1.0)
    assert not is_plain({"a": [object()]}) and is_plain({"a": [1, 2.0, None, ("b", True)]})


def test_fingerprint_covers_what_decides_the_numbers(tmp_path):
    cfg = small_config(tmp_path, tmp_path)
    base = fingerprint(cfg)
    assert base["model.backbone.name"] == "'vmamba_micro'" and "train_dataloader.dataset.transform.rotation" in base
    other = small_config(tmp_path / "elsewhere", tmp_path / "elsewhere")
    other.train_dataloader.num_workers = 7
    other.default_hooks.checkpoint.keep = 9
    other.model.cuda_graphs = True
    assert fingerprint(other) == base
    other.custom_hooks = []
    other.train_dataloader.dataset.transform.rotation = 3.0
    lines = fingerprint_differences(base, fingerprint(other))
    assert any("EMAHook" in line and "config not set" in line for line in lines)
    assert "train_dataloader.dataset.transform.rotation: checkpoint 10.0, config 3.0" in lines


# CUDA graphs, without a GPU: what is recorded when; test_engine_gpu.py has the numbers


class Recorder:
    """Stands for `torch.cuda.make_graphed_callables`: calls the function as often, and counts what is replayed."""

    def __init__(self):
        self.recorded, self.replays = [], 0

    def __call__(self, function, sample_args, num_warmup_iters, allow_unused_input, capture_error_mode):
        assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        self.recorded.append(tuple(sample_args[0].shape))
        for _ in range(num_warmup_iters + 1):
            inputs = [value for value in sample_args if value.requires_grad]
            torch.autograd.grad(function(*sample_args).sum(), inputs, allow_unused=allow_unused_input)

        def replay(*arguments):
            self.replays += 1
            return function(*arguments)

        return replay


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    return recorder


def noisy_network() -> nn.Sequential:
    """Any image size; buffers that change in training, and random numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def test_graphs_are_recorded_once_and_replayed_in_training_alone(recorder):
    graphed = GraphedCall(noisy_network())
    for _ in range(3):
        graphed(torch.randn(4, 1, 8, 8)).sum().backward()
    assert recorder.recorded == [(4, 1, 8, 8)] and recorder.replays == 3
    graphed(torch.randn(3, 1, 8, 8))  # the last batch
    graphed(torch.randn(4, 1, 9, 9))
    graphed(torch.randn(4, 1, 8, 8, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        graphed(torch.randn(4, 1, 8, 8))
    with torch.no_grad():
        graphed(torch.randn(4, 1, 8, 8))
    graphed.module.eval()
    graphed(torch.randn(4, 1, 8, 8))
    assert len(recorder.recorded) == 1 and recorder.replays == 3
    graphed.module.train()
    graphed(torch.randn(4, 1, 8, 8))
    assert len(recorder.recorded) == 1 and recorder.replays == 4


def test_graphs_are_recorded_of_whole_batches(recorder):
    graphed = GraphedCall(noisy_network(), batch_size=4)
    assert graphed(torch.randn(3, 1, 8, 8)).shape == (3, 3) and recorder.recorded == []
    graphed(torch.randn(4, 1, 8, 8))
    assert recorder.recorded == [(4, 1, 8, 8)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recording_leaves_no_trace(dtype, recorder):
    """The first call gives the numbers of the module itself, and leaves the same random state and statistics."""
    image, results = torch.randn(4, 1, 8, 8), []
    start = noisy_network()
    for graphs in (False, True):
        module = copy.deepcopy(start)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = GraphedCall(module)(image) if graphs else module(image)
        output.float().square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([output, gradients, dict(module.named_buffers()), rng_state()])
    assert recorder.replays == 1 and results[1][0].dtype == (dtype or torch.float32)
    assert differences(*results) == []
    assert results[1][2]["1.num_batches_tracked"] == 1


def test_what_a_recording_does_not_hold_for_runs_without(recorder):
    image = torch.randn(4, 1, 8, 8)
    graphed = GraphedCall(noisy_network())
    graphed(image)
    seen = []
    handle = graphed.module[0].register_forward_hook(lambda *_: seen.append(True))
    graphed(image)
    assert seen == [True] and recorder.replays == 1
    handle.remove()
    graphed(image)
    assert recorder.replays == 2
    weight = graphed.module[-1].weight
    weight.requires_grad_(False)
    graphed(image)
    weight.requires_grad_(True)
    weight.data = weight.data.clone()
    graphed(image)
    assert len(recorder.recorded) == 1 and recorder.replays == 2


def test_what_cannot_be_recorded(monkeypatch, recorder):
    graphed, image = GraphedCall(noisy_network()), torch.randn(4, 1, 8, 8)
    handle = graphed.module[2].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"Sequential has hooks \(on 2\), which CUDA graphs would not call: remove"):
        graphed(image)
    handle.remove()

    def capture(function, sample_args, **options):
        function(*sample_args)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    state = rng_state()
    with pytest.raises(RuntimeError, match="not permitted") as error:
        graphed(image)
    assert "cuda_graphs=True, --cuda-graphs" in error.value.__notes__[0]
    assert differences(state, rng_state()) == [] and graphed.module[1].num_batches_tracked == 0


def test_classifier_replays_its_backbone_for_the_loss_alone(recorder):
    model = ImageClassifier(MICRO, 3, LABEL_SMOOTHING, cuda_graphs=True)
    plain_model = ImageClassifier(MICRO, 3, LABEL_SMOOTHING)
    assert plain_model.graphed is None and model.state_dict().keys() == plain_model.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain_model.named_modules()]
    plain_model.load_state_dict(model.state_dict())
    data = batch()
    losses = [one.train()(**data, mode="loss") for one in (plain_model, model)]
    assert differences(*losses) == [] and recorder.replays == 1
    model(data["image"])
    model(**data, mode="predict")
    model.eval()(**data, mode="loss")
    assert recorder.replays == 1


def test_copy_of_a_classifier_starts_without_a_recording(recorder):
    model = ImageClassifier(MICRO, 3, LABEL_SMOOTHING, cuda_graphs=True).train()
    model(**batch(), mode="loss")
    forward = model.backbone.forward
    assert forward.__func__ is type(model.backbone).forward  # not patched
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.graphed.module is twin.backbone and twin.backbone is not model.backbone
        assert differences(model.state_dict(), twin.state_dict()) == []
        count = len(recorder.recorded)
        twin(**batch(), mode="loss")["loss"].backward()
        assert len(recorder.recorded) == count + 1
        assert all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_go_with_graphs_is_listed():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(noisy_network())
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as error:
        check_graphs(module, accumulative_counts=4, distributed=True, compiled=True)
    message = str(error.value)
    assert message.startswith("cuda_graphs=True (--cuda-graphs) cannot be used here")
    assert "the model is on the cpu, CUDA graphs need a CUDA device: train on a GPU" in message
    assert "1 is a SyncBatchNorm, which communicates in the forward pass" in message
    assert "the config sets compile" in message and "use one of the two" in message
    assert "accumulative_counts is 4, expected 1" in message and "use a larger batch" in message
    assert "Sequential has hooks (on the whole module)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: cfg.optim_wrapper.update(accumulative_counts=2), "accumulative_counts is 2, expected 1"),
        (lambda cfg: cfg.update(compile=dict()), "the config sets compile"),
    ],
)
def test_run_that_does_not_go_with_graphs_is_refused_before_training(change, message, data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.model.cuda_graphs = True
    change(cfg)
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(cfg).build_training()


@pytest.mark.filterwarnings("ignore:cannot read image")
def test_unreadable_images_are_reported_by_every_process(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "data")
    broken = next((tmp_path / "data" / "train").rglob("*.png"))
    broken.write_bytes(b"")
    runner = Runner.from_cfg(small_config(tmp_path / "data", tmp_path / "run", 1))
    runner.train()
    report = f"1 of {ITERATIONS * BATCH} files of .* could not be read and were replaced by their neighbours: .*{broken.name}"
    assert re.search(report, next(tmp_path.rglob("*.log")).read_text())
    monkeypatch.setattr("vision_ssm.engine.runner.is_main_process", lambda: False)
    capsys.readouterr()
    runner._report_skipped(runner.train_dataloader.dataset)
    assert re.search(f"In process 0: {report}", capsys.readouterr().err)


@runs_are_exact
def test_run_through_recorded_calls_equals_a_run_without(data, tmp_path, recorder, monkeypatch):
    """Averaged weights, validation and a resume in mid-epoch included; the switch may be flipped for the resume."""
    monkeypatch.setattr("vision_ssm.engine.runner.check_graphs", lambda *args, **options: None)  # no GPU here

    def run(name: str, graphs: bool, start: Path | None = None) -> dict:
        cfg = small_config(data, tmp_path / name)
        cfg.default_hooks.checkpoint.update(every_iterations=4, keep=20)
        cfg.model.cuda_graphs = graphs
        if start is not None:
            cfg.resume, cfg.load_from = True, str(start)
        Runner.from_cfg(cfg).train()
        return read_training(tmp_path / name / "epoch_2.pth")

    without = run("without", False)
    assert recorder.recorded == []
    middle = tmp_path / "without" / "iter_12.pth"
    for name, start in (("through", None), ("resumed", middle)):
        recorder.recorded.clear()
        through = run(name, True, start)
        assert recorder.recorded == [(4, 1, 32, 32)]
        for part in EXACT:
            assert differences(without[part], through[part], part) == []


def test_switches_reach_the_config(data, tmp_path):
    small_config(data, tmp_path).dump(tmp_path / "small.py")
    flags = dict(work_dir=None, data_root=None, cfg_options={}, launcher="none", amp=None, seed=None,
                 deterministic=False, resume=None, resume_anyway=False)  # fmt: skip
    for given in (False, True):
        cfg = prepare_training(Namespace(config=str(tmp_path / "small.py"), cuda_graphs=given, fsdp=given, **flags))
        assert cfg.model.get("cuda_graphs", False) is given and cfg.get("fsdp", False) is given


# The watch for NaN


class Root(nn.Module):
    """Square root whose value at 0 is finite and whose gradient there is not."""

    def forward(self, x):
        return (x * 0).sqrt()


class Poison(nn.Module):
    def forward(self, x):
        return x / (x - x)


def wrap(model: ImageClassifier, module: nn.Module) -> None:
    """Put `module` behind the MLP of the last block."""
    block = model.backbone.stages[1].blocks[0]
    block.mlp = nn.Sequential(block.mlp, module)


def test_first_non_finite_output_is_named(classifier):
    wrap(classifier, Poison())
    message = find_non_finite(classifier, batch())
    assert "first non-finite output in backbone.stages.1.blocks.0.mlp.1 (Poison), whose inputs are (4, " in message


def test_first_non_finite_parameter_is_named(classifier):
    with torch.no_grad():
        classifier.backbone.stages[0].blocks[0].mlp.fc1.weight[0, 0] = float("inf")
    assert find_non_finite(classifier, batch()) == "parameter backbone.stages.0.blocks.0.mlp.fc1.weight is not finite"


def test_first_non_finite_gradient_is_named(classifier):
    wrap(classifier, Root())
    message = find_non_finite(classifier, batch())
    where = "backbone.stages.1.blocks.0.mlp.0.fc2 (Linear)"
    assert message.startswith(f"the backward pass is not finite from the output of {where} on")
    assert "parameters with a non-finite gradient: backbone.stages.1.blocks.0.mlp.0.fc2.bias" in message
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_non_finite_image_is_named(classifier):
    data = batch()
    data["image"][1, 0, 3, 3] = float("nan")
    assert find_non_finite(classifier, data) == "the image picture_1.png is not finite after its transform"


def test_finite_model_is_not_accused(classifier):
    assert "repeating the iteration gave finite numbers" in find_non_finite(classifier, batch())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("module", "what"), [(Poison, "loss"), (Root, "gradient")])
def test_training_stops_before_weights_are_poisoned(module, what, fused, data, tmp_path):
    cfg = plain(small_config(data, tmp_path))
    cfg.optim_wrapper.optimizer.fused = fused  # a fused optimizer skips the step by itself
    runner = Runner.from_cfg(cfg)
    model = runner.bare_model
    wrap(model, module())
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError) as error:
        runner.train()
    message = str(error.value)
    assert f"the {what} became nan in iteration 1 (epoch 1): " in message and "stages.1.blocks.0.mlp" in message
    assert "No weight was changed" in message and ".png" in message
    assert differences(start, model.state_dict()) == []
    assert all(float(state["step"]) == 0 for state in runner.optim_wrapper.optimizer.state.values())


def watched(parameter, groups=None, **options):
    """A wrapper of SGD without momentum on `parameter`, whose guard refuses what is not finite."""
    wrapper = MixedPrecisionOptimWrapper(torch.optim.SGD(groups or [parameter], lr=1.0, **options.pop("sgd", {})), **options)

    def guard(what, value):
        if not torch.isfinite(value).all():
            raise NonFiniteError(what)

    wrapper.guards.append(guard)
    return wrapper


@pytest.mark.parametrize("fused", [False, True])
def test_infinite_gradients_are_seen_before_they_are_clipped(fused):
    weight = torch.nn.Parameter(torch.zeros(2))
    wrapper = watched(weight, sgd=dict(fused=fused), clip_grad=dict(type="value", clip_value=1.0))
    with pytest.raises(NonFiniteError, match="gradient"):
        wrapper.update_params((weight + 1e-30).sqrt().sum() * 1e30)
    assert torch.equal(weight, torch.zeros(2))


def test_a_group_that_is_not_fused_is_stepped_behind_its_guards():
    """As in a run that goes on from a checkpoint of an optimizer that was not fused."""
    weight, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    wrapper = watched(weight, [dict(params=[weight]), dict(params=[other], fused=False)], sgd=dict(fused=True))
    wrapper.update_params((weight * other).sum())
    assert torch.equal(weight, torch.zeros(2)) and torch.equal(other, torch.zeros(2))
    saved = torch.optim.SGD([weight, other], lr=1.0).state_dict()
    wrapper = watched(weight, [weight, other], sgd=dict(fused=True))
    wrapper.load_state_dict(saved)
    wrapper.update_params((weight + other).sum())
    assert torch.equal(weight, -torch.ones(2))


def test_a_loss_is_forgotten_with_its_iteration():
    weight = torch.nn.Parameter(torch.ones(2))
    wrapper = watched(weight, sgd=dict(fused=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        wrapper.update_params(torch.tensor(float("nan")))
    weight.sum().backward()
    wrapper.step()
    assert torch.equal(weight, torch.zeros(2))


def test_fused_step_is_that_of_a_step_behind_its_guards(classifier):
    weights, seen = [], []
    for fused in (False, True):
        model = copy.deepcopy(classifier)
        wrapper = MixedPrecisionOptimWrapper(
            torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused), clip_grad=dict(max_norm=1.0)
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        changed = []

        def guard(what, value, model=model, before=before, changed=changed):
            changed.append((what, bool(torch.isfinite(value)), differences(before, model.state_dict()) != []))

        wrapper.guards.append(guard)
        for _ in range(3):
            torch.manual_seed(0)
            model.train_step(batch(), wrapper)
        weights.append(model.state_dict())
        seen.append(changed[:2])
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)
    assert seen[0] == [("loss", True, False), ("gradient", True, False)]
    assert seen[1] == [("loss", True, True), ("gradient", True, True)]  # behind the step, which needs no wait


# Whole runs


def test_run_writes_everything_a_person_wants(data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.visualizer.vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    cfg.optim_wrapper.precision = "bf16"
    Runner.from_cfg(cfg).train()
    names = {file.name for file in tmp_path.iterdir()}
    wanted = {"best_top1.pth", "epoch_1.pth", "epoch_2.pth", "last_checkpoint", "curves.png", "confusion_matrix.png",
              "predictions.png", "per_class.csv", "history.json", "environment.json", "quickstart_digits.py"}  # fmt: skip
    assert wanted <= names
    assert list(tmp_path.rglob("events.out.tfevents*")) and list(tmp_path.rglob("scalars.json"))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["torch"] == torch.__version__ and "git" in environment
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"train_loss", "train_top1", "lr", "val_top1", "val_mean_class_accuracy"} <= set(history[0])
    assert (tmp_path / "per_class.csv").read_text().splitlines()[1].startswith('"bars",4,')
    best = read_training(tmp_path / "best_top1.pth")
    assert best["meta"]["value"] == max(row["val_top1"] for row in history) and "optimizer" not in best
    assert best["meta"]["dataset_meta"]["classes"] == CLASSES
    # The weights to use are the averaged ones; the library's loader takes them from the file as it is.
    last = read_training(tmp_path / "epoch_2.pth")
    model = create_model(**MICRO, num_classes=3, pretrained=tmp_path / "epoch_2.pth")
    averaged, raw = last["state_dict"], last["unaveraged_state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[f"backbone.{name}"])
    assert differences(averaged["backbone.head.weight"], raw["module.backbone.head.weight"])


@runs_are_exact
def test_same_seed_same_run_and_another_seed_another(data, tmp_path):
    finals = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = small_config(data, tmp_path / name, epochs=1)
        cfg.randomness = dict(seed=seed, deterministic=True)
        Runner.from_cfg(cfg).train()
        finals.append(read_training(tmp_path / name / "epoch_1.pth"))
    torch.use_deterministic_algorithms(False)
    for part in ("state_dict", "history", "optimizer"):
        assert differences(finals[0][part], finals[1][part]) == []
    assert not torch.equal(finals[0]["history"]["iterations"][:, 1], finals[2]["history"]["iterations"][:, 1])


@runs_are_exact
def test_loop_trains_like_that_of_mmengine(data, tmp_path):
    """The position in the epoch costs nothing: without noise our loop gives mmengine's weights."""
    weights = []
    for loop in (EpochTrainLoop, EpochBasedTrainLoop):
        cfg = plain(small_config(data, tmp_path / loop.__name__, epochs=1))
        runner = Runner.from_cfg(cfg)
        runner._train_loop = loop(runner, runner._train_dataloader, max_epochs=1)
        runner.train()
        weights.append({name: value.clone() for name, value in runner.model.state_dict().items()})
    assert differences(*weights) == []


def test_learning_rate_is_scaled_by_batch_and_accumulation(data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    cfg.optim_wrapper.accumulative_counts = 2
    runner = Runner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.scale_lr(wrapper, cfg.auto_scale_lr)
    assert {rate for rates in wrapper.get_lr().values() for rate in rates} == {2e-3 * 4 * 2 / 16}


def test_warm_up_and_cosine_go_by_iteration(data, tmp_path):
    cfg = small_config(data, tmp_path, epochs=3)
    cfg.param_scheduler.append(dict(type="ConstantLR", begin=3, by_epoch=True))  # after the end: left out
    runner = Runner.from_cfg(cfg)
    _ = runner.train_loop
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    schedulers = runner.build_param_scheduler(runner.param_schedulers)
    rates = []
    for _ in range(3 * ITERATIONS):
        rates.append(runner.optim_wrapper.get_lr()["base_lr"][0])
        for scheduler in schedulers:
            scheduler.step()
    warm, rest = rates[:ITERATIONS], rates[ITERATIONS:]
    assert len(schedulers) == 2 and warm == pytest.approx(np.linspace(2e-4, 2e-3, ITERATIONS))
    steps = np.arange(2 * ITERATIONS) / (2 * ITERATIONS)
    assert rest == pytest.approx(2e-4 + 0.5 * (2e-3 - 2e-4) * (1 + np.cos(np.pi * steps)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: cfg.model.update(num_classes=2), r"num_classes=2.*Set num_classes=3"),
        (
            lambda cfg: cfg.val_dataloader.dataset.update(classes=("rows", "blob", "bars")),
            "do not have the same classes",
        ),
        (lambda cfg: cfg.default_hooks.checkpoint.update(best="top_1"), r"no metric 'top_1'.*'top1'"),
    ],
)
def test_mistakes_of_a_config_that_only_show_in_a_run(change, message, data, tmp_path):
    cfg = plain(small_config(data, tmp_path))
    cfg.train_dataloader.batch_size = 18
    change(cfg)
    with pytest.raises(ValueError, match=message):
        Runner.from_cfg(cfg).train()


def test_weights_of_another_model_are_refused(data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.model.backbone.dims = 16
    write_checkpoint({"state_dict": ImageClassifier(MICRO, 3, LABEL_SMOOTHING).state_dict()}, tmp_path / "other.pth")
    cfg.load_from = str(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"are not those of this config's model:(.|\n)*size mismatch"):
        Runner.from_cfg(cfg).train()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal_and_log_lines_elsewhere(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    cfg = plain(small_config(data, tmp_path / "terminal"))
    Runner.from_cfg(cfg).train()
    shown = terminal.getvalue()
    assert (
        "epoch 2/2" in shown
        and "images/s" in shown
        and "ETA" in shown
        and f"{2 * ITERATIONS}/{2 * ITERATIONS}" in shown
    )
    assert "Epoch(train)" not in shown and "Epoch(val)" in shown

    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    Runner.from_cfg(plain(small_config(data, tmp_path / "pipe"))).train()
    lines = [line for line in pipe.getvalue().splitlines() if "Epoch(train)" in line]
    assert len(lines) == 2 and all("eta:" in line and "images_per_second:" in line for line in lines)
    for noise in ("Exp name", "Hooks will be executed", "SyncBN", "Config:"):
        assert noise not in pipe.getvalue()


def test_progress_hook_ends_its_display_when_a_run_breaks_off(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    runner = Runner.from_cfg(plain(small_config(data, tmp_path)))
    wrap(runner.bare_model, Poison())
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, ProgressHook)]
    with pytest.raises(NonFiniteError):
        runner.train()
    assert not hook.progress.live.is_started and "epoch 1/2" in terminal.getvalue()


def test_record_hook_without_accuracy():
    hook = RecordHook()
    hook.iterations = [(0.5, 2.0, 1e-3, float("nan")), (1.0, 1.0, 1e-3, float("nan")), (1.5, 0.5, 5e-4, float("nan"))]
    hook.validation = [{"epoch": 1, "top1": 50.0}]
    assert hook.epochs() == [
        {"epoch": 1, "train_loss": 1.5, "lr": 1e-3, "val_top1": 50.0},
        {"epoch": 2, "train_loss": 0.5, "lr": 5e-4},
    ]


def test_data_that_makes_no_batch(data, tmp_path):
    cfg = plain(small_config(data, tmp_path))
    cfg.train_dataloader.update(batch_size=64, drop_last=True)
    with pytest.raises(ValueError, match="36 training images make no batch of 64 in each of 1 process"):
        Runner.from_cfg(cfg).train()


def test_channels_of_data_and_model_must_agree(data, tmp_path):
    cfg = plain(small_config(data, tmp_path))
    cfg.model.backbone.in_chans = 3
    cfg.train_dataloader.dataset.channels = 1
    with pytest.raises(ValueError, match="the data has images of 1 channels, the model takes 3: set model.backbone"):
        Runner.from_cfg(cfg).train()


def test_more_outputs_than_classes(data, tmp_path):
    """What is predicted beyond the classes of the data has a number for a name."""
    cfg = plain(small_config(data, tmp_path, epochs=1))
    cfg.model.num_classes = 5
    runner = Runner.from_cfg(cfg)
    with torch.no_grad():
        runner.bare_model.backbone.head.bias[4] = 100.0
    cfg.optim_wrapper.optimizer.lr = 1e-9
    runner.train()
    assert "class 4" in (tmp_path / "per_class.csv").read_text() and (tmp_path / "predictions.png").exists()


def test_weights_of_classes():
    loss = build_loss(dict(type="CrossEntropyLoss", weight=[1.0, 2.0, 3.0]))
    assert loss.weight.tolist() == [1.0, 2.0, 3.0]

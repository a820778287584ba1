"""Training on a GPU: half precision, exact resume, CUDA graphs, two processes. Run with ``pytest -m gpu``."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_support import BATCH, EXACT, ITERATIONS, ROOT, differences, plain, run_python, small_config
from torch import nn

from vision_ssm.engine import GraphedCall, ImageClassifier, MixedPrecisionOptimWrapper, Runner, read_training
from vision_ssm.engine.checkpoint import preserved_rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def cpu_losses(data, tmp_path_factory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("cpu")
    plain(small_config(data, folder, epochs=4)).dump(folder / "small.py")
    process = run_python(ROOT / "tools" / "train.py", folder / "small.py")
    assert process.returncode == 0, process.stderr[-4000:]
    return read_training(folder / "epoch_4.pth")["history"]["iterations"][:, 1]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_every_precision_follows_the_curve_of_the_cpu(precision, tolerance, cpu_losses, data, tmp_path):
    cfg = plain(small_config(data, tmp_path, epochs=4))
    cfg.optim_wrapper.precision = precision
    Runner.from_cfg(cfg).train()
    state = read_training(tmp_path / "epoch_4.pth")
    losses = state["history"]["iterations"][:, 1]
    assert cpu_losses[-ITERATIONS:].mean() < 0.9 * cpu_losses[:ITERATIONS].mean()
    assert (losses - cpu_losses).abs().max() < tolerance
    assert ("scaler" in state["optimizer"]) is (precision == "fp16")
    assert state["rng"][0]["cuda"] is not None


@contextmanager
def deterministic() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("precision", "graphs"), [("fp32", False), ("fp16", False), ("fp32", True), ("bf16", True), ("fp16", True)]
)
def test_resume_in_mid_epoch_is_exact(precision, graphs, data, tmp_path, recordings):
    def config(work_dir: Path):
        cfg = small_config(data, work_dir, epochs=3)
        cfg.default_hooks.checkpoint.update(every_iterations=4, keep=20)
        cfg.optim_wrapper.precision = precision
        cfg.randomness.deterministic = True
        cfg.env_cfg.cudnn_benchmark = False
        cfg.model.cuda_graphs = graphs
        return cfg

    with deterministic():
        Runner.from_cfg(config(tmp_path / "unbroken")).train()
        (tmp_path / "resumed").mkdir()
        shutil.copy(tmp_path / "unbroken" / "iter_12.pth", tmp_path / "resumed")
        cfg = config(tmp_path / "resumed")
        cfg.resume = True
        Runner.from_cfg(cfg).train()
    assert len(recordings) == 2 * graphs
    unbroken, resumed = (read_training(tmp_path / name / "epoch_3.pth") for name in ("unbroken", "resumed"))
    for part in EXACT:
        assert differences(unbroken[part], resumed[part], part) == []


# CUDA graphs


@pytest.fixture
def recordings(monkeypatch) -> list[tuple]:
    """Sizes of the images that CUDA graphs are recorded for."""
    sizes, record = [], torch.cuda.make_graphed_callables

    def count(function, sample_args, **options):
        sizes.append(tuple(sample_args[0].shape))
        return record(function, sample_args, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", count)
    return sizes


def train(graphs: bool, sizes: list[tuple[int, int]], precision: str = "fp32", drop_path: float = 0.0) -> tuple:
    """Losses and weights of one iteration per (images, size), from equal weights, images and random states."""
    torch.manual_seed(0)
    backbone = dict(name="vmamba_micro", in_chans=1, dims=8, depths=(1, 2), drop_path_rate=drop_path)
    model = ImageClassifier(backbone, 3, dict(type="CrossEntropyLoss"), cuda_graphs=graphs).cuda().train()
    # Without momentum and scaling by past gradients, differences of rounding do not grow.
    wrapper = MixedPrecisionOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.05), precision=precision)
    losses = []
    for images, size in sizes:
        data = dict(image=torch.randn(images, 1, size, size), label=torch.arange(images) % 3, path=[""] * images)
        losses.append(model.train_step(data, wrapper)["loss"].detach())
    return torch.stack(losses), model.state_dict()


def assert_close(got: tuple, want: tuple, tolerance: float) -> None:
    """Losses, and every weight by its norm."""
    assert got[0].tolist() == pytest.approx(want[0].tolist(), rel=tolerance)
    for name, weight in want[1].items():
        assert (got[1][name] - weight).norm() <= tolerance * weight.norm(), name


@pytest.mark.parametrize("drop_path", [0.0, 0.5])  # random numbers go on in replays as they do without
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2), ("fp16", 1e-2)])
def test_graphs_train_like_the_backbone_itself(precision, tolerance, drop_path, recordings):
    sizes = [(8, 32)] * 6
    want = train(False, sizes, precision, drop_path)
    got = train(True, sizes, precision, drop_path)
    assert recordings == [(8, 1, 32, 32)]
    assert_close(got, want, tolerance)


def test_other_sizes_run_without_graphs(recordings):
    """A smaller last batch and a second image size, between replays."""
    sizes = [(8, 32), (8, 32), (5, 32), (8, 32), (8, 48), (8, 32)]
    assert_close(train(True, sizes), train(False, sizes), 1e-5)
    assert recordings == [(8, 1, 32, 32)]


def test_every_replay_drops_other_paths(recordings):
    backbone = dict(name="vmamba_micro", in_chans=1, dims=8, depths=(2, 2), drop_path_rate=0.7)
    model = ImageClassifier(backbone, 3, dict(type="CrossEntropyLoss"), cuda_graphs=True).cuda().train()
    image = torch.randn(8, 1, 32, 32, device="cuda")
    with preserved_rng():
        drawn = [model.graphed(image).detach().clone() for _ in range(4)]
    again = model.graphed(image).detach()
    assert len(recordings) == 1
    assert torch.equal(drawn[0], again)  # the same random state, the same paths
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_recording_leaves_random_state_and_statistics_alone(recordings):
    """After the first call both are what one call of the module itself leaves."""
    start = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).cuda()
    image = torch.randn(8, 1, 16, 16, device="cuda")
    results = []
    for graphs in (False, True):
        module = copy.deepcopy(start)
        torch.manual_seed(1)
        output = GraphedCall(module)(image) if graphs else module(image)
        results.append(
            (output.detach(), dict(module.named_buffers()), torch.cuda.get_rng_state(), torch.get_rng_state())
        )
    (want, statistics, *states), (got, others, *other_states) = results
    assert recordings == [(8, 1, 16, 16)]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert others["1.num_batches_tracked"] == 1
    for name, value in statistics.items():
        assert torch.allclose(others[name], value, rtol=1e-5), name
    assert differences(states, other_states) == []


def test_switch_may_be_flipped_for_a_resume(data, tmp_path, recordings):
    """Training goes on with graphs as it would have without, noise of the model included."""

    def config(work_dir: Path):
        cfg = small_config(data, work_dir)
        cfg.default_hooks.checkpoint.update(every_iterations=4, keep=20)
        cfg.randomness.deterministic = True
        cfg.env_cfg.cudnn_benchmark = False
        return cfg

    with deterministic():
        Runner.from_cfg(config(tmp_path / "without")).train()
        assert recordings == []
        cfg = config(tmp_path / "flipped")
        cfg.model.cuda_graphs = True
        cfg.resume, cfg.load_from = True, str(tmp_path / "without" / "iter_12.pth")
        Runner.from_cfg(cfg).train()
    assert recordings == [(BATCH, 1, 32, 32)]
    without, flipped = (read_training(tmp_path / name / "epoch_2.pth") for name in ("without", "flipped"))
    losses = [state["history"]["iterations"][:, 1] for state in (without, flipped)]
    assert torch.allclose(*losses, rtol=1e-3)
    assert differences(without["rng"], flipped["rng"]) == []


def test_graphs_and_accumulated_gradients_are_refused(data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.model.cuda_graphs = True
    cfg.optim_wrapper.accumulative_counts = 2
    with pytest.raises(ValueError, match="cannot be used here.*\n  optim_wrapper.accumulative_counts is 2"):
        Runner.from_cfg(cfg).train()
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [False, True])
def test_two_gpus_reach_the_loss_of_one_with_twice_the_batch(graphs, data, tmp_path):
    one = plain(small_config(data, tmp_path / "one", epochs=2))
    one.train_dataloader.batch_size = 2 * BATCH
    one.dump(tmp_path / "one.py")
    two = plain(small_config(data, tmp_path / "two", epochs=2))
    two.model.cuda_graphs = graphs
    two.dump(tmp_path / "two.py")
    train = ROOT / "tools" / "train.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for arguments in ([train, tmp_path / "one.py"], [*launch, train, tmp_path / "two.py", "--launcher", "pytorch"]):
        process = run_python(*arguments, gpus=True)
        assert process.returncode == 0, process.stderr[-4000:]
    states = [read_training(tmp_path / name / "epoch_2.pth") for name in ("one", "two")]
    assert states[1]["meta"]["world_size"] == 2
    losses = [state["history"]["iterations"][:, 1] for state in states]
    assert torch.allclose(*losses, rtol=0, atol=1e-3)
    for ours, theirs in zip(*(state["history"]["validation"] for state in states), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-2)

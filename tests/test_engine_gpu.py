"""Training on a GPU: half precision, exact resume, two processes through NCCL. Run with ``pytest -m gpu``."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_support import BATCH, EXACT, ITERATIONS, ROOT, differences, plain, run_python, small_config

from vision_ssm.engine import Runner, read_training

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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_in_mid_epoch_is_exact(precision, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def config(work_dir: Path):
        cfg = small_config(data, work_dir, epochs=3)
        cfg.default_hooks.checkpoint.update(every_iterations=4, keep=20)
        cfg.optim_wrapper.precision = precision
        cfg.randomness.deterministic = True
        cfg.env_cfg.cudnn_benchmark = False
        return cfg

    try:
        Runner.from_cfg(config(tmp_path / "unbroken")).train()
        (tmp_path / "resumed").mkdir()
        shutil.copy(tmp_path / "unbroken" / "iter_12.pth", tmp_path / "resumed")
        cfg = config(tmp_path / "resumed")
        cfg.resume = True
        Runner.from_cfg(cfg).train()
    finally:
        torch.use_deterministic_algorithms(False)
    unbroken, resumed = (read_training(tmp_path / name / "epoch_3.pth") for name in ("unbroken", "resumed"))
    for part in EXACT:
        assert differences(unbroken[part], resumed[part], part) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_reach_the_loss_of_one_with_twice_the_batch(data, tmp_path):
    one = plain(small_config(data, tmp_path / "one", epochs=2))
    one.train_dataloader.batch_size = 2 * BATCH
    one.dump(tmp_path / "one.py")
    two = plain(small_config(data, tmp_path / "two", epochs=2))
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

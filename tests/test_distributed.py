"""Two processes train like one with twice the batch."""

from pathlib import Path

import pytest
import torch
from engine_support import BATCH, ITERATIONS, ROOT, plain, run_python, small_config

from vision_ssm.engine import Runner, read_training


def test_two_processes_reach_the_loss_of_one_with_twice_the_batch(data, tmp_path):
    one = plain(small_config(data, tmp_path / "one", epochs=2))
    one.train_dataloader.batch_size = 2 * BATCH
    Runner.from_cfg(one).train()

    two = plain(small_config(data, tmp_path / "two", epochs=2))
    (tmp_path / "two").mkdir()
    two.dump(tmp_path / "two.py")
    process = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tools" / "train.py",
        tmp_path / "two.py", "--launcher", "pytorch",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]

    first, second = (read_training(tmp_path / name / "epoch_2.pth") for name in ("one", "two"))
    assert second["meta"]["world_size"] == 2 and len(second["rng"]) == 2
    losses = [state["history"]["iterations"][:, 1] for state in (first, second)]
    assert len(losses[0]) == 2 * (ITERATIONS // 2) and losses[0][-1] < losses[0][0]
    assert torch.allclose(*losses, rtol=0, atol=1e-4)
    for name, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][name], rtol=0, atol=1e-4), name
    for ours, theirs in zip(first["history"]["validation"], second["history"]["validation"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert not list(Path(ROOT).glob(".dist_test"))

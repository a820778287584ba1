"""A killed run, resumed, ends exactly where an unbroken one does; what cannot be resumed says why."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from engine_support import EXACT, ITERATIONS, differences, runs_are_exact, small_config
from mmengine.hooks import Hook

from vision_ssm import CheckpointError
from vision_ssm.engine import Runner, commands, read_training
from vision_ssm.engine.checkpoint import newest_checkpoint
from vision_ssm.registry import HOOKS

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .scheduler.step")  # accumulated gradients

EPOCHS = 3
KILLED_AFTER = ITERATIONS + 5  # in the middle of the second epoch
EVERY = 3


class KillHook(Hook):
    priority = "LOWEST"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(file: Path) -> None:
    HOOKS.register_module(module=KillHook)
    commands.train([str(file)])


def config(data: Path, work_dir: Path, workers: int = 0):
    cfg = small_config(data, work_dir, EPOCHS)
    cfg.default_hooks.checkpoint.update(every_iterations=EVERY, keep=20)
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.train_dataloader.num_workers = workers
    cfg.train_dataloader.persistent_workers = workers > 0
    return cfg


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("unbroken")
    Runner.from_cfg(config(data, work_dir)).train()
    return work_dir


def resumed(cfg) -> dict:
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    return read_training(Path(cfg.work_dir) / f"epoch_{EPOCHS}.pth")


@runs_are_exact
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_to_identical_weights_and_curve(workers, data, unbroken, tmp_path):
    cfg = config(data, tmp_path, workers)
    cfg.default_hooks.kill = dict(type="vision_ssm.KillHook")
    cfg.dump(tmp_path / "killed.py")
    process = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(tmp_path / "killed.py",))
    process.start()
    process.join()  # with a limit, it would wait for the workers too, 5 s
    assert process.exitcode == -signal.SIGKILL
    newest, state = newest_checkpoint(tmp_path)
    # 14 iterations done, every 3rd saved, put off to the next optimizer step: 2 are lost and must be done again.
    assert newest.name == "iter_12.pth" and KILLED_AFTER == 14
    assert (state["meta"]["epoch"], state["meta"]["batch"]) == (1, 12 - ITERATIONS)

    final = resumed(config(data, tmp_path, workers))
    assert not multiprocessing.active_children()  # those that read ended with the run
    expected = read_training(unbroken / f"epoch_{EPOCHS}.pth")
    assert final["history"]["iterations"].shape == (EPOCHS * ITERATIONS, 4)
    for part in EXACT:
        assert differences(final[part], expected[part], part) == []


@runs_are_exact
def test_resume_between_training_and_validation_of_an_epoch(data, unbroken, tmp_path):
    """The checkpoint of an epoch is written before its validation, which a resumed run has to make up for."""
    shutil.copy(unbroken / "epoch_2.pth", tmp_path)
    saved = read_training(tmp_path / "epoch_2.pth")
    assert saved["meta"]["validation_due"] and len(saved["history"]["validation"]) == 1
    final = resumed(config(data, tmp_path))
    expected = read_training(unbroken / f"epoch_{EPOCHS}.pth")
    for part in EXACT:
        assert differences(final[part], expected[part], part) == []
    assert [row["epoch"] for row in final["history"]["validation"]] == [1, 2]  # the third follows the checkpoint


def test_corrupt_newest_checkpoint_falls_back(unbroken, tmp_path):
    for file in unbroken.glob("*.pth"):
        shutil.copy2(file, tmp_path)
    shutil.copy(unbroken / "last_checkpoint", tmp_path)
    newest = tmp_path / (tmp_path / "last_checkpoint").read_text().strip()
    assert newest_checkpoint(tmp_path)[0] == newest
    newest.write_bytes(newest.read_bytes()[:1000])
    found, state = newest_checkpoint(tmp_path)
    assert found.name == "iter_24.pth" and state["meta"]["iter"] == 24
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe no such file")
    assert newest_checkpoint(tmp_path)[0] == found
    for file in tmp_path.glob("*.pth"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read(.|\n)*is empty"):
        newest_checkpoint(tmp_path)


def test_nothing_to_resume_starts_from_the_beginning(data, tmp_path):
    cfg = small_config(data, tmp_path, 1)
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    assert read_training(tmp_path / "epoch_1.pth")["meta"]["iter"] == ITERATIONS
    log = next(tmp_path.rglob("*.log")).read_text()
    assert f"Nothing to resume in {tmp_path}: starting from the beginning." in log


@runs_are_exact
def test_a_resume_needs_no_pretrained_weights(data, tmp_path):
    """They were the beginning; all weights are in the checkpoint, and their file may be gone."""
    file = tmp_path / "start.pth"
    cfg = small_config(data, tmp_path / "run", 2)
    classifier = Runner.from_cfg(small_config(data, tmp_path / "other", 1)).bare_model
    torch.save({"state_dict": classifier.backbone.state_dict()}, file)
    cfg.model.update(pretrained=str(file), reset_head=True)
    Runner.from_cfg(cfg).train()
    unbroken = read_training(tmp_path / "run" / "epoch_2.pth")
    (tmp_path / "run" / "epoch_2.pth").unlink()
    (tmp_path / "run" / "last_checkpoint").unlink()
    file.unlink()
    cfg.resume = True
    runner = Runner.from_cfg(cfg)
    assert runner.cfg.model.pretrained == str(file)  # the config of the run stays what it was
    runner.train()
    ended = read_training(tmp_path / "run" / "epoch_2.pth")
    assert differences(ended["state_dict"], unbroken["state_dict"]) == []
    for leftover in (tmp_path / "run").glob("epoch_*.pth"):
        leftover.unlink()
    with pytest.raises(FileNotFoundError, match="no weight file .*start.pth for vmamba_micro"):  # nothing to resume
        Runner.from_cfg(cfg)


def test_resume_from_another_config_names_what_differs(data, unbroken, tmp_path):
    shutil.copy(unbroken / f"epoch_{EPOCHS}.pth", tmp_path)
    cfg = config(data, tmp_path)
    cfg.model.backbone.dims = 16
    cfg.optim_wrapper.optimizer.lr = 5e-3
    cfg.train_dataloader.num_workers = 1  # does not count
    cfg.resume = True
    with pytest.raises(CheckpointError) as error:
        Runner.from_cfg(cfg).train()
    message = str(error.value)
    assert "comes from another config" in message and "--resume-anyway" in message
    assert "model.backbone.dims: checkpoint 8, config 16" in message
    assert "optim_wrapper.optimizer.lr: checkpoint 0.002, config 0.005" in message
    assert "num_workers" not in message and ".root" not in message


def test_resume_anyway_continues_with_another_batch_size(data, unbroken, tmp_path):
    shutil.copy(unbroken / "epoch_2.pth", tmp_path)
    cfg = config(data, tmp_path)
    cfg.train_dataloader.batch_size = 6
    cfg.resume_anyway = True
    final = resumed(cfg)
    assert final["meta"]["iter"] == EPOCHS * ITERATIONS * 4 // 6


def test_best_model_file_is_no_place_to_resume_from(data, unbroken, tmp_path):
    cfg = config(data, tmp_path)
    cfg.load_from, cfg.resume = str(unbroken / "best_top1.pth"), True
    with pytest.raises(CheckpointError, match="holds no training state"):
        Runner.from_cfg(cfg).train()

"""mmengine's Runner with exact resume, CPU and GPU process groups, and a console that says only what matters."""

import json
import os
import platform
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import mmengine
import mmengine.runner
import numpy as np
import timm
import torch
from mmengine.device import get_device
from mmengine.dist import all_gather_object, broadcast, is_distributed, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, _ParamScheduler
from torch import nn
from torch.utils.data import DataLoader

from vision_ssm.data import check_same_classes
from vision_ssm.layers import synchronize_batch_norms
from vision_ssm.registry import SCOPE
from vision_ssm.weights import CheckpointError, unwrap

from . import logs
from .checkpoint import (
    FORMAT,
    continues,
    fingerprint,
    fingerprint_differences,
    is_training_state,
    newest_checkpoint,
    pack_messages,
    read_training,
    rng_state,
    unpack_messages,
    write_checkpoint,
    write_text,
)
from .distillation import Distillation
from .graphs import GraphedCall, check_graphs
from .loops import EpochTrainLoop, ExactLoop, IterTrainLoop, batch_size, stop_workers
from .sharding import (
    check_sharding,
    gather,
    is_sharded,
    release,
    shard,
    sharded_hook,
    split_optimizer_state,
    whole_on_cpu,
)
from .whole_model import has_heads, load_whole_model, short_misfits

RAW_WEIGHTS = "unaveraged_state_dict"
"""Where a checkpoint keeps the weights as trained, when ``state_dict`` holds their moving average."""


def git_hash(folder: str | Path) -> str | None:
    """Commit of the checkout that `folder` lies in, with ``-dirty`` if files were changed; None outside of one."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(seed: int, world_size: int) -> dict[str, Any]:
    """What a run depended on besides its config: versions, devices, commit, seed and command line."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "git": git_hash(Path(__file__).parent),
        "seed": seed,
        "processes": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "timm": timm.__version__,
        "mmengine": mmengine.__version__,
        "numpy": np.__version__,
        "scan_backend": os.environ.get("VISION_SSM_BACKEND", "automatic"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


class Runner(mmengine.runner.Runner):
    """Runner of every training and test in this library; takes the same config as mmengine's.

    It differs in what a checkpoint holds (plain values only, with the random state of every process and the position
    inside the epoch), how it is written (atomically) and read (nothing in it is run), and in that ``--launcher
    pytorch`` works without a GPU. ``cfg.resume`` may be True (newest good checkpoint of the work dir) or go with
    ``load_from``; ``cfg.resume_anyway`` continues although the config differs from the checkpoint's.
    ``cfg.env_cfg.cpu_threads`` sets the threads that torch computes with; None leaves torch's choice. With
    ``cfg.fsdp=True`` the processes of a training share its parameters instead of having a copy each, see `shard`.
    """

    optim_wrapper: Any
    _timestamp: str
    _resume: bool
    _train_loop: Any
    _val_loop: Any
    _timestamps: ClassVar[set[str]] = set()

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            if self.launcher != "pytorch":
                raise ValueError(f"without a GPU, --launcher must be pytorch (torchrun), not {self.launcher!r}")
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)
        if env_cfg.get("cpu_threads") is not None:
            torch.set_num_threads(env_cfg["cpu_threads"])
        # Two runs of one process may start within a second, and mmengine shares loggers between equal names.
        stamp, count = self._timestamp, 1
        while self._timestamp in self._timestamps:
            count += 1
            self._timestamp = f"{stamp}_{count}"
        self._timestamps.add(self._timestamp)

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> Any:
        logger = super().build_logger(log_level=log_level, log_file=log_file, **kwargs)
        logs.quieten(logger)
        return logger

    def _log_env(self, env_cfg: dict) -> None:
        if is_main_process():
            record = environment(self.seed, self.world_size)
            write_text(json.dumps(record, indent=2) + "\n", Path(self.work_dir) / "environment.json")
            self.logger.info(
                f"torch {record['torch']}, {', '.join(record['gpus']) or 'CPU'}, {self.world_size} process(es), "
                f"seed {self.seed}, git {record['git']}; details in {Path(self.work_dir) / 'environment.json'}"
            )

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """As in mmengine; a run that goes on from a checkpoint needs no pretrained weights, whose file may be gone."""
        if isinstance(model, dict) and continues(self.cfg):
            model = _without_pretrained(model)
        return super().build_model(model)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.cfg.get("fsdp"):
            check_sharding(self.cfg, self.distributed)
        if self.distributed and not torch.cuda.is_available():
            keywords = dict(model_wrapper_cfg or {"type": "MMDistributedDataParallel", "broadcast_buffers": False})
            keywords.setdefault("find_unused_parameters", self.cfg.get("find_unused_parameters", False))
            keywords["device_ids"] = None
            model_wrapper_cfg = keywords
            model = revert_sync_batchnorm(model)
        sync_bn = self.cfg.get("sync_bn")
        if self.distributed and sync_bn is not None:
            if torch.cuda.is_available():
                model = synchronize_batch_norms(model)
            else:
                self.logger.warning("sync_bn has no effect: PyTorch has no synchronised batch norm for CPUs")
        if self.cfg.get("fsdp"):
            return model.to(get_device())  # split by build_training, once its weights are initialised
        if not self.distributed or sync_bn is None:
            return super().wrap_model(model_wrapper_cfg, model)
        self.cfg.sync_bn = None  # the conversion of mmengine is not for channel-last norms
        try:
            return super().wrap_model(model_wrapper_cfg, model)
        finally:
            self.cfg.sync_bn = sync_bn

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """As in mmengine; data sets of other packages draw each sample's augmentation from its own seed."""
        if isinstance(dataloader, dict) and isinstance(dataloader.get("dataset"), dict):
            dataset = dataloader["dataset"]
            if not str(dataset["type"]).startswith(f"{SCOPE}."):
                dataloader = {**dataloader, "dataset": dict(type="vision_ssm.SeededDataset", dataset=dataset)}
        return mmengine.runner.Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """As in mmengine; what processes exchange through files goes through the work dir, not the current folder."""
        built = super().build_evaluator(evaluator)
        for metric in built.metrics:
            if metric.collect_device == "cpu" and metric.collect_dir is None:
                metric.collect_dir = str(Path(self.work_dir) / ".collected")
        return built

    def build_train_loop(self, loop: Any) -> Any:
        """``dict(by_epoch=...)`` and mmengine's two loops by name are `EpochTrainLoop` or `IterTrainLoop`."""
        if not isinstance(loop, dict):
            return super().build_train_loop(loop)
        keywords = dict(loop)
        named = keywords.pop("type", None)
        by_epoch = keywords.pop("by_epoch", True)
        loops: dict[Any, type] = {
            None: EpochTrainLoop if by_epoch else IterTrainLoop,
            "EpochBasedTrainLoop": EpochTrainLoop,
            "IterBasedTrainLoop": IterTrainLoop,
        }
        if named not in loops:
            return super().build_train_loop(loop)
        return loops[named](runner=self, dataloader=self._train_dataloader, **keywords)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Linear rule: lr * (processes * batch size * accumulated iterations) / ``base_batch_size``."""
        if not auto_scale_lr or not auto_scale_lr.get("enable", False):
            return
        base = auto_scale_lr["base_batch_size"]
        batch = self.world_size * batch_size(self.train_dataloader) * optim_wrapper.accumulative_counts
        for group in optim_wrapper.param_groups:  # with more than one group, includes the one logged as base_lr
            group["lr"] *= batch / base
        self.logger.info(f"Learning rates are for batch {base}; with batch {batch} they are scaled by {batch / base:g}")

    def _build_param_scheduler(self, scheduler: Any, optim_wrapper: OptimWrapper) -> list:
        """As in mmengine; schedules that would begin after the last epoch or iteration are left out."""
        kept = []
        for item in scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]:
            if isinstance(item, dict):
                total = self.max_epochs if item.get("by_epoch", True) else self.max_iters
                if item.get("begin", 0) >= total:
                    self.logger.info(
                        f"{item['type']} would begin at {item['begin']}, training ends at {total}: left out"
                    )
                    continue
            kept.append(item)
        return super()._build_param_scheduler(kept, optim_wrapper)

    @property
    def bare_model(self) -> nn.Module:
        """The model without what distributes it or averages its predictions over augmentations."""
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    @cached_property
    def _config_text(self) -> str:
        """The config as every checkpoint holds it, formatted once: that takes longer than to write a small file."""
        text: str = self.cfg.pretty_text
        return text

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Write a checkpoint. Every process has to call this: each contributes the state of its random generators.

        The arguments are mmengine's; `file_client_args` and `backend_args` (remote storage) are not supported.
        """
        if file_client_args is not None or backend_args is not None:
            raise ValueError("checkpoints are written to local folders only, because that can be done atomically")
        generators = all_gather_object(rng_state()) if save_optimizer else []
        main = is_main_process()
        if not (main or is_sharded(self.model)):  # parts of a model have to come from every process
            return
        if isinstance(self.train_loop, ExactLoop):
            position = dict(self.train_loop.position)
        else:
            position = dict(epoch=self.epoch + by_epoch, iter=self.iter + (not by_epoch), batch=0, validation_due=False)
        meta = {
            **(meta or {}),
            **position,
            "cfg": self._config_text,
            "fingerprint": fingerprint(self.cfg),
            "seed": self.seed,
            "world_size": self.world_size,
            "batch_size": batch_size(self.train_dataloader),
            "experiment_name": self.experiment_name,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "dataset_meta": dict(getattr(self.train_dataloader.dataset, "metainfo", None) or {}),
        }
        state: dict[str, Any] = {
            "format": FORMAT,
            "meta": meta,
            "state_dict": whole_on_cpu(self.bare_model.state_dict(), keep=main),
            "message_hub": pack_messages(self.message_hub),
        }
        if save_optimizer:
            state["optimizer"] = whole_on_cpu(self.optim_wrapper.state_dict(), keep=main)
            state["rng"] = generators
        if save_param_scheduler and self.param_schedulers is not None:
            state["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=state)
        if "ema_state_dict" in state:
            # mmengine's EMAHook has swapped the two: the averaged weights, those to be used, are in state_dict.
            state[RAW_WEIGHTS] = state.pop("ema_state_dict")
        if main:
            write_checkpoint(state, Path(out_dir) / filename)

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = True, revise_keys: Any = ((r"^module.", ""),)
    ) -> dict[str, Any]:
        """Load model weights from a checkpoint of a training run; the arguments are mmengine's.

        A backbone of this library with heads beside it may have official names, see `load_whole_model`.

        Raises:
            CheckpointError: the file cannot be read, or its weights are not those of this model.
        """
        checkpoint = read_training(filename)
        if strict and has_heads(self.bare_model):
            report = load_whole_model(self.bare_model, unwrap(checkpoint, filename), filename)
            self.logger.info(f"Backbone: {report}")
            checkpoint["state_dict"] = self.bare_model.state_dict()  # under the names that hooks know
        self._load_weights(checkpoint, filename, strict)
        self._has_loaded = True
        self.logger.info(f"Loaded weights of {filename}")
        return checkpoint

    def _load_weights(self, checkpoint: dict[str, Any], filename: str | Path, strict: bool = True) -> None:
        if RAW_WEIGHTS in checkpoint:
            checkpoint["ema_state_dict"] = checkpoint.pop(RAW_WEIGHTS)
        with short_misfits(filename):
            self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
            self.bare_model.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_or_resume(self) -> None:
        if self._has_loaded:
            return
        if not self._resume:
            super().load_or_resume()
            return
        if self._load_from is None:
            found = newest_checkpoint(self.work_dir)
            if found is None:
                self.logger.warning(f"Nothing to resume in {self.work_dir}: starting from the beginning.")
                self._resume = False
                return
            self._continue(*found)
        else:
            self._continue(self._load_from, read_training(self._load_from))

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "default",
    ) -> None:
        """Continue from `filename`; a partial resume is not offered, use `load_checkpoint` for the weights alone."""
        if not (resume_optimizer and resume_param_scheduler):
            raise ValueError("a resume restores everything; load weights alone with load_from=... and resume=False")
        self._continue(filename, read_training(filename))

    def _continue(self, filename: str | Path, checkpoint: dict[str, Any]) -> None:
        """Put model, optimizer, schedulers, records, random generators and position back to those of `checkpoint`."""
        if not is_training_state(checkpoint):
            raise CheckpointError(f"{filename} holds no training state; resume from an epoch_ or iter_ file")
        meta = checkpoint["meta"]
        differences = fingerprint_differences(meta["fingerprint"], fingerprint(self.cfg))
        if meta["world_size"] != self.world_size:
            differences.append(f"processes: checkpoint {meta['world_size']}, now {self.world_size}")
        if differences:
            listed = "\n  ".join(differences)
            if not self.cfg.get("resume_anyway", False):
                raise CheckpointError(
                    f"{filename} comes from another config, so the run cannot be continued exactly:\n  {listed}\n"
                    "Use the config of the checkpoint (saved in its work dir), a new --work-dir, or --resume-anyway "
                    "to continue with these differences."
                )
            self.logger.warning(
                f"Resuming although the config differs from that of {filename}:\n  {listed}\n"
                "Learning rates, weight decay and schedules go on as in the checkpoint, by the share of training done."
            )
        self._load_weights(checkpoint, filename)
        optimizer = checkpoint["optimizer"]
        if is_sharded(self.model):
            optimizer = split_optimizer_state(optimizer, self.optim_wrapper.optimizer)
        self.optim_wrapper.load_state_dict(optimizer)
        saved = checkpoint.get("param_schedulers", [])
        own = [scheduler.state_dict() for scheduler in self.param_schedulers or []]
        for scheduler, state in zip(self.param_schedulers or [], saved, strict=not differences):
            scheduler.load_state_dict(state)
        unpack_messages(self.message_hub, checkpoint["message_hub"])
        position = {key: meta[key] for key in ("epoch", "iter", "batch", "validation_due")}
        same_batches = not any("batch_size" in line or line.startswith("processes") for line in differences)
        rng = checkpoint["rng"][self.rank] if meta["world_size"] == self.world_size else None
        if not same_batches:
            seen = position["batch"] * meta["batch_size"] * meta["world_size"]
            position["batch"] = seen // (batch_size(self.train_dataloader) * self.world_size)
            if isinstance(self.train_loop, EpochTrainLoop):
                position["iter"] = position["epoch"] * len(self.train_dataloader) + position["batch"]
                for scheduler, state in zip(self.param_schedulers or [], own):
                    _continue_schedule(scheduler, state, position["iter"])
        if isinstance(self.train_loop, ExactLoop):
            self.train_loop.restore(position, rng)
        else:
            self.train_loop._epoch, self.train_loop._iter = position["epoch"], position["iter"]
        self._has_loaded = True
        self.logger.info(
            f"Resumed from {filename}: epoch {position['epoch'] + 1}, batch {position['batch']} done, "
            f"iteration {position['iter']}"
        )

    def build_training(self) -> None:
        """Build loaders and optimizer and compare them with the model, so that mistakes show before a run."""
        self._train_loop = self.build_train_loop(self._train_loop)
        if not len(self.train_dataloader):
            images, batch = len(self.train_dataloader.dataset), batch_size(self.train_dataloader)
            raise ValueError(
                f"{images} training images make no batch of {batch} in each of {self.world_size} process(es): lower "
                "train_dataloader.batch_size, or set train_dataloader.drop_last=False"
            )
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
        if self.cfg.get("fsdp") and not is_sharded(self.model):
            super()._init_model_weights()
            shard(self.model)
            self.logger.info(f"FSDP: {self.world_size} processes share parameters, gradients and optimizer states")
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        self._prepare_graphs()
        self._prepare_teacher()
        self._check_classes()

    def _init_model_weights(self) -> None:
        if not is_sharded(self.model):  # otherwise done before
            super()._init_model_weights()

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        super().register_hook(sharded_hook(hook) if self.cfg.get("fsdp") else hook, priority)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """As in mmengine. A sharded model is whole while it is validated or tested: between the hooks before and those
        after, of which some exchange or save its parameters. Running means are those of the first process then, which
        are in the checkpoint."""
        if fn_name in ("after_val_epoch", "after_test_epoch") and is_sharded(self.model):
            release(self.model)
        super().call_hook(fn_name, **kwargs)
        if fn_name in ("before_val_epoch", "before_test_epoch"):
            saved = self.bare_model.state_dict().keys()
            for name, buffer in self.bare_model.named_buffers():
                if name in saved:
                    broadcast(buffer)
            if is_sharded(self.model):
                gather(self.model)

    def train(self) -> nn.Module:
        """Train, and return the model."""
        self.build_training()
        net = getattr(self.bare_model, "backbone", None) or getattr(self.bare_model, "unet", None)
        name = getattr(net, "variant", None) or self.model_name
        count = sum(parameter.numel() for parameter in self.bare_model.parameters())
        self.logger.info(f"Model {name} with {count:,} parameters; work dir {self.work_dir}")
        try:
            return super().train()
        finally:
            self.call_hook("end_display")
            for loop in (self._train_loop, self._val_loop):
                stop_workers(loop)
            self._report_skipped(self.train_dataloader.dataset)

    def test(self) -> dict:
        """Evaluate on the test loader, and return the metrics."""
        try:
            metrics = super().test()
        finally:
            stop_workers(self._test_loop)
        self._report_skipped(self.test_dataloader.dataset)
        return metrics

    def _report_skipped(self, dataset: Any) -> None:
        report = dataset.skip_report() if hasattr(dataset, "skip_report") else ""
        if report and is_main_process():
            self.logger.warning(report)
        elif report:  # not gathered, as other processes may have failed; their loggers are silent
            print(f"In process {self.rank}: {report}", file=sys.stderr)

    def _prepare_graphs(self) -> None:
        """A model that trains through CUDA graphs must be able to, and is told which batches to record."""
        graphed = getattr(self.bare_model, "graphed", None)
        if isinstance(graphed, GraphedCall):
            check_graphs(
                graphed.module,
                accumulative_counts=getattr(self.optim_wrapper, "_accumulative_counts", 1),
                distributed=self.distributed,
                compiled=self.cfg.get("compile") not in (None, False),  # an empty dict compiles with the defaults
            )
            graphed.batch_size = batch_size(self.train_dataloader)

    def _prepare_teacher(self) -> None:
        """A model that learns from a teacher has it before anything is trained, or the run ends here."""
        distillation = getattr(self.bare_model, "distillation", None)
        if isinstance(distillation, Distillation):
            distillation.prepare(next(self.bare_model.parameters()).device)

    def _check_classes(self) -> None:
        """Training and validation labels must agree with each other and with the model before anything is trained."""
        training = self.train_dataloader.dataset
        channels, takes = getattr(training, "channels", None), getattr(self.bare_model, "backbone", None)
        takes = getattr(takes, "in_chans", None)
        if channels is not None and takes is not None and channels != takes:
            raise ValueError(
                f"the data has images of {channels} channels, the model takes {takes}: set model.backbone.in_chans or "
                "channels of every dataset"
            )
        if hasattr(self.bare_model, "check_classes"):
            for loader in [self.train_dataloader, *([] if self.val_loop is None else [self.val_dataloader])]:
                self.bare_model.check_classes(loader.dataset.metainfo["classes"])
        if hasattr(training, "check_num_classes") and hasattr(self.bare_model, "num_classes"):
            training.check_num_classes(self.bare_model.num_classes)
            if (known := len(training.metainfo["classes"])) < self.bare_model.num_classes:
                self.logger.warning(
                    f"The data has {known} classes and the model num_classes={self.bare_model.num_classes}: the others "
                    "can be predicted and never be right"
                )
            validation: Any = None if self.val_loop is None else self.val_dataloader.dataset
            if hasattr(validation, "check_num_classes"):
                check_same_classes(training, validation)

    def get_hooks_info(self) -> str:
        return "  " + ", ".join(type(hook).__name__ for hook in self.hooks)


def _continue_schedule(scheduler: _ParamScheduler, own: dict[str, Any], iteration: int) -> None:
    """Put a schedule of a checkpoint whose epochs had another number of iterations to where it is after `iteration` of
    this run's; `own` is its state as the run's config has it."""
    if scheduler.by_epoch:
        return
    for key in ("begin", "end", "T_max", "total_iters", "milestones", "step_size"):
        if key in own:
            setattr(scheduler, key, own[key])
    scheduler._global_step = iteration
    scheduler.last_step = max(min(iteration, scheduler.end - 1) - scheduler.begin, -1)


def _without_pretrained(model: dict) -> dict:
    """The config of a model whose weights all come from a checkpoint."""
    nothing = dict(pretrained=None, reset_head=False)
    model = {**model, **{key: value for key, value in nothing.items() if key in model}}
    backbone = model.get("backbone")
    if isinstance(backbone, dict):
        start = backbone.get("init_cfg")
        if isinstance(start, dict) and start.get("type") == "Pretrained":
            model["backbone"] = {**backbone, "init_cfg": None}
    return model

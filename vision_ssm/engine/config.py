"""Configs on the command line: found or suggested, changed only where a key exists, checked before anything runs."""

import difflib
import inspect
import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine import registry as root
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import EpochBasedTrainLoop

from vision_ssm.registry import suggest

from .checkpoint import newest_checkpoint, read_training
from .optim import PRECISIONS
from .runner import Runner

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
SELF_CHECKED = (
    "backbone", "unet", "loss", "mixup", "distillation", "normalize", "inference", "transform", "paramwise_cfg",
)  # fmt: skip
"""Parts of a config whose builders reject unknown keywords themselves."""
FREE = ("model.train_cfg", "model.test_cfg")
"""Parts that models of mmseg and mmdet read as they like."""
MERGED = ("val_cfg.also", "test_cfg.also")
"""Parts that are changed copies of another part, so that any key of it may stand there."""
TOP_LEVEL = ("resume_anyway", "compile", "fsdp", "find_unused_parameters", "sync_bn", "model_wrapper_cfg")
"""Keys of a config that the Runner reads besides its constructor's keywords."""
OWNERS = {"train_cfg": EpochBasedTrainLoop.__init__, "randomness": Runner.set_randomness}


class UsageError(ValueError):
    """A wrong command line; the message says what to change."""


def checked_device(name: str | None) -> str:
    """The device of that name, or a GPU if there is one; `UsageError` if it is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name}: PyTorch finds no GPU here; use cpu")
    return name


def load_config(path: str | Path) -> Config:
    """Read a config file; if there is none, `UsageError` with the names of configs that look alike."""
    path = Path(path)
    if path.is_file():
        return Config.fromfile(str(path))
    folders = {folder for folder in (path.parent, Path("configs")) if folder.is_dir()}
    files = {str(file) for folder in folders for file in folder.rglob("*.py") if "_base_" not in file.parts}
    stems = {Path(file).stem: file for file in files}
    close = [stems[stem] for stem in difflib.get_close_matches(path.stem, stems, n=3, cutoff=0.4)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    kind = "is a folder" if path.is_dir() else "does not exist"
    raise UsageError(f"config {path} {kind}.{hint}")


def _resolve(type_name: Any) -> Any:
    """The class behind a config's ``type``, from whichever registry knows it, or None."""
    if not isinstance(type_name, str):
        return type_name
    for name in ("MODELS", "DATASETS", "HOOKS", "METRICS", "OPTIM_WRAPPERS", "OPTIMIZERS", "PARAM_SCHEDULERS",
                 "DATA_SAMPLERS", "LOOPS", "VISUALIZERS", "VISBACKENDS", "LOG_PROCESSORS", "FUNCTIONS"):  # fmt: skip
        try:
            found = getattr(root, name).get(type_name)
        except RuntimeError:  # mmengine's answer to an unknown name
            continue
        if found is not None:
            return found
    return None


def _keywords(target: Any) -> set[str] | None:
    """Names of the keywords of a class or function; None if it takes any."""
    names: set[str] = set()
    bases = target.__mro__[:-1] if inspect.isclass(target) else ()
    functions = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [target]
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return names - {"self"}
    return None


def check_option(cfg: Config, key: str) -> None:
    """Check that `key`, such as ``optim_wrapper.optimizer.lr``, is one that `cfg` has or may have.

    Raises:
        UsageError: no such key; similar ones are named.
    """
    node: Any = cfg._cfg_dict
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.lstrip("-").isdigit() or not -len(node) <= int(part) < len(node):
                raise UsageError(f"--cfg-options {key}: {where} is a list of {len(node)}, {part!r} is no place in it")
            node = node[int(part)]
            continue
        if not isinstance(node, Mapping):
            raise UsageError(f"--cfg-options {key}: {where} is {node!r} and has no parts")
        if part in node:
            node = node[part]
            continue
        if depth and (parts[depth - 1] in SELF_CHECKED or where in FREE or where.startswith(MERGED)):
            return
        if depth == 0:
            allowed: set[str] | None = {*inspect.signature(Runner).parameters, *TOP_LEVEL} - {"cfg"}
        else:
            target = OWNERS.get(where) or _resolve(node.get("type"))
            allowed = set() if target is None else _keywords(target)
            if allowed is not None and where == "optim_wrapper":
                allowed = allowed | {"constructor", "paramwise_cfg"}
        if allowed is None or part in allowed:
            return
        known = set(node) | allowed
        raise UsageError(f"--cfg-options {key}: {where or 'the config'} has no key {part!r}.{suggest(part, known)}")


def check_work_dir(path: str | Path) -> Path:
    """Create the work dir and try to write into it; `UsageError` if that fails."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"work dir {path} is not writable ({error.strerror}); choose another with --work-dir"
        ) from None
    return path


def set_data_root(cfg: Config, folder: str) -> None:
    """Let every loader of `cfg`, and every evaluator that reads annotations, read from `folder`."""
    if not Path(folder).is_dir():
        layout = "train/CLASS/*.png and val/CLASS/*.png" if _is_classification(cfg) else "what the config's base says"
        raise UsageError(f"--data-root {folder} is not a folder; it should hold {layout}")
    if _is_classification(cfg):
        for loader in LOADERS:
            if cfg.get(loader) is not None:
                cfg[loader].dataset.root = folder
        return
    old = cfg.get("data_root")
    if old is None:
        raise UsageError("--data-root needs a config with a data_root; in this one, change the paths of the data sets")
    cfg.data_root = folder
    for name in (*LOADERS, "val_evaluator", "test_evaluator"):
        if cfg.get(name) is not None:
            cfg[name] = _moved(cfg[name], old.rstrip("/"), folder.rstrip("/"))


def _is_classification(cfg: Config) -> bool:
    return cfg.get("model", {}).get("type") == "vision_ssm.ImageClassifier"


def _moved(value: Any, old: str, new: str) -> Any:
    """`value` with every path in it that is `old`, or lies in it, moved to `new`."""
    if isinstance(value, dict):
        return type(value)({key: _moved(item, old, new) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, old, new) for item in value)
    if isinstance(value, str) and (value.rstrip("/") == old or value.startswith(old + "/")):
        return new + value[len(old) :]
    return value


class KeyValues(DictAction):
    """Values of a flag as a dict, each of which is ``KEY=VALUE``."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} takes KEY=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def add_common_flags(parser: ArgumentParser) -> None:
    """Flags that training and testing share."""
    parser.add_argument("--work-dir", metavar="DIR", help="folder for everything that is written")
    parser.add_argument(
        "--data-root", metavar="DIR",
        help="folder of the data: DIR/train/CLASS/*, DIR/val/CLASS/* for classification; else in the config's layout",
    )  # fmt: skip
    parser.add_argument(
        "--cfg-options", nargs="+", action=KeyValues, default={}, metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=2e-3 train_cfg.max_epochs=5",
    )  # fmt: skip
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm"), default="none",
        help="how the processes of a distributed run are started: pytorch means torchrun",
    )  # fmt: skip


def prepare(args: Namespace, default_work_dir: str) -> Config:
    """The config of a command line, with the common flags applied and the work dir checked.

    Raises:
        UsageError: missing config, unknown option, work dir that cannot be written, processes that do not know of each
            other.
    """
    _check_launcher(args.launcher)
    cfg = load_config(args.config)
    cfg.work_dir = str(check_work_dir(args.work_dir or cfg.get("work_dir") or default_work_dir))
    for key in args.cfg_options:
        check_option(cfg, key)
    cfg.merge_from_dict(args.cfg_options)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    cfg.launcher = args.launcher
    return cfg


def _check_launcher(launcher: str) -> None:
    """Compare what was said of several processes with how this one was started."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if launcher == "none" and count > 1 and torch.distributed.is_torchelastic_launched():
        raise UsageError(
            f"torchrun started {count} processes, each of which would do all the work alone: add --launcher pytorch"
        )
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UsageError(
            "--launcher pytorch is for processes that torchrun starts: torchrun --nproc_per_node=N tools/train.py ... "
            "--launcher pytorch, or leave it out for one process"
        )


def prepare_training(args: Namespace) -> Config:
    """The config of a ``train.py`` command line. Raises `UsageError` as `prepare` does."""
    cfg = prepare(args, str(Path("work_dirs") / Path(args.config).stem))
    if args.amp:
        cfg.optim_wrapper.precision = args.amp
    if args.cuda_graphs:
        if not _is_classification(cfg):
            raise UsageError(f"--cuda-graphs is for image classifiers; the model of this config is {cfg.model.type}")
        cfg.model.cuda_graphs = True
    if args.fsdp:
        cfg.fsdp = True
    cfg.setdefault("randomness", ConfigDict(seed=None))
    if args.seed is not None:
        cfg.randomness.seed = args.seed
    if args.deterministic:
        cfg.randomness.deterministic = True
        cfg.setdefault("env_cfg", ConfigDict())
        cfg.env_cfg.cudnn_benchmark = False
        # cuBLAS reads this when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.resume or args.resume_anyway:
        _set_resume(cfg, args.resume or "auto")
        cfg.resume_anyway = args.resume_anyway
    return cfg


def use_test_time_augmentation(cfg: Config) -> None:
    """Test with the config's ``tta_pipeline`` and ``tta_model``; `UsageError` if it has none."""
    missing = [key for key in ("tta_model", "tta_pipeline") if cfg.get(key) is None]
    if missing:
        raise UsageError(f"--tta needs tta_model and tta_pipeline; this config lacks {' and '.join(missing)}")
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _set_resume(cfg: Config, source: str) -> None:
    cfg.resume = True
    cfg.load_from = None if source == "auto" else source
    if source != "auto" and not Path(source).is_file():
        near = sorted(str(file) for file in Path(source).parent.glob("*.pth"))
        raise UsageError(f"--resume {source}: there is no such checkpoint.{suggest(source, near)}")
    if cfg.randomness.get("seed") is None:
        # The samplers are built before the checkpoint is loaded and must already follow its seed.
        found = newest_checkpoint(cfg.work_dir) if source == "auto" else (source, read_training(source))
        if found is not None:
            cfg.randomness.seed = found[1]["meta"]["seed"]


def precisions() -> tuple[str, ...]:
    """Choices of ``--amp``."""
    return tuple(name for name in PRECISIONS if name != "fp32")

"""Checkpoints that survive a kill: plain contents, atomic writing, checked reading, and what makes a resume exact."""

import contextlib
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger

from vision_ssm.weights import CheckpointError, read_checkpoint

FORMAT = "vision_ssm training checkpoint 1"
POINTER = "last_checkpoint"
PATTERNS = ("epoch_*.pth", "iter_*.pth")
KEPT_LOG_VALUES = 1000


def write_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Write `state` so that `path` holds either the old file or the complete new one, whatever happens meanwhile.

    Raises:
        CheckpointError: the file cannot be written, for example on a full disk; nothing half-written is left behind.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        written = os.path.getsize(temporary) if os.path.exists(temporary) else 0
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"could not write checkpoint {path}: {error} ({written / 2**20:.1f} MiB written, {free / 2**20:.1f} MiB "
            f"free on that disk). Earlier checkpoints in {path.parent} are untouched; make room and run again with "
            "--resume."
        ) from error
    _sync_folder(path.parent)


def write_text(text: str, path: str | Path) -> None:
    """Replace the text file `path` atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_training(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a training run to the CPU. Nothing in the file is ever run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a corrupt or truncated file, or one without model weights.
    """
    state = read_checkpoint(path)
    if not isinstance(state, dict) or "state_dict" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of a training run: it has no 'state_dict'. Weights alone are given with "
            "model.pretrained (training) or --weights (prediction)."
        )
    return state


def is_training_state(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds all that a resume needs (a best-model file does not)."""
    return state.get("format") == FORMAT and "optimizer" in state


def saved_checkpoints(work_dir: str | Path) -> list[Path]:
    """Checkpoints of a run that can be resumed from, newest first."""
    files = {file for pattern in PATTERNS for file in Path(work_dir).glob(pattern)}
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)


def continues(cfg: Config) -> bool:
    """Whether a run of `cfg` goes on from a checkpoint, and so needs no weights to begin with."""
    return bool(cfg.get("resume") and (cfg.get("load_from") or saved_checkpoints(cfg.work_dir)))


def newest_checkpoint(work_dir: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of `work_dir` that can be read, or None if there is none at all.

    The file that ``last_checkpoint`` names is tried first; a broken one is reported and the one before it is taken.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    candidates = saved_checkpoints(work_dir)
    pointer = Path(work_dir) / POINTER
    if pointer.is_file():
        named = Path(work_dir) / Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
        candidates = [named] * named.is_file() + [file for file in candidates if file != named]
    if not candidates:
        return None
    problems = []
    for file in candidates:
        try:
            state = read_training(file)
            if not is_training_state(state):
                raise CheckpointError(f"{file} holds a model, but no training state")
            return file, state
        except CheckpointError as error:
            problems.append(str(error))
            MMLogger.get_current_instance().warning(f"{error}. Falling back to the checkpoint before it.")
    raise CheckpointError(f"no checkpoint in {work_dir} can be read:\n  " + "\n  ".join(problems))


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process (python, numpy, torch, this process's GPU) as plain values."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = numpy_state["state"]
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(state["key"].astype(np.int64)),
            "pos": int(state["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever happens inside leaves the random generators of this process as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def pack_messages(hub: MessageHub) -> dict[str, Any]:
    """State of mmengine's message hub as tensors and plain values: recent log values and resumable information."""
    state = hub.state_dict()
    scalars = {
        key: [torch.as_tensor(np.asarray(column[-KEPT_LOG_VALUES:], dtype=np.float64)) for column in buffer.data]
        for key, buffer in state["log_scalars"].items()
    }
    info = {key: value for key, value in state["runtime_info"].items() if is_plain(value)}
    kept = {key: bool(value) for key, value in state["resumed_keys"].items() if key in scalars or key in info}
    return {"log_scalars": scalars, "runtime_info": info, "resumed_keys": kept}


def unpack_messages(hub: MessageHub, packed: Mapping[str, Any]) -> None:
    """Put the result of `pack_messages` back into a message hub."""
    scalars = {
        key: HistoryBuffer(values.tolist(), [int(count) for count in counts.tolist()])
        for key, (values, counts) in packed["log_scalars"].items()
    }
    hub.load_state_dict({**packed, "log_scalars": scalars})


def is_plain(value: Any) -> bool:
    """Whether `value` consists of numbers, strings, None, lists, tuples and string-keyed dicts only."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


FINGERPRINTED = (
    "model",
    "optim_wrapper",
    "param_scheduler",
    "auto_scale_lr",
    "train_cfg.max_epochs",
    "train_cfg.max_iters",
    "train_dataloader.batch_size",
    "train_dataloader.drop_last",
    "train_dataloader.sampler",
    "train_dataloader.dataset",
    "custom_hooks",
    "randomness",
)
IRRELEVANT = ("root", "pretrained", "checkpoint", "strict", "deterministic", "cuda_graphs")


def fingerprint(cfg: Mapping[str, Any]) -> dict[str, str]:
    """What in a config decides the numbers of a run, flattened to ``{"model.backbone.name": "'vmamba_micro'", ...}``.

    Folders, files, workers, logging and the like are left out, and so are switches that choose how the same numbers
    are computed; of the custom hooks only those that change weights (EMA, a resting encoder) count.
    """
    flat: dict[str, str] = {}

    def visit(key: str, value: Any) -> None:
        if key.rsplit(".", 1)[-1] in IRRELEVANT:
            return
        if isinstance(value, Mapping):
            for name, item in value.items():
                visit(f"{key}.{name}", item)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                visit(f"{key}.{index}", item)
        elif value is not None:
            flat[key] = repr(list(value) if isinstance(value, tuple) else value)

    for key in FINGERPRINTED:
        node: Any = cfg
        for part in key.split("."):
            node = node.get(part) if hasattr(node, "get") else None  # mmengine's Config is no Mapping
        if key == "custom_hooks":
            node = [hook for hook in node or [] if re.search("EMA|FreezeEncoder", str(hook.get("type")))]
        visit(key, node)
    return flat


def fingerprint_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """One line per entry in which two fingerprints differ."""
    return [
        f"{key}: checkpoint {saved.get(key, 'not set')}, config {current.get(key, 'not set')}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]

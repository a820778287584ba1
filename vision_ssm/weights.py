"""Reading checkpoint files and loading them into models, with a report of every key.

Nothing a file contains is ever run: tensors come from safetensors or from PyTorch's weights-only reader, and objects
that a training script pickled beside them (a config, say) become inert placeholders.
"""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn

from .backbones.family import ModelFamily
from .layers import resample_position_table
from .registry import BACKBONES, UNETS

_CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
_EMA_CONTAINERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_BACKBONE = "backbone."
_OTHER_PART = re.compile(r"(?!head\.fc\.)(\w+_)?(heads?|neck|preprocessor)\.")
"""Parts beside the backbone of a segmentation or detection model: decode_head, auxiliary_head, neck, roi_head, ...

``head.fc`` is the linear classifier of an OpenMMLab classification model, and belongs to the backbone here.
"""
_COUNTERS = re.compile(r"(.*\.)?total_(ops|params)")
"""Buffers that thop leaves in a model whose FLOPs it has counted."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


@dataclass
class LoadReport:
    """What became of every key of a checkpoint and of the model.

    Attributes:
        source: file or description of the checkpoint.
        loaded: our names of the tensors that were loaded.
        ignored: names left out, by the rule that allows it.
        missing: our names that the checkpoint does not have.
        unexpected: names that the model does not have.
        mismatched: our name, shape in the checkpoint, shape in the model.
        adapted: those of `loaded` that were made for images of another number of channels.
        resampled: of `loaded`, tables of positions, grid in the checkpoint, grid in the model.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    resampled: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every key was loaded or ignored by a rule."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  adapted to other channels of the image: {_preview(self.adapted)}"] * bool(self.adapted)
        grids = [f"{name} from {have[0]} x {have[1]} to {want[0]} x {want[1]}" for name, have, want in self.resampled]
        lines += [f"  resampled, which img_size=... avoids: {_preview(grids)}"] * bool(grids)
        lines += [f"  ignored, {rule}: {_preview(names)}" for rule, names in self.ignored.items()]
        lines += [f"  missing from the file: {_preview(self.missing)}"] * bool(self.missing)
        lines += [f"  not in the model: {_preview(self.unexpected)}"] * bool(self.unexpected)
        shapes = [f"{name} {list(have)} in the file, {list(want)} in the model" for name, have, want in self.mismatched]
        lines += [f"  wrong shape: {_preview(shapes)}"] * bool(shapes)
        return "\n".join(lines)


def _preview(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


class _Inert(dict):
    """Stands in for an object of a class that is not a tensor's: holds its state, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _Instead(type):
    """Calling the class gives what holds the state of any object; its ``__new__`` alone gives a mapping."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _Inert()


class _InertMapping(metaclass=_Instead):
    """Stands in for a class derived from dict, such as a config of yacs, whose items PyTorch puts into its own only."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _inert_dict(*args: Any) -> dict:
    return {}


def _inert_list(*args: Any) -> list:
    return []


_INERT_CONTAINERS = {"collections.defaultdict": _inert_dict, "collections.deque": _inert_list}


def read_checkpoint(file: str | os.PathLike) -> Any:
    """Contents of a ``.safetensors`` file or of a PyTorch checkpoint, tensors on the CPU, nothing of it run.

    Raises:
        FileNotFoundError: no such file. CheckpointError: empty, truncated, corrupt, or not a checkpoint at all.
    """
    path = Path(file)
    if not path.is_file():
        folder, what = path.parent, f"no checkpoint file {path}"
        if path.is_dir():
            folder, what = path, f"{path} is a folder: name a file in it"
        near = [other.name for other in folder.glob("*") if other.suffix in (".pth", ".pt", ".safetensors", ".bin")]
        listing = f" Checkpoints in that folder: {_preview(sorted(near))}." if near else ""
        raise FileNotFoundError(f"{what}.{listing}")
    with path.open("rb") as opened:
        head = opened.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty: the download or copy failed; fetch it again")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not a checkpoint: the link asked for a login or has moved")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _read_torch(path)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, corrupt, or no checkpoint: {_first_line(error)}."
            " Compare its size with the published one and fetch it again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        failure = error
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not names:
            raise
    for stand_in in (_Inert, _InertMapping):  # what the names are for, the file does not say
        allowed: list[Any] = [(_INERT_CONTAINERS.get(name, stand_in), name) for name in names]
        try:
            with torch.serialization.safe_globals([*allowed, _Inert]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            failure = error
    raise failure


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):  # a byte that is no instruction of the pickle format
        return "it is no file of PyTorch"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def unwrap(
    checkpoint: Any, source: str, ema: bool = True, prefixes: Sequence[str] = ModelFamily.wrappers
) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without the wrappers and prefixes that training adds.

    Looks into ``model``, ``state_dict`` and ``module``; where averaged weights (``model_ema`` and the like) lie beside
    them, these are taken unless `ema` is False. Strips what data parallelism, compilation and wrappers prepend: any of
    `prefixes` that most names begin with. A model with parts beside its backbone keeps all names, see `split_parts`.

    Raises:
        CheckpointError: there is no state dict inside.
    """
    content = checkpoint
    for _ in range(4):  # a container may hold a container
        if not isinstance(content, Mapping):
            break
        content = _swap_back(content)
        order = _EMA_CONTAINERS + _CONTAINERS if ema else _CONTAINERS + _EMA_CONTAINERS
        inner = next(
            (content[name] for name in order if isinstance(content.get(name), Mapping) and content[name]), None
        )
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        held = _preview(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{source} holds no state dict; found {held}")
    return without_prefixes(tensors, prefixes)


def without_prefixes(tensors: Mapping[str, torch.Tensor], prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    """`tensors` under names without those of `prefixes` that most names begin with, one after the other."""
    tensors = dict(tensors)
    for _ in range(4):
        prefix = next((p for p in prefixes if sum(key.startswith(p) for key in tensors) > len(tensors) // 2), None)
        if prefix is None or split_parts(tensors)[1]:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def without_counters(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """`tensors` without the buffers that thop, a counter of FLOPs, leaves in a model, and the names of those."""
    counters = [key for key in tensors if _COUNTERS.fullmatch(key)]
    return {key: value for key, value in tensors.items() if key not in counters}, counters


def _swap_back(content: Mapping) -> Mapping:
    """A checkpoint of mmengine's EMA hook with the two state dicts under their names, which the hook exchanges."""
    raw, averaged = content.get("ema_state_dict"), content.get("state_dict")
    if not isinstance(raw, Mapping) or "steps" not in raw or not isinstance(averaged, Mapping):
        return content
    return {"ema_state_dict": averaged, "state_dict": {key: value for key, value in raw.items() if key != "steps"}}


def split_parts(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The backbone of a segmentation or detection model without its prefix, and what else the model has.

    Args:
        tensors: a state dict. It is of such a model if some names begin with ``backbone.`` and others with the name of
            a head, a neck or a preprocessor.

    Returns:
        The backbone's state dict, and the names of every other part by that part: the first part of their name. Of any
        other state dict, itself and nothing.
    """
    own: dict[str, torch.Tensor] = {}
    parts: dict[str, list[str]] = {}
    if not (any(map(_OTHER_PART.match, tensors)) and any(key.startswith(_BACKBONE) for key in tensors)):
        return dict(tensors), {}
    for key, value in tensors.items():
        if key.startswith(_BACKBONE):
            own[key.removeprefix(_BACKBONE)] = value
        else:
            parts.setdefault(key.split(".", 1)[0], []).append(key)
    return own, parts


def _explain_misfit(model: ModelFamily, tensors: Mapping[str, torch.Tensor]) -> str:
    """Which family or variant a state dict belongs to, as far as its keys and shapes tell."""
    keys = set(tensors)
    if not model.recognises(keys):
        known = [*BACKBONES.module_dict.values(), *UNETS.module_dict.values()]
        owners = [cls for cls in known if cls.recognises(keys)]  # families of like blocks may share all names it knows
        if not owners:
            return f"this is no {model.family} checkpoint: its keys begin with {_preview(sorted(keys), 3)}"
        within = any(owner.family == model.family for owner in owners)
        own, *names = (cls.__name__ if within else cls.family for cls in (model.registered(), *owners))
        return f"this is no {own} checkpoint: it looks like a {' or '.join(dict.fromkeys(names))} checkpoint"
    ours = model.own_keys(dict(tensors))
    changes = sorted(set(model.overrides) - {"num_classes", "out_indices", "features_only"})
    for name, settings in model.variants.items():
        if name == model.variant and not changes:
            continue
        with torch.device("meta"):
            other = model.registered()(**{**settings, "num_classes": _num_classes(model, ours)})
        # weights of a dense backbone have norms of their own behind the stages
        body = ("stem.", "stages.") if any(key.startswith("out_norms.") for key in ours) else ""
        if _shapes(other.state_dict(), body) == _shapes(other.own_keys(dict(tensors)), body):
            changed = f"this one with another {', '.join(changes)}"
            return f"the file fits {name}, not {changed if name == model.variant else model.variant or 'this model'}"
    return (
        "no variant of the family fits it exactly: give create_model the keywords that its model was built with, or "
        "import_official() the hyperparameters of an original"
    )


def _fits(model: ModelFamily, tensors: Mapping[str, torch.Tensor], wanted: Collection[str]) -> bool:
    """Whether `tensors` are of a form of the family that other families have too, by which it is not recognised."""
    try:
        return set(model.own_keys(dict(tensors))) == set(wanted)
    except (KeyError, ValueError, IndexError, RuntimeError):  # another family's tensors convert to nothing
        return False


def _is_position_table(key: str, value: torch.Tensor) -> bool:
    """Whether a tensor of a state dict has an embedding for every cell of a grid, (1, C, H, W)."""
    return key.endswith("pos_embed.table") and value.ndim == 4


def _shapes(tensors: Mapping[str, torch.Tensor], prefixes: str | tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; of position tables without the grid, which is resampled."""
    return {
        key: tuple(value.shape[:2] if _is_position_table(key, value) else value.shape)
        for key, value in tensors.items()
        if key.startswith(prefixes)
    }


def _num_classes(model: ModelFamily, tensors: Mapping[str, torch.Tensor]) -> int:
    return tensors[model.classifier_key].shape[0] if model.classifier_key in tensors else 0


def load_state_dict(
    model: ModelFamily,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: str = "state dict",
    strict: bool = True,
    reset_head: bool = False,
    adapt_input: bool = False,
) -> LoadReport:
    """Load an official state dict, or one of ours, into a backbone or a U-Net.

    Left out by rule: heads and necks beside the backbone of a segmentation or detection model; the classifier where the
    model has none; later stages, and output norms of other maps, than a `features_only` model needs; output norms and
    a pyramid that a classifier's weights do not have; auxiliary heads that only the model or only the file has; with
    `reset_head`, a classifier of another size.

    Args:
        model: changed in place (not at all if this raises).
        tensors: state dict under official names or ours.
        source: how messages call the state dict.
        strict: raise when a key is neither loaded nor ignored by a rule.
        reset_head: keep the model's fresh classifier when the file's has another number of classes or another form (two
            classifiers where there was a teacher, say), or when there is none.
        adapt_input: make the first convolution, of images of 3 channels in the file, one for the model's: summed up for
            1 channel, repeated for more.

    Raises:
        CheckpointError: another family's or variant's weights, or, if strict, any key left over.
    """
    wanted = model.state_dict()
    tensors, parts = split_parts(tensors)
    tensors, counters = without_counters(tensors)
    if set(tensors) != set(wanted) and not model.recognises(set(tensors)) and not _fits(model, tensors, wanted):
        raise CheckpointError(f"{source} cannot be loaded: {_explain_misfit(model, tensors)}")
    given = model.own_keys(dict(tensors))
    report = LoadReport(source)
    if counters:
        report.ignored["FLOPs counted by thop"] = counters
    for part, keys in parts.items():
        report.ignored[f"part of another model, {part}"] = keys
    accepted: dict[str, torch.Tensor] = {}
    first_conv = getattr(model, "first_conv", None)
    for key, value in given.items():
        if key not in wanted:
            rule = _rule_for_extra(model, key)
            if not rule and reset_head and key.startswith("head."):
                rule = "classifier of another form, re-initialised"
            if rule:
                report.ignored.setdefault(rule, []).append(key)
            else:
                report.unexpected.append(key)
            continue
        target = wanted[key]
        if _is_position_table(key, value) and value.shape[:2] == target.shape[:2]:
            if value.shape != target.shape:
                report.resampled.append((key, tuple(value.shape[2:]), tuple(target.shape[2:])))
            value = resample_position_table(value, *target.shape[2:])
        if adapt_input and key == f"{first_conv}.weight" and value.shape[1] == 3 != target.shape[1]:
            value = adapt_input_conv(target.shape[1], value)
            report.adapted.append(key)
        if value.shape != target.shape:
            if reset_head and key.startswith("head."):
                report.ignored.setdefault("classifier of another size, re-initialised", []).append(key)
            else:
                report.mismatched.append((key, tuple(value.shape), tuple(target.shape)))
            continue
        accepted[key] = value
        report.loaded.append(key)
    seen = set(given)
    for key in wanted:
        if key in seen:
            continue
        rule = model.rule_for_missing(key, given)
        if not rule and key.endswith(".num_batches_tracked"):
            rule = "counter of a batch norm, which the file does not have"
        if rule:
            report.ignored.setdefault(rule, []).append(key)
        elif reset_head and key.startswith("head."):
            report.ignored.setdefault("no classifier in the file, initialised anew", []).append(key)
        else:
            report.missing.append(key)
    if strict and not report.complete:
        head_only = all(name.startswith("head.") for name, _, _ in report.mismatched) and not (
            report.missing or report.unexpected
        )
        advice = (
            f"the classifier has {_num_classes(model, given)} classes in the file and {model.num_classes} in the model;"
            " pass reset_head=True to start it anew"
            if head_only
            else _explain_misfit(model, tensors)
        )
        raise CheckpointError(f"{source} does not fit: {advice}\n{report}")
    model.load_state_dict(accepted, strict=False)
    return report


def _rule_for_extra(model: ModelFamily, key: str) -> str | None:
    if key.startswith(model.classifier_parts) and isinstance(model.head, nn.Identity):
        if model.features_only or key.startswith("head."):
            return "classifier of a model without one"
    if model.features_only and key.startswith("cls_token.") and "cls_token.tokens" not in model.state_dict():
        return "class tokens of a model without them"
    stage = re.match(r"stages\.(\d+)\.", key)
    if model.features_only and stage and int(stage[1]) >= len(model.stages):
        return "stage behind the last one asked for"
    norm = re.match(r"out_norms\.(\d+)\.", key)
    if model.features_only and norm and int(norm[1]) not in model.out_indices:
        return "output norms of maps that are not asked for"
    return model.rule_for_extra(key)


def load_weights(
    model: ModelFamily,
    file: str | os.PathLike,
    *,
    strict: bool = True,
    reset_head: bool = False,
    ema: bool | None = None,
    adapt_input: bool = False,
    verbose: bool = True,
) -> LoadReport:
    """Load an official checkpoint file, or one of ours, into a backbone or a U-Net, and report on every key.

    Args:
        model: model of the variant that the file belongs to.
        file: ``.safetensors`` or PyTorch checkpoint, with or without wrappers (see `unwrap`).
        strict, reset_head, adapt_input: see `load_state_dict`.
        ema: prefer averaged weights where the file has both; None: if the accuracy published for the variant is theirs,
            or none is published.
        verbose: print the report.

    Raises:
        FileNotFoundError, CheckpointError: see `read_checkpoint` and `load_state_dict`.
    """
    if ema is None:
        ema = model.published.get(model.variant or "", {}).get("ema", True)
    tensors = unwrap(read_checkpoint(file), str(file), ema=ema, prefixes=model.wrappers)
    options: dict[str, bool] = dict(strict=strict, reset_head=reset_head, adapt_input=adapt_input)
    report = load_state_dict(model, tensors, source=str(file), **options)
    if verbose:
        print(report)
    return report

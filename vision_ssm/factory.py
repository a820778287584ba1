"""Models by name, and models brought along from original repositories."""

import fnmatch
import inspect
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch

from . import backbones  # noqa: F401  (registers the families)
from .backbones.base import Backbone
from .registry import BACKBONES, suggest
from .weights import load_state_dict, load_weights


def families() -> dict[str, list[type[Backbone]]]:
    """Classes of every backbone family, by the family's name. Most families have one."""
    found: dict[str, list[type[Backbone]]] = {}
    for cls in BACKBONES.module_dict.values():
        found.setdefault(cls.family, []).append(cls)
    return found


def find_family(name: str) -> type[Backbone]:
    """The class that has variant `name`; `KeyError` with suggestions if none has it."""
    for cls in BACKBONES.module_dict.values():
        if name in cls.variants:
            return cls
    raise KeyError(f"unknown model {name!r}.{suggest(name, list_models())} list_models() names all of them.")


def list_models(pattern: str = "*") -> list[str]:
    """Names of all variants that match a shell-style `pattern`, such as ``"vmamba_*"``."""
    names = (name for cls in BACKBONES.module_dict.values() for name in cls.variants)
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def check_overrides(name: str, overrides: Collection[str], valid: Collection[str]) -> None:
    """Raise `TypeError` with suggestions if keywords of a model that messages call `name` are not among the `valid`."""
    unknown = sorted(set(overrides) - set(valid))
    if unknown:
        hints = "".join(text for key in unknown if "mean" in (text := suggest(key, valid)))
        raise TypeError(f"{name} has no keyword {', '.join(map(repr, unknown))}.{hints} Keywords: {', '.join(valid)}.")


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    features_only: bool | None = None,
    out_indices: Sequence[int] | None = None,
    pretrained: str | os.PathLike | None = None,
    reset_head: bool = False,
    **overrides: Any,
) -> Backbone:
    """Build a backbone by the name of its variant.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; 0 for none.
        features_only: build the dense backbone, which returns one (B, C, H', W') map per stage, finest first. None: as
            the variant is published, which is a classifier for nearly all.
        out_indices: stages of a `features_only` model; all by default.
        pretrained: file with official weights or weights of ours, for `load_weights`.
        reset_head: start the classifier anew if the file's has another number of classes; otherwise that is an error.
        **overrides: any keyword of the family, such as `in_chans`, `drop_path_rate` or `scan` (a strategy's name, a
            dict with ``type``, or options that replace some of the variant's own).

    Raises:
        KeyError: unknown name. TypeError: unknown keyword. Both say what is known.
        FileNotFoundError, CheckpointError: `pretrained` cannot be read or does not fit.
    """
    cls = find_family(name)
    check_overrides(name, overrides, cls.keywords())
    settings = dict(overrides, num_classes=num_classes, out_indices=out_indices)
    if features_only is not None:
        settings["features_only"] = features_only
    model = _entry_point(cls, name)(**settings)
    if pretrained is True:
        origin = cls.published.get(name, {}).get("url")
        advice = f"download {origin} and pass its path" if origin else "no official weights are published for it"
        raise ValueError(f"pretrained takes a file: {advice} (model {name})")
    if pretrained:
        load_weights(model, pretrained, reset_head=reset_head)
    return model


def _entry_point(cls: type[Backbone], name: str) -> Any:
    return getattr(inspect.getmodule(cls), name)


def import_official(family: str, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> Backbone:
    """Build a model from an original repository's hyperparameters and state dict, and load it strictly.

    Args:
        family: name of the family, such as ``"vmamba"``.
        config: hyperparameters as the original constructor takes them; what is left out has the original's default.
        state_dict: the original's tensors under the original's names. With `config` they say which of a family's
            classes the model was: its version, and whether it is a classifier or a dense backbone.

    Returns:
        The model in eval mode. ``model(x)`` gives logits where the weights hold a classifier;
        ``model.forward_intermediates(x)`` gives (B, C, H, W) maps, normalised when the weights hold output norms.

    Raises:
        KeyError: unknown family. ValueError: hyperparameter unknown to the original. CheckpointError: the state dict
        does not fit the model the hyperparameters describe.
    """
    known = families()
    if family not in known:
        raise KeyError(f"unknown family {family!r}.{suggest(family, known)}")
    keys = set(state_dict)
    cls = next((cls for cls in known[family] if cls.recognises(keys)), known[family][0])
    model = cls(**cls.from_official_config(dict(config), keys))
    # converted first, because two families may share a form that only the hyperparameters tell apart
    load_state_dict(model, model.own_keys(dict(state_dict)), source=f"the given {family} state dict")
    return model.eval()

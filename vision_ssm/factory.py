"""Models by name, and models brought along from original repositories."""

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import Registry

from . import backbones, unets  # noqa: F401  (registers the families)
from .backbones.base import Backbone
from .backbones.family import ModelFamily, build_variant, check_overrides, owner_of
from .registry import BACKBONES, UNETS, suggest
from .unets.base import UNet, load_encoder
from .weights import load_state_dict, load_weights


def families() -> dict[str, list[type[Backbone]]]:
    """Classes of every backbone family, by the family's name. Most families have one."""
    return _by_family(BACKBONES)


def unet_families() -> dict[str, list[type[UNet]]]:
    """Classes of every family of U-Nets, by the family's name."""
    return _by_family(UNETS)


def _by_family(registry: Registry) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for cls in registry.module_dict.values():
        found.setdefault(cls.family, []).append(cls)
    return found


def find_family(name: str) -> type[Backbone]:
    """The class of the backbone `name`; `KeyError` with suggestions if there is none."""
    cls = owner_of(name, BACKBONES)
    if cls is None:
        raise KeyError(f"unknown model {name!r}.{suggest(name, list_models())} list_models() names all of them.")
    return cls


def list_models(pattern: str = "*") -> list[str]:
    """Names of all backbones that match a shell-style `pattern`, such as ``"vmamba_*"``."""
    return _names(BACKBONES, pattern)


def list_unets(pattern: str = "*") -> list[str]:
    """Names of all U-Nets that match a shell-style `pattern`, such as ``"vmunet_*"``."""
    return _names(UNETS, pattern)


def _names(registry: Registry, pattern: str) -> list[str]:
    names = (name for cls in registry.module_dict.values() for name in cls.variants)
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    features_only: bool | None = None,
    out_indices: Sequence[int] | None = None,
    pretrained: str | os.PathLike | None = None,
    reset_head: bool = False,
    encoder_weights: str | os.PathLike | None = None,
    **overrides: Any,
) -> Any:
    """Build a backbone or a U-Net by the name of its variant.

    Args:
        name: one of `list_models()` or `list_unets()`.
        num_classes: outputs of the classifier, 0 for none, 1000 by default; of a U-Net, channels of the scores, by
            default as the variant is published.
        features_only: build the dense backbone, which returns one (B, C, H', W') map per stage, finest first. None: as
            the variant is published, which is a classifier for nearly all.
        out_indices: stages of a `features_only` model; all by default.
        pretrained: file with official weights or weights of ours, for `load_weights`.
        reset_head: start the classifier anew if the file's has another number of classes; otherwise that is an error.
        encoder_weights: file with classification weights for the encoder of a U-Net, for `load_encoder`.
        **overrides: any keyword of the family, such as `in_chans`, `drop_path_rate` or `scan` (a strategy's name, a
            dict with ``type``, or options that replace some of the variant's own).

    Returns:
        A `Backbone` or a `UNet`.

    Raises:
        KeyError: unknown name. TypeError: unknown keyword. Both say what is known.
        FileNotFoundError, CheckpointError: `pretrained` or `encoder_weights` cannot be read or does not fit.
    """
    cls = owner_of(name, UNETS)
    if cls is not None:
        return _create_unet(
            cls,
            name,
            {"num_classes": num_classes, "features_only": features_only, "out_indices": out_indices, **overrides},
            pretrained,
            reset_head,
            encoder_weights,
        )
    cls = owner_of(name, BACKBONES)
    if cls is None:
        hint = suggest(name, [*list_models(), *list_unets()])
        raise KeyError(f"unknown model {name!r}.{hint} list_models() and list_unets() name all of them.")
    if encoder_weights is not None:
        raise TypeError(f"{name} is a backbone: encoder_weights are for U-Nets; pretrained=... loads its weights")
    check_overrides(name, overrides, cls.keywords())
    settings = dict(overrides, num_classes=1000 if num_classes is None else num_classes, out_indices=out_indices)
    if features_only is not None:
        settings["features_only"] = features_only
    model = build_variant(cls, name, **settings)
    _load(model, pretrained, reset_head)
    return model


def _create_unet(
    cls: type[UNet],
    name: str,
    overrides: dict[str, Any],
    pretrained: str | os.PathLike | None,
    reset_head: bool,
    encoder_weights: str | os.PathLike | None,
) -> UNet:
    overrides = {key: value for key, value in overrides.items() if value is not None}
    check_overrides(name, overrides, cls.keywords())
    if pretrained and encoder_weights:
        raise ValueError("pretrained holds the whole U-Net, encoder_weights only its encoder: give one of the two")
    model = build_variant(cls, name, **overrides)
    _load(model, pretrained, reset_head)
    if encoder_weights is True:
        backbone = cls.published.get(name, {}).get("encoder_weights")
        origin = find_family(backbone).published[backbone]["url"] if backbone else None
        advice = f"download {origin} ({backbone}) and pass its path" if origin else "none are published for it"
        raise ValueError(f"encoder_weights takes a file: {advice} (model {name})")
    if encoder_weights:
        load_encoder(model, encoder_weights)
    return model


def _load(model: ModelFamily, pretrained: str | os.PathLike | None, reset_head: bool) -> None:
    if pretrained is True:
        origin = model.published.get(model.variant or "", {}).get("url")
        advice = f"download {origin} and pass its path" if origin else "no official weights are published for it"
        raise ValueError(f"pretrained takes a file: {advice} (model {model.variant})")
    if pretrained:
        load_weights(model, pretrained, reset_head=reset_head)


def _has_original(cls: type[ModelFamily]) -> bool:
    """Whether the family follows an original, and not only a paper."""
    return any("from_official_config" in vars(base) for base in cls.__mro__ if base is not ModelFamily)


def import_official(family: str, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> Any:
    """Build a model from an original repository's hyperparameters and state dict, and load it strictly.

    Args:
        family: name of the family of backbones or U-Nets, such as ``"vmamba"`` or ``"vmunet"``.
        config: hyperparameters as the original constructor takes them; what is left out has the original's default.
        state_dict: the original's tensors under the original's names. With `config` they say which of a family's
            classes the model was: its version, and whether it is a classifier or a dense backbone.

    Returns:
        The model in eval mode, a `Backbone` or a `UNet`. ``model(x)`` gives logits where the weights hold a classifier,
        and raw scores of a U-Net; ``model.forward_intermediates(x)`` gives (B, C, H, W) maps, normalised when the
        weights hold output norms, and of a U-Net those of the encoder.

    Raises:
        KeyError: unknown family. ValueError: hyperparameter unknown to the original. CheckpointError: the state dict
        does not fit the model the hyperparameters describe.
    """
    known: dict[str, list[type[ModelFamily]]] = {**families(), **unet_families()}
    known = {name: found for name, found in known.items() if any(map(_has_original, found))}
    if family not in known:
        raise KeyError(f"unknown family {family!r}.{suggest(family, known)}")
    keys = set(state_dict)
    cls = next((cls for cls in known[family] if cls.recognises(keys)), known[family][0])
    model = cls(**cls.from_official_config(dict(config), keys))
    # converted first, because two families may share a form that only the hyperparameters tell apart
    load_state_dict(model, model.own_keys(dict(state_dict)), source=f"the given {family} state dict")
    return model.eval()

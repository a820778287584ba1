"""Models by name, and models brought along from original repositories."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.registry import Registry

from . import backbones, unets  # noqa: F401  (registers the families)
from .backbones.base import Backbone
from .backbones.family import ModelFamily, build_variant, check_overrides, owner_of
from .published import fetch_weights, find_weights, split_tag
from .registry import BACKBONES, UNETS, suggest
from .unets.base import UNet, load_encoder
from .weights import load_state_dict, unwrap, without_counters, without_prefixes


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


def find_any(name: str) -> type[Backbone] | type[UNet]:
    """The class of the backbone or U-Net `name`; `KeyError` with suggestions if there is none."""
    cls = owner_of(name, UNETS) or owner_of(name, BACKBONES)
    if cls is None:
        hint = suggest(name, [*list_models(), *list_unets()])
        raise KeyError(f"unknown model {name!r}.{hint} list_models() and list_unets() name all of them.")
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
    pretrained: bool | str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    reset_head: bool = False,
    encoder_weights: bool | str | os.PathLike | None = None,
    **overrides: Any,
) -> Any:
    """Build a backbone or a U-Net by the name of its variant.

    Args:
        name: one of `list_models()` or `list_unets()`; ``"variant.tag"`` names one of several published trainings.
        num_classes: outputs of the classifier, 0 for none, 1000 by default; of a U-Net, channels of the scores, by
            default as the variant is published.
        features_only: build the dense backbone, which returns one (B, C, H', W') map per stage, finest first. None: as
            the variant is published, which is a classifier for nearly all.
        out_indices: stages of a `features_only` model; all by default.
        pretrained: True for the official weights, which are downloaded once; the tag of one of several; or a file with
            official weights or weights of ours, for `load_weights`. The first convolution is adapted to another
            `in_chans` than 3.
        cache_dir: folder of downloaded weights, see `vision_ssm.download.cache_folder`.
        reset_head: start the classifier anew if the file's has another number of classes; otherwise that is an error.
        encoder_weights: of a U-Net: True for the official classification weights of its encoder, which are downloaded
            once, or a file of such weights, for `load_encoder`.
        **overrides: any keyword of the family, such as `in_chans`, `drop_path_rate` or `scan` (a strategy's name, a
            dict with ``type``, or options that replace some of the variant's own).

    Returns:
        A `Backbone` or a `UNet`.

    Raises:
        KeyError: unknown name or tag. TypeError: unknown keyword, or a value of another type than it takes. All say
            what is known.
        ValueError: a size below 1, a rate outside of 0 to 1, or weights that are not published.
        DownloadError: weights that cannot be downloaded.
        FileNotFoundError, CheckpointError: `pretrained` or `encoder_weights` cannot be read or does not fit.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is that of a model, such as 'vmamba_tiny_s1l8', got {name!r}")
    variant, tag = split_tag(name)
    cls = find_any(variant)
    settings = dict(overrides, num_classes=num_classes, features_only=features_only, out_indices=out_indices)
    if issubclass(cls, UNet):
        settings = {key: value for key, value in settings.items() if value is not None}
        check_overrides(variant, settings, cls.keywords())
        if pretrained and encoder_weights:
            raise ValueError("pretrained holds the whole U-Net, encoder_weights only its encoder: give one of the two")
    else:
        if encoder_weights is not None:
            raise TypeError(f"{name} is a backbone: encoder_weights are for U-Nets; pretrained=... loads its weights")
        check_overrides(variant, overrides, cls.keywords())
        settings["num_classes"] = 1000 if num_classes is None else num_classes
        if features_only is None:
            del settings["features_only"]
    if pretrained or encoder_weights:
        with torch.device("meta"):
            build_variant(cls, variant, **settings)  # nothing is downloaded for a model that cannot be built
    weights = find_weights(cls, variant, tag, pretrained, cache_dir)
    encoder = encoder_file(cls, variant, encoder_weights, overrides, cache_dir)
    model = build_variant(cls, variant, **settings)
    if weights.tag:
        model.take_name(variant, weights.tag)
    weights.load(model, reset_head)
    if encoder is not None:
        load_encoder(model, encoder)
    return model


def encoder_file(
    cls: type[ModelFamily],
    name: str,
    encoder_weights: bool | str | os.PathLike | None,
    overrides: Mapping[str, Any],
    cache_dir: str | os.PathLike | None = None,
) -> str | os.PathLike | None:
    """File of the weights for the encoder of U-Net `name` with `overrides`; True: the published ones are fetched.

    Raises:
        ValueError: none are published. DownloadError: they cannot be downloaded.
    """
    if encoder_weights is not True:
        return encoder_weights or None
    backbone = cls.encoder_of(name, overrides) if issubclass(cls, UNet) else None
    if backbone is None:
        raise ValueError(f"no weights are published for the encoder of {name}: name a file of them, or leave them out")
    return fetch_weights(find_family(backbone), backbone, cache_dir=cache_dir)


def _has_original(cls: type[ModelFamily]) -> bool:
    """Whether the family follows an original, and not only a paper."""
    return any("from_official_config" in vars(base) for base in cls.__mro__ if base is not ModelFamily)


def import_official(family: str, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> Any:
    """Build a model from an original repository's hyperparameters and state dict, and load it strictly.

    Args:
        family: name of the family of backbones or U-Nets, such as ``"vmamba"`` or ``"vmunet"``.
        config: hyperparameters as the original constructor takes them; what is left out has the original's default, and
            the number of classes is then that of the classifier's weights.
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
    if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        state_dict = unwrap(state_dict, f"the given {family} checkpoint")
    tensors, _ = without_counters(state_dict)
    found = next((cls for cls in known[family] if cls.recognises(set(tensors))), None)
    cls = found or known[family][0]
    if found is None:  # as it is in a file of a wrapped model
        tensors = without_prefixes(tensors, cls.wrappers)
        cls = next((cls for cls in known[family] if cls.recognises(set(tensors))), cls)
    settings = cls.from_official_config(dict(config), set(tensors))
    if "num_classes" not in config and settings.get("num_classes"):
        classifier = cls.official_keys(tensors).get(cls.classifier_key)
        settings["num_classes"] = settings["num_classes"] if classifier is None else len(classifier)
    model = cls(**settings)
    # converted first, because two families may share a form that only the hyperparameters tell apart
    load_state_dict(model, model.own_keys(tensors), source=f"the given {family} state dict")
    return model.eval()

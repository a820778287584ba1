"""The door to timm: after ``import vision_ssm``, ``timm.create_model`` knows every backbone.

Names under which timm has models of its own (EfficientViM's) stay timm's: there ours are called ``vision_ssm_NAME``,
and `vision_ssm.create_model` takes their own name. ``timm.list_models(module="vision_ssm")`` lists all.
"""

import logging
import sys
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    load_state_dict_from_hf,
    register_model,
    resolve_pretrained_cfg,
)

from ..backbones.base import Backbone
from ..download import fetch
from ..factory import create_model, find_family, list_models
from ..published import fetch_weights
from ..weights import CheckpointError, load_state_dict, load_weights, unwrap

PREFIX = "vision_ssm_"
"""In front of names that timm has given to models of its own."""
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_MODULE = f"{__name__}.vision_ssm"  # timm lists models under the last part
_SETTINGS = {field.name for field in fields(PretrainedCfg)}
_logger = logging.getLogger(__name__)
_names: dict[str, str] = {}


def timm_name(variant: str) -> str:
    """Name of a backbone in timm's registry."""
    return _names[variant]


def register() -> None:
    """Enter all backbones into timm's registry; nothing is built. Names that are taken get a prefix."""
    module = ModuleType(_MODULE, "Entry points and settings of the models that vision_ssm brings to timm.")
    settings: dict[str, PretrainedCfg] = {}
    entry_points = []
    for variant in list_models():
        if variant in _names:
            continue
        name = PREFIX + variant if timm.is_model(variant) else variant
        _names[variant] = name
        family = find_family(variant)
        for tag in family.weights_of(variant) or ("",):
            settings[f"{name}.{tag}" if tag else name] = replace(family.settings_of(variant, tag), architecture=name)
        entry_points.append(_entry_point(variant, name))
    module.default_cfgs = generate_default_cfgs(settings)  # type: ignore[attr-defined]
    sys.modules[_MODULE] = module  # where timm looks for the settings of what it registers
    for entry_point in entry_points:
        setattr(module, entry_point.__name__, register_model(entry_point))


def _entry_point(variant: str, name: str) -> Callable[..., Backbone]:
    def create(pretrained: bool = False, **settings: Any) -> Backbone:
        return build(variant, pretrained, **settings)

    create.__name__ = create.__qualname__ = name
    create.__module__ = _MODULE
    create.__doc__ = f"`{variant}` of vision_ssm; keywords as for `vision_ssm.create_model`."
    return create


def build(
    variant: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    out_indices: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Backbone:
    """Build a backbone as timm does.

    As timm, and other than `vision_ssm.create_model`: with `pretrained`, a classifier of another number of classes
    starts anew without being asked for.

    Args:
        variant: name of a backbone.
        pretrained: load the weights that the settings name.
        pretrained_cfg: a tag, or settings in place of those of the registry.
        pretrained_cfg_overlay: settings that replace some, such as ``file``, the path of official weights.
        pretrained_model_args: keywords that saved weights were made with, which timm has put among the others.
        cache_dir: see `vision_ssm.download.cache_folder`.
        num_classes, in_chans: by default those of the settings.
        out_indices: as for `create_model`, or a number: the last so many maps.
        device, dtype: of the parameters.
        **overrides: other keywords of `create_model`.

    Raises:
        What `create_model` raises. RuntimeError: settings that name no weights.
    """
    if isinstance(pretrained_cfg, Mapping):
        pretrained_cfg = {key: value for key, value in pretrained_cfg.items() if key in _SETTINGS}
    settings = resolve_pretrained_cfg(timm_name(variant), pretrained_cfg, pretrained_cfg_overlay)
    if isinstance(out_indices, int):
        out_indices = range(-out_indices, 0)
    overrides.update(
        num_classes=settings.num_classes if num_classes is None else num_classes,
        in_chans=settings.input_size[0] if in_chans is None else in_chans,
        out_indices=out_indices,
    )
    if not overrides.get("drop_path_rate") and "drop_path_rate" not in find_family(variant).keywords():
        overrides.pop("drop_path_rate", None)  # no rate is what a family without drop path has
    if pretrained:
        with torch.device("meta"):
            create_model(variant, **overrides)  # nothing is downloaded for a model that cannot be built
        source = _find_source(variant, settings, cache_dir)
    with torch.device(device or torch.get_default_device()):
        model = create_model(variant, **overrides)
    model.describe(settings)
    if pretrained:
        options: dict[str, Any] = dict(reset_head=True, adapt_input=True)
        if isinstance(source, Mapping):
            report = load_state_dict(model, unwrap(source, "state dict"), **options)
        else:
            known = find_family(variant).weights_of(variant).get(settings.tag or "", {})
            report = load_weights(model, source, ema=known.get("ema"), verbose=False, **options)
        _logger.info(str(report))
    return model if dtype is None else model.to(dtype)


def _find_source(variant: str, settings: PretrainedCfg, cache_dir: str | Path | None) -> Path | Mapping[str, Any]:
    """File or state dict that `settings` name, in timm's order: state dict, file, hub, link."""
    if settings.state_dict:
        return settings.state_dict
    if settings.file:
        file = Path(settings.file)
        if settings.source != "local-dir":
            return file
        found = next((file / name for name in FOLDER_FILES if (file / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"the folder {file} holds none of {', '.join(FOLDER_FILES)}")
        return found
    if settings.hf_hub_id:
        location = [settings.hf_hub_id, settings.hf_hub_filename] if settings.hf_hub_filename else [settings.hf_hub_id]
        return load_state_dict_from_hf(*location, weights_only=True, cache_dir=cache_dir)
    family, link = find_family(variant), settings.url or settings.origin_url
    if isinstance(settings.url, (tuple, list)):
        return fetch(*settings.url, cache_dir=cache_dir)
    published = {entry["url"]: tag for tag, entry in family.weights_of(variant).items()}
    if link in published:
        return fetch_weights(family, variant, published[link], cache_dir)
    if settings.url:
        return fetch(settings.url, Path(urllib.parse.urlsplit(settings.url).path).name, cache_dir=cache_dir)
    raise RuntimeError(f"no official weights are published for {variant}: use pretrained=False for random ones")

"""What a family of models is, backbones and U-Nets alike: named variants, and weights of an original repository."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Literal, TypeVar

import torch
from mmengine.registry import Registry
from torch import nn

from ..arguments import check_values, without_numpy
from ..registry import BACKBONES, suggest

_Model = TypeVar("_Model", bound="ModelFamily")
WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_OF_ONE_TRAINING = ("url", "file", "cached_as", "sha256", "tag", "ema", "also")


def register_family(cls: type[_Model]) -> dict[str, Callable[..., _Model]]:
    """Enter a family into its registry.

    Returns its entry points, one function per variant, for the family's module to export.
    """
    cls.registry.register_module(module=cls)

    def entry_point(name: str) -> Callable[..., _Model]:
        def create(**overrides: Any) -> _Model:
            model = cls(**cls.variant_settings(name, overrides))
            model.take_name(name)
            model.overrides = overrides
            return model

        create.__name__ = create.__qualname__ = name
        create.__doc__ = f"`{name}` of {cls.__name__}; keywords override the variant's: {cls.variants[name]}."
        return create

    return {name: entry_point(name) for name in cls.variants}


def resolve_scan(scan: str | dict | Literal[False] | None, default: dict) -> dict | Literal[False]:
    """The scan of a block: `default`, another strategy, or `default` with some options replaced.

    A dict without ``type`` changes options of the variant's own strategy; a name or a dict with ``type`` replaces it;
    None is the default and False leaves the mixer out.
    """
    if scan is None:
        return dict(default)
    if scan is False:
        return False
    if isinstance(scan, str):
        return {"type": scan}
    if isinstance(scan, dict):
        return dict(scan) if "type" in scan else {**default, **scan}
    raise TypeError(f"scan is a strategy's name or a dict of options, got {scan!r}")


def check_overrides(name: str, overrides: Collection[str], valid: Collection[str]) -> None:
    """Raise `TypeError` with suggestions if keywords of a model that messages call `name` are not among the `valid`."""
    unknown = sorted(set(overrides) - set(valid))
    if unknown:
        hints = "".join(text for key in unknown if "mean" in (text := suggest(key, valid)))
        raise TypeError(f"{name} has no keyword {', '.join(map(repr, unknown))}.{hints} Keywords: {', '.join(valid)}.")


def owner_of(name: str, registry: Registry) -> Any:
    """The class of `registry` that has variant `name`, or None."""
    return next((cls for cls in registry.module_dict.values() if name in cls.variants), None)


def build_variant(cls: type[_Model], name: str, **settings: Any) -> _Model:
    """Variant `name` of a family, by its entry point."""
    return getattr(inspect.getmodule(cls), name)(**settings)


def points_to_file(url: str) -> bool:
    """Whether a link is one to a weight file, and not to a page that a person downloads it from."""
    return url.rsplit("/", 1)[-1].endswith(WEIGHT_FILES)


class ModelFamily(nn.Module):
    """Base of all models that have named variants and official weights.

    Attributes:
        variant: name this model was created under.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        pretrained_cfg: what is known of the variant's images and published weights.
        overrides: keywords that this model was built with in place of the variant's.
    """

    registry: ClassVar[Registry] = BACKBONES
    """Registry that the family belongs to."""
    family: ClassVar[str]
    """Name of the family, as `import_official` takes it."""
    variants: ClassVar[dict[str, dict[str, Any]]]
    """Constructor keywords of every published variant, and of the family's small test variant."""
    published: ClassVar[dict[str, dict[str, Any]]] = {}
    """Official weights of a variant, as far as their authors say.

    ``url``: of the file, or of a page to download it from. ``file``: its name, and ``cached_as``: its name in the cache
    where the published one says too little. ``top1_reported`` and the like, ``ema``: whether that is the accuracy of
    averaged weights, ``license``, ``paper``, ``sha256``, ``input_size``, ``crop_pct``. ``also`` lists further weights
    of the same variant in the same form, where another training of it is published; each then has a ``tag``.
    """
    common_cfg: ClassVar[dict[str, Any]] = {}
    """What the `pretrained_cfg` of every variant begins with."""
    classifier_key: str = "head.weight"
    """A tensor of the classifier whose first size is the number of classes."""
    classifier_parts: ClassVar[tuple[str, ...]] = ("norm.", "head.")
    """What a classifier has and a `features_only` model has not: the beginnings of the names of its parameters."""
    wrappers: ClassVar[tuple[str, ...]] = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.")
    """Beginnings of names in checkpoints that training and wrapping code put in front of all names of a model."""

    variant: str | None
    num_classes: int
    in_chans: int
    pretrained_cfg: dict[str, Any]
    overrides: dict[str, Any]
    features_only: bool = False
    out_indices: list[int]
    head: nn.Module

    @classmethod
    def registered(cls) -> type["ModelFamily"]:
        """The family's class as its registry holds it, for this class or one that wraps it."""
        known = set(cls.registry.module_dict.values())
        return next(base for base in cls.__mro__ if base in known)

    @classmethod
    def keywords(cls) -> list[str]:
        """Keywords of the family's constructor, those of its base classes included."""
        names: list[str] = []
        for constructor in cls._constructors():
            parameters = inspect.signature(constructor).parameters.values()
            names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        return list(dict.fromkeys(names))

    @classmethod
    def _constructors(cls) -> list[Callable]:
        bases = [base for base in cls.registered().__mro__ if issubclass(base, ModelFamily)]
        return [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]

    @classmethod
    def variant_settings(cls, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
        """Constructor keywords of variant `name` with some replaced; a `scan` may replace some options only.

        Raises:
            TypeError, ValueError: a value that its keyword does not take.
        """
        settings = {**cls.variants[name], **without_numpy(overrides)}
        if overrides.get("scan") is not None:
            settings["scan"] = resolve_scan(overrides["scan"], cls.variants[name].get("scan", {}))
        check_values(cls._constructors(), overrides, name)
        return settings

    def take_name(self, name: str, tag: str = "") -> None:
        """Go by the name of a variant from now on; `tag` says which of several published weights it has."""
        self.variant = name
        self.pretrained_cfg = {**self.common_cfg, **self.published.get(name, {})}

    @property
    def image_channels(self) -> tuple[int, ...]:
        """Numbers of channels that images may have."""
        return (self.in_chans,)

    def check_images(self, x: torch.Tensor) -> None:
        """`x` is floating-point and (B, C, H, W), with C one of `image_channels`.

        Raises:
            TypeError: another dtype.
            ValueError: another shape, or no pixels.
        """
        name, channels = self.variant or type(self).__name__, self.image_channels
        if x.ndim != 4 or x.shape[1] not in channels or 0 in x.shape[2:]:
            hint = "create the model with in_chans=... for another number of channels"
            if x.ndim == 4 and x.shape[1] in channels:
                hint = "an image has one pixel at least"
            elif x.ndim == 4 and x.shape[3] in channels:
                hint = "move the channels to the front: x.permute(0, 3, 1, 2)"
            elif x.ndim == 3 and (x.shape[0] in channels or x.shape[2] in channels):
                front = "" if x.shape[0] in channels else "permute(2, 0, 1)."
                hint = f"make one image a batch: x.{front}unsqueeze(0)"
            wanted = " or ".join(f"(B, {count}, H, W)" for count in channels)
            raise ValueError(f"{name} takes images {wanted}, got {tuple(x.shape)}; {hint}")
        if not x.is_floating_point():
            raise TypeError(
                f"{name} takes images that are floating-point and normalised, got {x.dtype}; scale them to 0..1,"
                " subtract mean and divide by std of model.pretrained_cfg"
            )

    @classmethod
    def weights_of(cls, name: str) -> dict[str, dict[str, Any]]:
        """Weights that are published of variant `name`, in the form of `published`, by tag; the default comes first.

        The tag is empty where there are only one. Every entry has a ``file``, its name in the cache.
        """
        first = cls.published.get(name, {})
        if "url" not in first:
            return {}
        kept = {key: first[key] for key in first if key not in _OF_ONE_TRAINING and not key.endswith("_reported")}
        found = {}
        for entry in (first, *first.get("also", ())):
            tag = entry.get("tag", "")
            file = entry.get("cached_as") or entry.get("file") or (f"{name}.{tag}.pth" if tag else f"{name}.pth")
            found[tag] = {**kept, **{key: value for key, value in entry.items() if key != "also"}, "file": file}
        return found

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        """Constructor keywords for an original repository's hyperparameters and the keys of its state dict."""
        raise NotImplementedError

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An original state dict under our names and shapes; a state dict of ours is returned as it is."""
        raise NotImplementedError

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`official_keys` for this model, where the originals' names depend on more than the state dict."""
        return self.official_keys(state_dict)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        """Whether these are keys of this family, official or ours."""
        raise NotImplementedError

    def rule_for_extra(self, key: str) -> str | None:
        """Why a tensor of a checkpoint, under our name, that this model has no place for may be left out; or None."""
        return None

    def rule_for_missing(self, key: str, given: Collection[str]) -> str | None:
        """Why a tensor of this model may be missing from a checkpoint of tensors `given`; None if not."""
        return None

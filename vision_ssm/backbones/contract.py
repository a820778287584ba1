"""What timm and code written for it ask of a backbone, apart from its forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import FeatureInfo, PretrainedCfg
from torch import nn

from .family import ModelFamily, points_to_file

IMAGENET_CLASSES = 1000
_SOURCE = ("license", "input_size", "crop_pct", "tag")
_REPORTED = "_reported"


def timm_settings(name: str, common: Mapping[str, Any], weights: Mapping[str, Any]) -> PretrainedCfg:
    """timm's description of the images and weights of a variant.

    Args:
        name: the variant.
        common: input size, mean, std, interpolation and crop that hold unless the weights say otherwise.
        weights: one entry of `ModelFamily.weights_of`, or what is reported of weights that are not published.

    A link to a file is its ``url``; a page to download it from, which no program can follow, is its ``origin_url``.
    """
    url = weights.get("url")
    notes = [f"{key.removesuffix(_REPORTED)} {value} reported by the paper" for key, value in weights.items()
             if key.endswith(_REPORTED)]  # fmt: skip
    if "ema" in weights:
        notes.append("averaged weights" if weights["ema"] else "weights as trained, not averaged")
    return PretrainedCfg(
        **{**common, **{key: weights[key] for key in _SOURCE if key in weights}},
        url=url if url and points_to_file(url) else None,
        origin_url=None if not url or points_to_file(url) else url,
        architecture=name,
        paper_ids=weights.get("paper"),
        notes=tuple(notes) or None,
    )


class TimmContract(ModelFamily):
    """Base of `Backbone`: its descriptions, its maps and its shortening, in the form that timm has for them."""

    pos_embed: nn.Module | None
    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    in_chans: int
    stage_info: list[dict[str, Any]]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, settings: dict[str, Any]) -> None:
        self.pretrained_cfg = settings

    @classmethod
    def settings_of(cls, name: str, tag: str = "") -> PretrainedCfg:
        """What is known of variant `name` and of its weights `tag`, by default the first of them."""
        known = cls.weights_of(name)
        weights = known.get(tag) or next(iter(known.values()), cls.published.get(name, {}))
        classes = 0 if cls.variants[name].get("features_only") else IMAGENET_CLASSES
        return timm_settings(name, {**cls.common_cfg, "num_classes": classes}, weights)

    def take_name(self, name: str, tag: str = "") -> None:
        super().take_name(name, tag)
        self.describe(self.settings_of(name, tag))

    def describe(self, settings: PretrainedCfg) -> None:
        """Make `settings`, and what only the built model knows of its parts, the `pretrained_cfg`."""
        own = dict(first_conv=self.first_conv, pool_size=self.pool_size(settings))
        given = settings.to_dict()
        self.pretrained_cfg = given | {key: value for key, value in own.items() if given.get(key) is None}
        self.name_classifier()

    def name_classifier(self) -> None:
        """Say in the `pretrained_cfg` of a variant what its classifier is called, if there is one."""
        names = self.classifiers
        if self.pretrained_cfg and self.pretrained_cfg.get("classifier") is None:
            self.pretrained_cfg["classifier"] = names[0] if len(names) == 1 else names or None

    @property
    def first_conv(self) -> str | None:
        """Name of the convolution that sees the image."""
        convs = (name for name, part in self.stem.named_modules()
                 if isinstance(part, nn.Conv2d) and part.in_channels == self.in_chans)  # fmt: skip
        name = next(convs, None)
        return None if name is None else f"stem.{name}"

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Names of the linear layers whose outputs are logits; none without a classifier."""
        layers = [] if self.num_classes == 0 else self.head.named_modules(prefix="head")
        return tuple(
            name
            for name, part in layers
            if isinstance(part, nn.Linear) and part.out_features == self.num_classes and not name.endswith(".kv")
        )

    def pool_size(self, settings: PretrainedCfg) -> tuple[int, ...] | None:
        """Height and width of the last map of an image of the size that `settings` name."""
        stride = self.stage_info[-1]["reduction"]
        return tuple(-(-side // stride) for side in settings.input_size[1:])

    @property
    def out_info(self) -> list[dict[str, Any]]:
        """For every map that `forward_intermediates` returns by default: dict(num_chs, reduction, module)."""
        return [self.stage_info[i] for i in self.out_indices]

    @property
    def feature_info(self) -> FeatureInfo:
        """timm's description of the maps of all stages: ``channels()``, ``reduction()`` and ``get_dicts()`` tell those
        that are returned, ``feature_info[i]`` that of stage i."""
        returned = dict(zip(self.out_indices, self.out_info))
        info = [dict(returned.get(i, entry)) for i, entry in enumerate(self.stage_info)]
        return FeatureInfo(info, self.out_indices)

    def resolve_indices(self, out_indices: Sequence[int] | None) -> list[int]:
        """Numbers of stages, in order, for `out_indices` that may count from the end.

        Raises:
            TypeError: a single number. ValueError: none, the same one twice, or a stage that there is not.
        """
        count = len(self.stage_info)
        if out_indices is None:
            return self.default_out_indices()
        if isinstance(out_indices, int):
            raise TypeError(f"out_indices is a sequence of stage numbers such as (0, 1, 2, 3), got {out_indices!r}")
        resolved = [i + count if i < 0 else i for i in out_indices]
        if not resolved or any(not 0 <= i < count for i in resolved) or len(set(resolved)) != len(resolved):
            raise ValueError(f"out_indices must be different stages in 0..{count - 1}, got {tuple(out_indices)}")
        return sorted(resolved)

    def default_out_indices(self) -> list[int]:
        """Stages whose maps are returned unless others are asked for."""
        return list(range(len(self.stage_info)))

    def _timm_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Numbers of stages in timm's sense: None is all that there are, a number the last so many."""
        if indices is None:
            return self.out_indices if self.features_only else list(range(len(self.stage_info)))
        if isinstance(indices, int):
            if not 1 <= indices <= len(self.stage_info):
                raise ValueError(f"indices={indices} asks for the last maps of {len(self.stage_info)}")
            indices = range(-indices, 0)
        return self.resolve_indices(indices)

    def built_maps(self) -> list[int]:
        """Numbers of the maps that this model can return."""
        raise NotImplementedError

    def collect(
        self, x: torch.Tensor, indices: Sequence[int], norm: bool | None, whole: bool
    ) -> tuple[Any, list[torch.Tensor]]:
        """One pass that gives both the features and the maps `indices`, each (B, C, H', W').

        Args:
            x: images.
            indices: numbers of the maps, in order.
            norm: see `forward_intermediates`.
            whole: run the stages behind the last map too. The features are those of `forward_features` then, and
                otherwise None.
        """
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: torch.Tensor,
        out_indices: Sequence[int] | None = None,
        *,
        indices: int | Sequence[int] | None = None,
        norm: bool | None = None,
        stop_early: bool | None = None,
        output_fmt: str | None = None,
        intermediates_only: bool | None = None,
    ) -> Any:
        """Maps of stages, finest first, each (B, C, H', W').

        They carry the output norms of a `features_only` model and are raw in a classifier. By default the stages the
        model was built for. The keywords are timm's; with any of them the result is timm's too.

        Args:
            x: images (B, in_chans, H, W).
            out_indices: numbers of stages.
            indices: numbers of stages; a single number is the last so many, None all of a classifier.
            norm: True also normalises maps as the classifier's last one is, where that norm fits; False returns raw
                maps of a `features_only` model too. None: as the model was built.
            stop_early: do not run stages behind the last map; the features are that map then.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the maps alone, without the features in front of them.

        Returns:
            The list of maps. With a keyword of timm's and without `intermediates_only`, a pair: the features that
            `forward_features` returns, and that list.

        Raises:
            TypeError, ValueError: `out_indices` or `indices` that this model does not have, or both; another format.
        """
        as_timm = (indices, norm, stop_early, output_fmt, intermediates_only) != (None,) * 5
        if output_fmt not in (None, "NCHW"):
            raise ValueError(f"output_fmt is 'NCHW', (B, C, H, W): maps have no other format here, got {output_fmt!r}")
        if out_indices is not None and indices is not None:
            raise ValueError("out_indices and indices are two names of the same: give one of them")
        if out_indices is not None or not as_timm:
            wanted = self.out_indices if out_indices is None else self.resolve_indices(out_indices)
        else:
            wanted = self._timm_indices(indices)
        if missing := [i for i in wanted if i not in self.built_maps()]:
            raise ValueError(f"this model was built for out_indices={self.out_indices} and has no map {missing[-1]}")
        pair = as_timm and not intermediates_only
        features, maps = self.collect(x, wanted, norm, whole=pair and not stop_early)
        if not pair:
            return maps
        return (maps[-1] if features is None else features), maps

    def prune(self) -> None:
        """Take away what none of the maps `out_indices` depends on."""
        del self.stages[self.out_indices[-1] + 1 :]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away everything that the maps `indices` do not need, for good: timm's way to a feature extractor.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: the norm in front of the classifier too.
            prune_head: the classifier and the pooling in front of it too.

        Returns:
            Numbers of the maps that are left.
        """
        self.out_indices = self._timm_indices(indices)
        if prune_head and not self.features_only:
            self.reset_classifier(0, "")
        if prune_norm:
            self.norm = nn.Identity()
        self.prune()
        return self.out_indices

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes` classes (0: none)."""
        raise NotImplementedError

"""What can be wrong with the model of a segmentation or detection config, found before anything is built or trained.

Names and keywords are checked as written; backbones are built without memory (on the meta device) to learn what maps
they return, and the channels and strides that necks and heads expect are compared with these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    SCOPE,
    VISUALIZERS,
    suggest,
)
from .mm import DenseBackbone, check_backbone, check_weights

_REGISTRIES = (
    MODELS,
    DATASETS,
    DATA_SAMPLERS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    METRICS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    VISUALIZERS,
)
_RESCALES = (4, 2, 1, 0.5)


class HeadMismatchError(ValueError):
    """Necks or heads of a config that do not fit its backbone; the message has the numbers that do."""


@dataclass
class Maps:
    """Feature maps on their way from the backbone to the heads.

    Attributes:
        source: what made them.
        channels: of every map; None where it is not known.
        strides: of every map, where they are known.
    """

    source: str
    channels: list[int] | None
    strides: list[int] | None

    def __str__(self) -> str:
        assert self.channels is not None
        count = len(self.channels)
        plural = "map" if count == 1 else "maps"
        strides = f" (stride{'s' * (count > 1)} {', '.join(map(str, self.strides))})" if self.strides else ""
        return f"{self.source} gives {count} {plural} of {self.channels} channels{strides}"


def backbone_maps(backbone: Mapping[str, Any]) -> Maps:
    """The maps of a backbone of this library, given its config."""
    settings = {key: value for key, value in backbone.items() if key != "init_cfg"}
    with torch.device("meta"):
        model = MODELS.build(settings)
    info = model.out_info
    return Maps(f"{model.variant}", [entry["num_chs"] for entry in info], [entry["reduction"] for entry in info])


class _HeadCheck:
    """Collects what does not fit while it follows the maps through a model's config."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def expect(self, place: str, given: Any, right: Any, maps: Maps) -> None:
        given = list(given) if isinstance(given, (list, tuple)) else given
        if given != right:
            self.problems.append(f"{place}={given!r}, but {maps}: set {place}={right!r}")

    def neck(self, place: str, neck: Mapping[str, Any], maps: Maps) -> Maps:
        """Checks a neck and returns what comes out of it, unknown channels for a neck that is not known."""
        assert maps.channels is not None
        kind = str(neck.get("type")).rsplit(".", 1)[-1]
        width, strides = neck.get("in_channels"), maps.strides
        if kind == "Feature2Pyramid":
            wide = neck.get("embed_dim")
            if set(maps.channels) != {wide} or len(maps.channels) != len(_RESCALES):
                fitting = maps.channels[0] if len(set(maps.channels)) == 1 else f"the channels of {len(_RESCALES)} maps"
                self.problems.append(f"{place}.embed_dim={wide!r}, but {maps}: it takes {fitting}")
            return Maps(place, [wide] * len(_RESCALES) if isinstance(wide, int) else None, None)
        if isinstance(width, int):
            if kind == "SimpleFPN" and len(maps.channels) != 1:
                self.problems.append(
                    f"{place} takes one map, but {maps}: set model.backbone.out_indices to the last block alone, such"
                    " as (23,)"
                )
            elif set(maps.channels) != {width}:
                self.expect(f"{place}.in_channels", width, maps.channels[-1], maps)
        elif isinstance(width, (list, tuple)):
            right = maps.channels[::-1] if kind == "YOLOV3Neck" else maps.channels
            self.expect(f"{place}.in_channels", width, right, maps)
        out, count = neck.get("out_channels"), neck.get("num_outs")
        if kind == "SimpleFPN":
            out, count = neck.get("out_channels", 256), neck.get("num_outs", 5)
            strides = [strides[0] * step // 4 for step in (1, 2, 4, 8)] if strides and len(strides) == 1 else None
        elif kind == "EfficientViMFPN":
            out, finer, coarser = neck.get("out_channels", 256), neck.get("finer", 1), neck.get("coarser", 1)
            count = finer + len(maps.channels) + coarser
            strides = [strides[0] // 2**step for step in range(finer, 0, -1)] + strides if strides else None
        elif kind == "FPN":
            strides = strides[neck.get("start_level", 0) :] if strides else None
        elif kind == "MultiLevelNeck":
            count, strides = len(neck.get("scales", [0.5, 1, 2, 4])), None
        elif kind == "BFP":
            return Maps(place, list(maps.channels), strides)  # one that refines maps of equal channels
        else:
            strides = None
        if not isinstance(out, int) or not isinstance(count, int):
            return Maps(place, None, None)
        if strides is not None:
            strides = strides[:count]
            while len(strides) < count:
                strides.append(2 * strides[-1])
        return Maps(place, [out] * count, strides)

    def segmentation_head(self, place: str, head: Mapping[str, Any], maps: Maps) -> None:
        """Compares ``in_channels`` with the maps that ``in_index`` chooses."""
        assert maps.channels is not None
        if "in_channels" not in head:
            return
        width, index = head["in_channels"], head.get("in_index", -1)
        if "in_index" not in head and isinstance(width, (list, tuple)):  # Mask2Former and its kin take all maps
            index = list(range(len(maps.channels)))
        indices = list(index) if isinstance(index, (list, tuple)) else [index]
        count = len(maps.channels)
        if any(not isinstance(i, int) or not -count <= i < count for i in indices):
            self.problems.append(f"{place}.in_index={index!r}, but {maps}: there are numbers 0 to {count - 1}")
            return
        chosen = [maps.channels[i] for i in indices]
        if isinstance(width, (list, tuple)) and not isinstance(index, (list, tuple)):
            self.problems.append(f"{place}.in_index={index!r} names one map, in_channels={list(width)!r} several")
            return
        right = chosen if isinstance(index, (list, tuple)) else chosen[0]
        self.expect(f"{place}.in_channels", width, right, maps)

    def dense_head(self, place: str, head: Mapping[str, Any], maps: Maps) -> None:
        """A head that runs on every map: RPN, RetinaNet."""
        assert maps.channels is not None
        if isinstance(head.get("in_channels"), int) and set(maps.channels) != {head["in_channels"]}:
            self.expect(f"{place}.in_channels", head["in_channels"], maps.channels[0], maps)
        anchors = head.get("anchor_generator")
        strides = anchors.get("strides") if isinstance(anchors, Mapping) else None
        if isinstance(strides, (list, tuple)) and all(isinstance(stride, int) for stride in strides):
            place = f"{place}.anchor_generator.strides"
            if maps.strides is not None:
                self.expect(place, strides, maps.strides, maps)
            elif len(strides) != len(maps.channels):
                self.problems.append(f"{place}={list(strides)!r}, but {maps}: it takes one stride per map")

    def roi_head(self, place: str, head: Mapping[str, Any], maps: Maps) -> None:
        """Box and mask branches, whose extractors take the first maps."""
        assert maps.channels is not None
        for branch in ("bbox", "mask"):
            extractor = head.get(f"{branch}_roi_extractor")
            for where, part in _entries(f"{place}.{branch}_roi_extractor", extractor):
                if "out_channels" in part:
                    self.expect(f"{where}.out_channels", part["out_channels"], maps.channels[0], maps)
                strides = part.get("featmap_strides")
                if isinstance(strides, (list, tuple)) and len(strides) > len(maps.channels):
                    self.problems.append(f"{where}.featmap_strides={list(strides)!r}, but {maps}")
                elif isinstance(strides, (list, tuple)) and maps.strides is not None:
                    self.expect(f"{where}.featmap_strides", strides, maps.strides[: len(strides)], maps)
            for where, part in _entries(f"{place}.{branch}_head", head.get(f"{branch}_head")):
                if isinstance(part.get("in_channels"), int):
                    self.expect(f"{where}.in_channels", part["in_channels"], maps.channels[0], maps)


def _entries(place: str, config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A part of a config, or each of a list of them, with its place."""
    if isinstance(config, Mapping):
        yield place, config
    elif isinstance(config, (list, tuple)):
        for i, entry in enumerate(config):
            yield from _entries(f"{place}.{i}", entry)


def check_heads(model: Mapping[str, Any]) -> None:
    """Compare what the neck and the heads of a model expect with the maps that its backbone returns.

    Covers the necks FPN, SimpleFPN, EfficientViMFPN, Feature2Pyramid and MultiLevelNeck and others with in_channels,
    out_channels and num_outs; ``decode_head`` and ``auxiliary_head`` (one or several) by in_channels and in_index;
    ``rpn_head`` and ``bbox_head`` with the strides of their anchors; extractors and heads of ``roi_head``. Behind a
    neck that it does not know it says nothing, nor about backbones of other libraries.

    Args:
        model: config of the model, with ``backbone``.

    Raises:
        HeadMismatchError: something does not fit; names every place and the numbers that do.
    """
    backbone = model.get("backbone")
    if not isinstance(backbone, Mapping) or _own_class(backbone.get("type")) is None:
        return
    own, check = backbone_maps(backbone), _HeadCheck()
    maps = own
    for place, neck in _entries("model.neck", model.get("neck")):
        maps = check.neck(place, neck, maps)
        if maps.channels is None:
            break
    if maps.channels is not None:
        visits = (
            ("decode_head", check.segmentation_head),
            ("auxiliary_head", check.segmentation_head),
            ("rpn_head", check.dense_head),
            ("bbox_head", check.dense_head),
            ("roi_head", check.roi_head),
        )
        for name, visit in visits:
            for place, head in _entries(f"model.{name}", model.get(name)):
                visit(place, head, maps)
    assert own.channels is not None and own.strides is not None
    if check.problems and len(own.strides) > 1 and len(set(own.strides)) == 1:
        check.problems.append(
            f"{own}: for maps of several strides a plain backbone takes pyramid=True, or out_indices of its"
            f" last block alone and neck=dict(type='{SCOPE}.SimpleFPN', in_channels={own.channels[-1]})"
        )
    if check.problems:
        raise HeadMismatchError("the heads do not fit the backbone:\n  " + "\n  ".join(check.problems))


def _own_class(kind: Any) -> type[DenseBackbone] | None:
    """The class that a backbone's ``type`` names, if it is one of this library."""
    if isinstance(kind, str) and kind.startswith(f"{SCOPE}."):
        kind = MODELS.get(kind)
    return kind if isinstance(kind, type) and issubclass(kind, DenseBackbone) else None


def _check_names(config: Any, place: str, known: set[str]) -> None:
    """Every ``type`` of this library in a nested config is one of `known`."""
    if isinstance(config, Mapping):
        kind = config.get("type")
        if isinstance(kind, str) and kind.startswith(f"{SCOPE}.") and kind.removeprefix(f"{SCOPE}.") not in known:
            name = kind.removeprefix(f"{SCOPE}.")
            hint = suggest(name, known)
            raise KeyError(f"{place or 'config'}.type={kind!r}: {SCOPE} has no {name!r}.{hint}")
        entries: Sequence[tuple[Any, Any]] = list(config.items())
    elif isinstance(config, (list, tuple)):
        entries = list(enumerate(config))
    else:
        return
    for key, value in entries:
        _check_names(value, f"{place}.{key}" if place else str(key), known)


def check_config(config: Mapping[str, Any], training: bool = False) -> None:
    """Check names, variants and keywords of this library in a config, and that its heads fit its backbone.

    Args:
        config: a whole config, of mmseg or mmdet, say.
        training: also look for the file of pretrained weights.

    Raises:
        KeyError, TypeError, ValueError: a misspelt name, variant or keyword, with suggestions.
        HeadMismatchError: see `check_heads`. FileNotFoundError: no such file of weights; says where it is published.
    """
    known: set[str] = set()
    for registry in _REGISTRIES:
        registry.import_from_location()
        known.update(registry.module_dict)
    _check_names(config, "", known)
    model = config.get("model")
    backbone = model.get("backbone") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(backbone, Mapping):
        return
    kind = backbone.get("type")
    if isinstance(kind, str) and _own_class(MODELS.module_dict.get(kind)):
        raise KeyError(f"model.backbone.type={kind!r}: backbones of this library are named type='{SCOPE}.{kind}'")
    cls = _own_class(kind)
    if cls is None:
        return
    settings = {key: value for key, value in backbone.items() if key not in ("type", "variant")}
    check_backbone(cls, backbone.get("variant"), settings)
    check_heads(model)
    if training:
        check_weights(backbone["variant"], backbone.get("init_cfg"))

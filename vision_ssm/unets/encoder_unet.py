"""A U-Net on any backbone of the registry.

Paper: the form is U-Net's, arXiv 1505.04597; the expanding layers are those of Swin-Unet, arXiv 2105.05537, and of
MSVM-UNet, arXiv 2408.13735. Source: written for this library.

The backbone's maps, normalised, are the skips, and its coarsest map is the bottleneck. Plain backbones, whose maps have
one stride, get a pyramid. Below the finest map levels without a skip go on to stride 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..backbones.base import Backbone, ScanBlock, resolve_scan
from ..backbones.family import build_variant, check_overrides, owner_of, register_family
from ..backbones.vmamba import VMamba
from ..layers import LargeKernelExpanding, PatchExpanding
from ..layers.pyramid import SCALES
from ..registry import BACKBONES, suggest
from .base import ConcatStage, UNet, falling_drop_path_rates
from .plain_unet import ConvPair

_FINEST_STRIDE = 4
_LEAST_WIDTH = 16
_PLAIN_WIDTH = 64  # from here on a level is at most half as wide as the one before, as maps of a plain backbone are not
_TAKEN = ("features_only", "num_classes", "in_chans")
_EXPANSIONS = {"patch": PatchExpanding, "large_kernel": LargeKernelExpanding}


def build_encoder(spec: str | Mapping[str, Any], in_chans: int) -> Backbone:
    """A backbone that returns maps.

    Args:
        spec: name of a variant, or ``dict(name=..., **overrides)`` as for `create_model`.
        in_chans: channels of the images.

    Raises:
        KeyError: unknown name. TypeError: unknown keyword, or one that the U-Net decides. Both with suggestions.
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else {}
    if isinstance(spec, Mapping):
        options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise TypeError(f"encoder is a backbone's name or dict(name=..., **overrides), got {spec!r}")
    cls = owner_of(name, BACKBONES)
    if cls is None:
        known = [variant for family in BACKBONES.module_dict.values() for variant in family.variants]
        raise KeyError(f"unknown encoder {name!r}.{suggest(name, known)} list_models() names all of them.")
    valid = [key for key in cls.keywords() if key not in _TAKEN]
    check_overrides(f"encoder {name}", options, valid)
    options.update(features_only=True, in_chans=in_chans)
    if "pyramid" in valid:
        with torch.device("meta"):
            maps = len(build_variant(cls, name, **options).out_indices)
        if options.setdefault("pyramid", True) and maps not in (1, len(SCALES)):
            options["out_indices"] = (-1,)
    return build_variant(cls, name, **options)


class EncoderUNet(UNet):
    """U-Net with a backbone of the registry as encoder.

    Args:
        encoder: name of the backbone, or ``dict(name=..., **overrides)``; ``pretrained`` weights go in by
            `load_encoder`.
        blocks: ``"scan"`` (`ScanBlock`) or ``"conv"`` (pairs of 3x3 convolutions with batch norm) in the decoder.
        scan: strategy of the decoder's scan blocks, or options that replace some of VMamba's (see `resolve_scan`); the
            encoder has its own ``scan``.
        decoder_depth: blocks per level.
        expand: ``"patch"`` (`PatchExpanding`) or ``"large_kernel"`` (`LargeKernelExpanding`).
        mlp_ratio: hidden width of the MLPs of scan blocks over the width of the block.
        drop_path_rate: stochastic depth of the decoder's first scan block; later ones fall from it linearly.
        **common: num_classes, in_chans, deep_supervision; see `UNet`.
    """

    family = "encoder_unet"
    default_scan: ClassVar[dict[str, Any]] = VMamba.default_scan
    """Strategy and options of the decoder's blocks, of which a dict without a type replaces some."""

    def __init__(
        self,
        *,
        encoder: str | Mapping[str, Any] = "vmamba_tiny_s1l8",
        blocks: str = "scan",
        scan: str | dict | Literal[False] | None = None,
        decoder_depth: int = 2,
        expand: str = "patch",
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        for keyword, value, choices in (("blocks", blocks, ("scan", "conv")), ("expand", expand, _EXPANSIONS)):
            if value not in choices:
                raise ValueError(f"unknown {keyword} {value!r}.{suggest(str(value), choices)}")
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth must be 1 or more, got {decoder_depth}")
        if blocks == "conv" and scan is not None:
            raise ValueError("scan says what scan blocks do; blocks='conv' has none")
        self.encoder = build_encoder(encoder, self.in_chans)
        spec = resolve_scan(scan, self.default_scan)
        enlarge = _EXPANSIONS[expand]
        *skips, bottleneck = [(info["num_chs"], info["reduction"]) for info in self.encoder.out_info]
        levels = list(self._levels(skips[::-1], *bottleneck))
        self.decoder = nn.ModuleList()
        width, stride = bottleneck
        for (dim, reduction, skip), rates in zip(
            levels, falling_drop_path_rates(drop_path_rate, [decoder_depth] * len(levels)), strict=True
        ):
            grown: nn.Module = nn.Identity() if stride == reduction else enlarge(width, dim, stride // reduction)
            joined = (width if stride == reduction else dim) + skip
            fuse = nn.Linear(joined, dim) if joined != dim else None
            if blocks == "conv":
                inner: list[nn.Module] = [ConvPair(dim, dim) for _ in rates]
            else:
                inner = [ScanBlock(dim, spec, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates]
            self.decoder.append(ConcatStage(inner, grown, fuse))
            width, stride = dim, reduction
        head_dim = max(width // stride, _LEAST_WIDTH)
        self.expand = enlarge(width, head_dim, stride)
        self.decoder.apply(Backbone._init_weights)
        self.expand.apply(Backbone._init_weights)
        self.finish([level[0] for level in levels], [level[1] for level in levels], head_dim)

    @staticmethod
    def _levels(skips: Sequence[tuple[int, int]], width: int, stride: int) -> list[tuple[int, int, int]]:
        """Width, stride and channels of the skip of every level, coarsest first, for skips of (channels, stride)."""
        levels = []
        for dim, reduction in skips:
            if stride % reduction:
                raise ValueError(f"strides of an encoder must divide one another, got {stride} and {reduction}")
            width = min(dim, max(width // 2, _PLAIN_WIDTH))
            stride = reduction
            levels.append((width, stride, dim))
        while stride > _FINEST_STRIDE and stride % 2 == 0:
            width, stride = max(width // 2, _LEAST_WIDTH), stride // 2
            levels.append((width, stride, 0))
        if not levels:
            raise ValueError(f"a U-Net needs maps of two strides or more, and the encoder has one, of stride {stride}")
        return levels

    @classmethod
    def encoder_of(cls, name: str, overrides: Mapping[str, Any]) -> str | None:
        encoder = {**cls.variants[name], **overrides}["encoder"]
        backbone: str = encoder["name"] if isinstance(encoder, Mapping) else encoder
        family = owner_of(backbone, BACKBONES)
        return backbone if family is not None and family.weights_of(backbone) else None

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        ours = any(key.startswith("encoder.stages.") for key in keys) and "decoder.0.fuse.weight" in keys
        return ours and not any(key.startswith("decoder.") and ".mlp.convs." in key for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(state_dict)


def unet(encoder: str | Mapping[str, Any], **overrides: Any) -> EncoderUNet:
    """A U-Net on a backbone: ``unet("vssd_tiny", num_classes=9)``.

    Args:
        encoder: name of a backbone, see `vision_ssm.list_models`, or ``dict(name=..., **overrides)``.
        **overrides: other keywords of `EncoderUNet`.

    Raises:
        KeyError: unknown encoder. TypeError: unknown keyword. Both say what is known.
    """
    check_overrides("a U-Net", overrides, EncoderUNet.keywords())
    return build_variant(EncoderUNet, "encoder_unet", encoder=encoder, **overrides)


VARIANTS: dict[str, dict[str, Any]] = {
    "encoder_unet": dict(num_classes=1, encoder="vmamba_tiny_s1l8", drop_path_rate=0.2),
    "encoder_unet_micro": dict(num_classes=1, encoder="vmamba_micro", decoder_depth=1),
}

EncoderUNet.variants = VARIANTS
EncoderUNet.published = {"encoder_unet": dict(encoder_weights="vmamba_tiny_s1l8")}
globals().update(register_family(EncoderUNet))

"""Spatial-Mamba: four-stage backbone that scans a map once and lets neighbouring cells share their states.

Paper: Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion, arXiv 2410.15091, ICLR 2025.
Source: github.com/EdwardChasel/Spatial-Mamba (Apache-2.0), commit 71221ebf, classification/models/spatialmamba.py.
Weights: see `PUBLISHED`.

New in this family: state fusion, here `StateFusionScan`. Dilated depthwise convolutions mix the states of a single
raster scan with those of their neighbours in two dimensions, in place of scans in further directions. Stem,
downsampling and block skeleton are those of VSSD.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..layers import InvertedDownsample, ResidualConvStem
from .base import Backbone, PositionConvBlock, Stage, drop_path_rates, register_family, resolve_scan, stage_widths
from .official import official_settings, rename, stage_key

_STEM_STRIDE = 4
_SCAN = dict(type="state_fusion", expand=2.0)


class SpatialMamba(Backbone):
    """Spatial-Mamba of any size.

    Args:
        depths: blocks per stage.
        dims: width of each stage, or of the first one (doubled from stage to stage).
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out.
        mlp_ratio: hidden width of the MLP of a block over its width.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "spatialmamba"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 8, 4),
        dims: int | Sequence[int] = 64,
        scan: str | dict | Literal[False] | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        dims = stage_widths(dims, depths)
        spec = resolve_scan(scan, _SCAN)
        self.stem = ResidualConvStem(self.in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [PositionConvBlock(dims[i], spec, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates]
            self.stages.append(Stage(blocks, InvertedDownsample(dims[i - 1], dims[i]) if i else None))
        self.finish(dims, [_STEM_STRIDE * 2**i for i in range(len(depths))])

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        if any(key.startswith("layers.") and ".self_attention.state_fusion." in key for key in keys):
            return True
        return {"stem.conv4.conv.weight", "stages.0.blocks.0.conv1.weight"} <= keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        renamed = {}
        for key, value in state_dict.items():
            key = rename(key, _OFFICIAL_KEYS)
            key = stage_key(key)
            of_route = re.search(r"\.core\.(x_proj_weight|dt_proj_weight|dt_proj_bias|A_log|D)$", key)
            renamed[key] = value.unsqueeze(0) if of_route else value  # parameters of the core are stored per route
        for key in [key for key in renamed if key.endswith(_FUSION_KERNELS[0])]:
            prefix = key.removesuffix(_FUSION_KERNELS[0])
            kernels = [renamed.pop(prefix + name).squeeze(1) for name in _FUSION_KERNELS]  # each (D, 3, 3)
            renamed[f"{prefix}kernels"] = torch.stack(kernels)
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("Spatial-Mamba", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT, _CONSTANTS)
        if given["d_state"] != 1:
            raise ValueError(f"d_state={given['d_state']} never worked in the original: it fuses one state per channel")
        if given["patch_size"] != _STEM_STRIDE:
            raise ValueError(f"the stem's stride is always {_STEM_STRIDE}, got patch_size={given['patch_size']}")
        head = any(key.startswith("head.") for key in keys)
        return dict(
            depths=list(given["depths"]),
            dims=given["dims"] if isinstance(given["dims"], int) else list(given["dims"]),
            mlp_ratio=given["mlp_ratio"],
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_indices=None if head else tuple(given["out_indices"]),
            out_norm=any(key.startswith("outnorm") for key in keys),
        )


_OFFICIAL_KEYS = (
    (r"^patch_embed\.conv3\.0\.", "stem.conv3."),
    (r"^patch_embed\.conv3\.1\.", "stem.conv4."),
    (r"^patch_embed\.", "stem."),
    (r"^(stem\..*)\.norm\.", r"\1.bn."),
    (r"\.downsample\.conv\.0\.conv\.", ".downsample.expand."),
    (r"\.downsample\.conv\.1\.conv\.", ".downsample.depthwise."),
    (r"\.downsample\.conv\.2\.conv\.", ".downsample.project."),
    (r"\.downsample\.conv\.2\.norm\.", ".downsample.norm."),
    (r"\.cpe([12])\.", r".conv\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.conv2d\.", ".mixer.conv."),
    (r"\.self_attention\.(x_proj_weight)$", r".mixer.core.\1"),
    (r"\.self_attention\.dt_projs_(weight|bias)$", r".mixer.core.dt_proj_\1"),
    (r"\.self_attention\.A_logs$", ".mixer.core.A_log"),
    (r"\.self_attention\.Ds$", ".mixer.core.D"),
    (r"\.self_attention\.state_fusion\.", ".mixer.core."),
    (r"\.self_attention\.", ".mixer."),
    (r"^outnorm(\d+)\.", r"out_norms.\1."),
)
_FUSION_KERNELS = ("kernel_3", "kernel_3_1", "kernel_3_2")  # of dilation 1, 3 and 5

_WITHOUT_EFFECT = {"dt_init", "drop_rate", "use_checkpoint", "pretrained"}  # on what the weights compute
_CONSTANTS = dict(expand=2, d_conv=3, dt_rank="auto")
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    depths=[2, 4, 8, 4],
    dims=64,
    d_state=1,
    mlp_ratio=4.0,
    drop_path_rate=0.2,
    out_indices=(0, 1, 2, 3),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "spatialmamba_tiny": dict(depths=(2, 4, 8, 4), dims=64, scan=_SCAN, drop_path_rate=0.2),
    "spatialmamba_small": dict(depths=(2, 4, 21, 5), dims=64, scan=_SCAN, drop_path_rate=0.3),
    "spatialmamba_base": dict(depths=(2, 4, 21, 5), dims=96, scan=_SCAN, drop_path_rate=0.5),
    "spatialmamba_micro": dict(depths=(1, 1, 2, 1), dims=16, scan=_SCAN),
}


def _published(drive: str, top1: float) -> dict[str, Any]:
    url = f"https://drive.google.com/file/d/{drive}/view"
    return dict(url=url, top1_reported=top1, license="apache-2.0", paper="arXiv:2410.15091")


PUBLISHED: dict[str, dict[str, Any]] = {
    "spatialmamba_tiny": _published("19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW", 83.5),
    "spatialmamba_small": _published("1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O", 84.6),
    "spatialmamba_base": _published("1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM", 85.3),
}

SpatialMamba.variants = VARIANTS
SpatialMamba.published = PUBLISHED
globals().update(register_family(SpatialMamba))

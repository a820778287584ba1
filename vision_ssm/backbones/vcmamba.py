"""VCMamba: convolutional network whose last blocks scan the map along four continuous routes.

Paper: VCMamba: Bridging Convolutions with Multi-Directional Mamba for Efficient Visual Representation, arXiv
2509.04669 (ICCV 2025, workshop ECLR).
Source: github.com/Wertyuui345/VCMamba, commit f8795a0, model/mambacnn.py, model/plain_mamba_layer.py and, for the dense
backbone, segmentation/MambaCNNBackbone.py. Weights: see `PUBLISHED`; the licence is that of the repository.

New in this family: token mixing by depthwise convolutions inside the MLPs of all blocks, and PlainMamba's scan in the
last blocks of the last stage alone, in the form of `ContinuousScan` without gate, with batch-normalised 1x1
convolutions, a norm and ReLU. Batch norms everywhere else but in front of the two classifiers, one of which learns from
a teacher.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ConvNormAct, DropPath, lecun_normal_
from torch import nn

from ..layers import (
    ChannelLastBatchNorm,
    ConvDownsample,
    DepthwiseConv2d,
    DistilledHead,
    PositionTable,
    channels_last,
    get_activation,
    get_norm,
)
from ..scans.sequence import TokenLayout
from .base import Backbone, Branch, ScanBlock, Stage, add_branch, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename
from .plainmamba import OFFICIAL_MIXER_KEYS

_STRIDES = (4, 8, 16, 32)
_SCAN = dict(
    type="continuous",
    gate=False,
    projection="conv_norm",
    out_norm="layer",
    out_act="relu",
    init="trunc_normal",
)


class StridedConvStem(nn.Sequential):
    """Two 3x3 convolutions of stride 2, each with batch norm and an activation, ``"relu"`` or ``"gelu"``."""

    def __init__(self, in_chans: int, dim: int, act: str):
        options: dict[str, Any] = dict(stride=2, bias=True, act_layer=type(get_activation(act)))
        blocks = [ConvNormAct(in_chans, dim // 2, 3, **options), ConvNormAct(dim // 2, dim, 3, **options)]
        super().__init__(*blocks)
        for block in blocks:
            lecun_normal_(block.conv.weight)
            nn.init.zeros_(block.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 4), ceil(W / 4), dim)."""
        x = super().forward(channels_last(x))
        return x.permute(0, 2, 3, 1).contiguous()  # (B, H/4, W/4, dim)


class ConvNormMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution between its layers; batch norm behind all three, GELU behind two.

    Parameters: ``fc1``, ``norm1``, ``conv``, ``conv_norm``, ``fc2``, ``norm2``.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.norm1 = ChannelLastBatchNorm(hidden_dim)
        self.conv = DepthwiseConv2d(hidden_dim, 3)
        self.conv_norm = ChannelLastBatchNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.norm2 = ChannelLastBatchNorm(dim)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        x = self.act(self.norm1(self.fc1(x)))
        x = self.act(self.conv_norm(self.conv(x)))
        return self.norm2(self.fc2(x))


class ConvNormMlpBlock(nn.Module):
    """Residual `ConvNormMlp`, scaled per channel if `layer_scale` gives an initial scale."""

    def __init__(self, dim: int, mlp_ratio: float, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.mlp = ConvNormMlp(dim, int(dim * mlp_ratio))
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        x = add_branch(x, branch)
        values = self.mlp(x)
        return x, (values if self.layer_scale is None else values * self.layer_scale, self.drop_path)


class ConvMlpScanBlock(ScanBlock):
    """`ScanBlock` with batch norms and a `ConvNormMlp`; the first of them adds a position table to what it is given."""

    def __init__(
        self, dim: int, scan: dict | Literal[False], mlp_ratio: float, drop_path: float, grid_size: int | None
    ):
        super().__init__(dim, scan, norm="batch", mlp_ratio=0.0, drop_path=drop_path)
        self.pos_embed = None if grid_size is None else PositionTable(dim, grid_size, grid_size)
        self.norm2 = get_norm("batch", dim)
        self.mlp = ConvNormMlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        if self.pos_embed is not None:
            x, branch = self.pos_embed(add_branch(x, branch)), None
        return super().forward(x, branch)


class VCMamba(Backbone):
    """VCMamba of any size and switch.

    Args:
        depths: blocks of each of the four stages.
        dims: widths of the stages.
        scan_blocks: how many of the last blocks of the last stage have a scan.
        scan: strategy of these blocks, or options that replace some of VCMamba's own (see `resolve_scan`); False
            leaves the mixers out.
        mlp_ratio: hidden width of the MLPs over the width of the stage.
        layer_scale: initial scale of the branches of blocks without a scan; None: no scale.
        stem_act: ``"relu"``, or ``"gelu"`` as in the original's segmentation backbone.
        pos_embed: add a learned position table in front of the first block with a scan.
        img_size: image size that sizes this table.
        distilled: two classifiers, see `DistilledHead`.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "vcmamba"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (4, 4, 12, 8),
        dims: Sequence[int] = (32, 64, 144, 288),
        scan_blocks: int = 4,
        scan: str | dict | Literal[False] | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        stem_act: str = "relu",
        pos_embed: bool = True,
        img_size: int = 224,
        distilled: bool = True,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if not len(dims) == len(depths) == len(_STRIDES):
            raise ValueError(f"dims and depths must have one entry per stage, got {tuple(dims)} and {tuple(depths)}")
        self.distilled = distilled
        spec = resolve_scan(scan, _SCAN)
        first = sum(depths) - min(scan_blocks, depths[-1])  # block with a scan, counted over all stages
        self.stem = StridedConvStem(self.in_chans, dims[0], stem_act)
        self.stages = nn.ModuleList()
        number = 0
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks: list[nn.Module] = []
            for rate in rates:
                if number < first:
                    blocks.append(ConvNormMlpBlock(dims[i], mlp_ratio, layer_scale, rate))
                else:
                    grid_size = img_size // _STRIDES[-1] if pos_embed and number == first else None
                    blocks.append(ConvMlpScanBlock(dims[i], spec, mlp_ratio, rate, grid_size))
                number += 1
            self.stages.append(Stage(blocks, ConvDownsample(dims[i - 1], dims[i], 3, "batch") if i else None))
        self.finish(dims, _STRIDES)

    @property
    def classifier_key(self) -> str:  # type: ignore[override]
        return "head.label.weight" if self.distilled else "head.weight"

    def build_head(self, num_classes: int) -> nn.Module:
        return DistilledHead(self.num_features, num_classes) if self.distilled else super().build_head(num_classes)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return "network.0.0.mlp.mid_norm.weight" in keys or "stages.0.blocks.0.mlp.conv_norm.weight" in keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        scanning = [int(match[1]) for key in state_dict if (match := re.match(r"network\.6\.(\d+)\.mamba\.", key))]
        patterns = (
            *_OFFICIAL_KEYS,
            *OFFICIAL_MIXER_KEYS,
            (r"^pos_embed$", f"stages.3.blocks.{min(scanning, default=0)}.pos_embed.table"),
            (r"^head\.", "head.label." if "dist_head.weight" in state_dict else "head."),
            (r"^dist_head\.", "head.teacher."),
        )
        renamed = {}
        for key, value in state_dict.items():
            key = re.sub(r"^network\.(\d+)\.", lambda match: _STAGE_PREFIXES[int(match[1])], key)
            key = rename(key, patterns)
            if key.endswith((".fc1.weight", ".fc2.weight")):
                value = value.flatten(1)  # 1x1 convolutions
            renamed[key] = value.flatten() if key.endswith(".layer_scale") else value
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("VCMamba", config, _OFFICIAL_DEFAULTS)
        for name, only in _OFFICIAL_CONSTANTS.items():
            value = tuple(given[name]) if isinstance(given[name], list) else given[name]
            if value != only:
                raise ValueError(f"{name} of an original VCMamba is {only}, got {value}")
        head = "head.weight" in keys
        if given["fork_feat"] and head:
            raise ValueError("fork_feat=True belongs to the original's segmentation backbone, which has no classifier")
        dense = given["fork_feat"] or "norm.weight" not in keys
        return dict(
            depths=tuple(given["layers"]),
            dims=tuple(given["embed_dims"]),
            scan_blocks=given["vit_num"],
            mlp_ratio=given["mlp_ratios"],
            layer_scale=given["layer_scale_init_value"] if given["use_layer_scale"] else None,
            stem_act="gelu" if dense else "relu",
            pos_embed=given["if_abs_pos_embed"],
            img_size=given["resolution"],
            distilled="dist_head.weight" in keys,
            drop_path_rate=given["drop_path_rate"],
            num_classes=given["num_classes"] if head else 0,
            features_only=dense,
            out_norm=False,
        )


# names of the original's flat list: stages and the convolutions between them
_STAGE_PREFIXES = [
    f"stages.{(i + 1) // 2}.downsample." if i % 2 else f"stages.{i // 2}.blocks." for i in range(2 * len(_STRIDES) - 1)
]
_OFFICIAL_KEYS = (
    (r"^patch_embed\.0\.", "stem.0.conv."),
    (r"^patch_embed\.1\.", "stem.0.bn."),
    (r"^patch_embed\.3\.", "stem.1.conv."),
    (r"^patch_embed\.4\.", "stem.1.bn."),
    (r"\.downsample\.proj\.", ".downsample.conv."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.layer_scale_2$", ".layer_scale"),
    (r"\.mlp\.mid\.", ".mlp.conv."),
    (r"\.mlp\.mid_norm\.", ".mlp.conv_norm."),
    (r"\.mamba\.", ".mixer."),
    (r"\.mixer\.norm\.", ".mixer.out_norm."),
    (r"\.mixer\.in_conv\.", ".mixer.in_proj."),
    (r"\.mixer\.out_conv\.1\.", ".mixer.out_proj.0."),
    (r"\.mixer\.out_conv\.2\.", ".mixer.out_proj.1."),
)
# what the original takes but was built for one value of
_OFFICIAL_CONSTANTS: dict[str, Any] = dict(
    downsamples=(True, True, True, True), down_patch_size=3, down_stride=2, down_pad=1
)
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    _OFFICIAL_CONSTANTS,
    layers=(4, 4, 12, 8),
    embed_dims=(32, 64, 144, 288),
    mlp_ratios=4,
    vit_num=4,
    resolution=224,
    if_abs_pos_embed=True,
    num_classes=1000,
    distillation=True,
    use_layer_scale=True,
    layer_scale_init_value=1e-5,
    drop_path_rate=0.0,
    fork_feat=False,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vcmamba_s": dict(dims=(32, 64, 144, 288), depths=(4, 4, 12, 8), drop_path_rate=0.2),
    "vcmamba_m": dict(dims=(48, 96, 224, 448), depths=(4, 4, 12, 6), drop_path_rate=0.2),
    "vcmamba_b": dict(dims=(64, 128, 320, 512), depths=(4, 4, 12, 6), drop_path_rate=0.2),
    "vcmamba_micro": dict(dims=(16, 16, 32, 48), depths=(1, 1, 1, 3), scan_blocks=2, img_size=64),
}


def _published(file: str, top1: float) -> dict[str, Any]:
    url = f"https://huggingface.co/SLDGroup/VCMamba/resolve/main/{file}"
    return dict(url=url, file=file, top1_reported=top1, paper="arXiv:2509.04669")


PUBLISHED: dict[str, dict[str, Any]] = {
    "vcmamba_s": _published("VCMamba-S.pth", 78.7),
    "vcmamba_m": _published("VCMamba-M.pth", 81.5),
    "vcmamba_b": _published("VCMamba-B.pth", 82.6),
}

VCMamba.variants = VARIANTS
VCMamba.published = PUBLISHED
globals().update(register_family(VCMamba))

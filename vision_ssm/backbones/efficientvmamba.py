"""EfficientVMamba: light four-stage backbone, atrous scans beside convolutions first, inverted residuals afterwards.

Paper: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv 2403.09977 (AAAI 2025).
Source: github.com/TerryPei/EfficientVMamba, commit 0bc5ee28, classification/models/vmamba_efficient.py. Weights: see
`PUBLISHED`.

New in this family: the atrous scan (ES2D), here `AtrousScan`; the block of the first two stages (`DualBranchBlock`, the
paper's EVSS), where the scan and a convolution branch read the same map and pass the same channel gate; and inverted
residuals in place of scans where the map is small.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.layers import ConvNormAct, DropPath, SqueezeExcite
from torch import nn

from ..layers import (
    ChannelGate,
    ChannelLastBatchNorm,
    ChannelLastConv2d,
    ConvDownsample,
    DepthwiseConv2d,
    PatchMerging,
    PatchStem,
    add_norm,
    get_norm,
)
from ..registry import suggest
from ..scans.sequence import TokenLayout
from .base import Backbone, Branch, ScanBlock, Stage, drop_path_rates, register_family, resolve_scan, stage_widths
from .official import official_settings, rename, stage_key
from .vmamba import convert_mixers

_SCAN = dict(type="atrous", expand=2.0, state_dim=16)
_SCAN_STAGES = 2


class DualBranchBlock(ScanBlock):
    """`ScanBlock` with a convolution branch beside its mixer.

    Both branches read the normalised map, pass one channel gate, each on its own, and are added to the stream.
    """

    def __init__(self, dim: int, scan: dict | Literal[False], **options: Any):
        super().__init__(dim, scan, **options)
        if self.mixer is None:
            self.norm1 = get_norm("layer", dim)
        self.conv_branch = nn.Sequential(
            DepthwiseConv2d(dim, 3), ChannelLastBatchNorm(dim), nn.GELU(), ChannelLastConv2d(dim, dim, 1)
        )
        self.channel_gate = ChannelGate(dim)

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        x, normed = add_norm(self.norm1, x, *(branch or ()))
        y = self.channel_gate(self.conv_branch(normed).flatten(1, 2))  # (B, H*W, dim)
        if self.mixer is not None:
            y = y + self.channel_gate(self.mixer(normed).flatten(1, 2))
        branch = y.view(x.shape), self.drop_path
        if self.mlp is not None:
            x, normed = add_norm(self.norm2, x, *branch)
            branch = self.mlp(normed), self.drop_path
        return x, branch


class InvertedResidual(nn.Module):
    """MobileNet's block: widen by 4, depthwise 3x3, squeeze and excitation, project; batch norms and ReLU."""

    def __init__(self, dim: int, drop_path: float = 0.0):
        super().__init__()
        wide = 4 * dim
        self.expand = ConvNormAct(dim, wide, 1)
        self.depthwise = ConvNormAct(wide, wide, 3, groups=wide)
        self.channel_gate = SqueezeExcite(wide, rd_channels=max(1, wide // 8))
        self.project = ConvNormAct(wide, dim, 1, apply_act=False)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, branch: Branch | None = None) -> tuple[torch.Tensor, Branch]:
        """As `ScanBlock.forward`, on maps alone."""
        if branch is not None:
            x = x + branch[1](branch[0])
        h = self.channel_gate(self.depthwise(self.expand(x.permute(0, 3, 1, 2))))
        return x, (self.project(h).permute(0, 2, 3, 1), self.drop_path)  # (B, H, W, dim)


class EfficientVMamba(Backbone):
    """EfficientVMamba of any size and switch.

    Args:
        depths: blocks per stage; those of the first two stages scan, the others are inverted residuals.
        dims: width of each stage, or of the first one (doubled from stage to stage).
        scan: strategy of the first two stages, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the convolution branch alone.
        downsample: ``"merge"`` (patch merging) or ``"conv2"`` (a strided 2x2 convolution).
        stem_norm: whether the stem has a norm.
        mlp_ratio: hidden width of an MLP behind the two branches, over the width; 0 leaves it out.
        remainder: ``"pad"`` keeps every pixel of sizes that a patch or a stride does not divide, ``"drop"`` cuts the
            rest off as the original does.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "efficientvmamba"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 48,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = 4,
        downsample: str = "merge",
        stem_norm: bool = True,
        mlp_ratio: float = 0.0,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        dims = stage_widths(dims, depths)
        downsamples: dict[str, Callable[[int, int], nn.Module]] = {
            "merge": PatchMerging,
            "conv2": lambda dim, out_dim: ConvDownsample(dim, out_dim, 2, remainder=remainder),
        }
        if downsample not in downsamples:
            raise ValueError(f"unknown downsample {downsample!r}.{suggest(str(downsample), downsamples)}")
        spec = resolve_scan(scan, _SCAN)
        self.stem = PatchStem(self.in_chans, dims[0], patch_size, "layer" if stem_norm else "none", remainder)
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [
                DualBranchBlock(dims[i], spec, mlp_ratio=mlp_ratio, drop_path=rate)
                if i < _SCAN_STAGES
                else InvertedResidual(dims[i], rate)
                for rate in rates
            ]
            self.stages.append(Stage(blocks, downsamples[downsample](dims[i - 1], dims[i]) if i else None))
        self.finish(dims, [patch_size * 2**i for i in range(len(depths))])

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(re.match(r"(layers|stages)\.0\.blocks\.\d+\.conv_branch\.", key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        mixers: dict[str, torch.Tensor] = {}
        others: dict[str, torch.Tensor] = {}
        for key, value in state_dict.items():
            if late := re.match(r"layers\.(\d+)\.(\d+)\.(.+)", key):  # flat: permute, blocks, permute, downsampling
                stage, place, rest = late.groups()
                part = f"blocks.{int(place) - 1}" if rest.startswith(("conv_", "se.")) else "downsample"
                key = f"layers.{stage}.{part}.{rest}"
            key = rename(key, _OFFICIAL_KEYS)
            (mixers if ".mixer." in key else others)[stage_key(key)] = value
        return {**others, **convert_mixers(mixers)}

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("EfficientVMamba", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        downsamples = {"v1": "merge", "v2": "conv2"}
        if given["downsample_version"] not in downsamples:
            raise ValueError(
                f"unknown downsample_version {given['downsample_version']!r} of an original EfficientVMamba."
                f"{suggest(str(given['downsample_version']), downsamples)}"
            )
        if given["step_size"] != 2:
            raise ValueError(
                f"step_size {given['step_size']} never worked in the original, which leaves cells unwritten; it is 2"
            )
        head = any(key.startswith("classifier.") for key in keys)
        return dict(
            depths=list(given["depths"]),
            dims=given["dims"] if isinstance(given["dims"], int) else list(given["dims"]),
            patch_size=given["patch_size"],
            downsample=downsamples[given["downsample_version"]],
            stem_norm=given["patch_norm"],
            mlp_ratio=given["mlp_ratio"],
            remainder="drop",
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_indices=None if head else tuple(given["out_indices"]),
            out_norm=any(key.startswith("outnorm") for key in keys),
            scan=dict(_SCAN, expand=given["ssm_ratio"]),
        )


_OFFICIAL_KEYS = (
    (r"^patch_embed\.0\.", "stem.conv."),
    (r"^patch_embed\.2\.", "stem.norm."),
    (r"^classifier\.(norm|head)\.", r"\1."),
    (r"^outnorm(\d+)\.", r"out_norms.\1."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"(\.blocks\.\d+)\.se\.norm\.", r"\1.channel_gate.norm."),
    (r"(\.blocks\.\d+)\.se\.global_reduce\.", r"\1.channel_gate.reduce."),
    (r"(\.blocks\.\d+)\.se\.channel_select\.", r"\1.channel_gate.expand."),
    (r"(\.blocks\.\d+)\.se\.conv_reduce\.", r"\1.channel_gate.fc1."),
    (r"(\.blocks\.\d+)\.se\.conv_expand\.", r"\1.channel_gate.fc2."),
    (r"\.conv_pw\.", ".expand."),
    (r"\.conv_dw\.", ".depthwise."),
    (r"\.conv_pw2\.", ".project."),
    (r"\.(expand|depthwise|project)\.0\.", r".\1.conv."),
    (r"\.(expand|depthwise|project)\.1\.", r".\1.bn."),
)
# of the original's hyperparameters, on what the weights compute: its blocks always have 16 states and rank ceil(C / 16)
_WITHOUT_EFFECT = {
    *("d_state", "dt_rank", "window_size", "drop_rate", "attn_drop_rate", "shared_ssm", "softmax_version"),
    *("ssm_rank_ratio", "use_checkpoint", "pretrained"),
}
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    depths=[2, 2, 9, 2],
    dims=[96, 192, 384, 768],
    ssm_ratio=2.0,
    mlp_ratio=0.0,
    drop_path_rate=0.1,
    patch_norm=True,
    downsample_version="v1",
    step_size=2,
    out_indices=(0, 1, 2, 3),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvmamba_tiny": dict(depths=(2, 2, 4, 2), dims=48, scan=_SCAN, drop_path_rate=0.1),
    "efficientvmamba_small": dict(depths=(2, 2, 4, 2), dims=64, scan=_SCAN, drop_path_rate=0.1),
    "efficientvmamba_base": dict(depths=(2, 2, 9, 2), dims=96, scan=_SCAN, drop_path_rate=0.1),
    "efficientvmamba_micro": dict(depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), scan=dict(_SCAN, state_dim=2)),
}


def _published(size: str, top1: float) -> dict[str, Any]:
    return dict(
        url=f"https://huggingface.co/TerryPei/EfficientVMamba-{size.capitalize()}",
        file=f"efficient_vmamba_{size}.ckpt",
        top1_reported=top1,
        ema=True,
        paper="arXiv:2403.09977",
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "efficientvmamba_tiny": _published("tiny", 76.5),
    "efficientvmamba_small": _published("small", 78.7),
    "efficientvmamba_base": _published("base", 81.8),
}

EfficientVMamba.variants = VARIANTS
EfficientVMamba.published = PUBLISHED
globals().update(register_family(EfficientVMamba))

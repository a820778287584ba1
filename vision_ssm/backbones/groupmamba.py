"""GroupMamba: every quarter of the channels is scanned in one direction; a class block and two heads at the end.

Paper: GroupMamba: Efficient Group-Based Visual State Space Model, arXiv 2407.13772 (CVPR 2025).
Source: github.com/Amshaker/GroupMamba, commit c1800ed2, classification/models/groupmamba.py. Weights: see `PUBLISHED`.

New in this family: the modulated group layer, here `ChannelGroupsScan`, which normalises by itself, so that blocks have
no norm in front of it; a convolution inside the MLP; norms behind the first stages, which feed the next stage; and a
last block that sees the mean of all cells alone. The published models learn from a teacher with a head of its own.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..layers import ConvDownsample, ConvMlp, DeepConvStem, DistilledHead, build_mlp, get_norm
from ..scans import build_scan
from .base import Backbone, ScanBlock, Stage, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename

_GROUPS = 4
_SCAN = dict(type="channel_groups")
_NORMALISING_SCANS = ("channel_groups", "ChannelGroupsScan")


class GroupBlock(ScanBlock):
    """`ScanBlock` with a convolution in its MLP, and no norm in front of a mixer that has its own."""

    def __init__(
        self, dim: int, scan: dict | Literal[False], *, mlp_ratio: float, norm_eps: float, drop_path: float = 0.0
    ):
        own_norm = scan is not False and scan["type"] in _NORMALISING_SCANS
        options: dict[str, Any] = dict(norm="none" if own_norm else "layer", norm_eps=norm_eps, drop_path=drop_path)
        super().__init__(dim, scan, mlp_ratio=0.0, **options)
        self.norm2 = get_norm("layer", dim, norm_eps)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), residual=False)


class NormedStage(Stage):
    """A stage whose output is normalised, for the next stage as well."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, norm: nn.Module):
        super().__init__(blocks, downsample)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class ClassBlock(nn.Module):
    """A mixer with a norm behind it, then an MLP with a norm in front, both on the mean of all cells."""

    def __init__(self, dim: int, scan: dict | Literal[False], *, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.mixer = None
        if scan is not False:
            self.mixer = build_scan(scan, dim)
            self.norm1 = get_norm("layer", dim, norm_eps)
        self.norm2 = get_norm("layer", dim, norm_eps)
        self.mlp = build_mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, dim). Returns the same shape."""
        if self.mixer is not None:
            x = x + self.norm1(self.mixer(x[:, None, None])[:, 0, 0])  # a map of 1 x 1 cells inside
        return x + self.mlp(self.norm2(x))


class GroupMamba(Backbone):
    """GroupMamba of any size.

    Maps of the first stages are normalised by the stages themselves, in a classifier as well; the last map is raw and
    has an output norm in a `features_only` model, which takes the weights of a classifier's last norm.

    Args:
        depths: blocks per stage.
        dims: width of each stage, multiples of the number of groups.
        stem_dim: width of the stem's convolutions.
        mlp_ratios: hidden width of the MLPs over the width, per stage; the last one holds for the class block too.
        scan: strategy of the blocks and of the class block, or options that replace some of the variant's own (see
            `resolve_scan`); False leaves the mixers out.
        distilled: have a second classifier that learns from a teacher (see `DistilledHead`).
        norm_eps: epsilon of the norms outside of mixers, stem and downsampling.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "groupmamba"
    classifier_key = "head.label.weight"
    classifier_parts = (*Backbone.classifier_parts, "class_block.")

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 9, 3),
        dims: Sequence[int] = (64, 128, 348, 448),
        stem_dim: int = 32,
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        scan: str | dict | Literal[False] | None = None,
        distilled: bool = True,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise ValueError(
                "dims, depths and mlp_ratios must have one entry per stage, got "
                f"{tuple(dims)}, {tuple(depths)} and {tuple(mlp_ratios)}"
            )
        spec = resolve_scan(scan, _SCAN)
        self.distilled = distilled
        if not distilled:
            self.classifier_key = "head.weight"
        self.stem = DeepConvStem(self.in_chans, stem_dim, dims[0])
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            options = dict(mlp_ratio=mlp_ratios[i], norm_eps=norm_eps)
            blocks = [GroupBlock(dims[i], spec, drop_path=rate, **options) for rate in rates]
            downsample = ConvDownsample(dims[i - 1], dims[i]) if i else None
            if i < len(depths) - 1:
                self.stages.append(NormedStage(blocks, downsample, get_norm("layer", dims[i], norm_eps)))
            else:
                self.stages.append(Stage(blocks, downsample))
        self.class_block = None
        if not self.features_only:
            self.class_block = ClassBlock(dims[-1], spec, mlp_ratio=mlp_ratios[-1], norm_eps=norm_eps)
        self.finish(dims, [4 * 2**i for i in range(len(depths))], "layer", norm_eps)
        for i in set(self.out_norms) - {str(len(depths) - 1)}:
            del self.out_norms[i]  # these stages have norms of their own

    def build_head(self, num_classes: int) -> nn.Module:
        return DistilledHead(self.num_features, num_classes) if self.distilled else super().build_head(num_classes)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        Backbone._init_weights(module)
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def trace(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs = self.forward_stages(x)
        return outputs[-1].permute(0, 3, 1, 2), outputs  # the norm comes behind the class block

    def end_norm(self, index: int) -> nn.Module:
        return nn.Identity()

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """features: (B, C, H', W') of `forward_features`. Returns the normalised output of the class block, (B, C)."""
        pooled = super().pool(features)
        return pooled if self.class_block is None else self.norm(self.class_block(pooled))

    def prune_intermediate_layers(self, *args: Any, **options: Any) -> list[int]:
        left = super().prune_intermediate_layers(*args, **options)
        if self.global_pool == "":
            self.class_block = None  # part of the pooling
        return left

    def group_matcher(self, coarse: bool = False) -> dict:
        matcher = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"] += [(r"^stages\.(\d+)\.norm\b", (99999,)), (r"^class_block\b", (99998,))]
        return matcher

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        ours = {"stem.convs.0.conv.weight", "stages.0.norm.weight"}
        return ours <= keys or any(".attn.mamba_g1." in key for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        distilled = any(key.startswith("dist_head.") for key in state_dict)
        renamed: dict[str, torch.Tensor] = {}
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for official, value in state_dict.items():
            key = official
            key = rename(key, _OFFICIAL_KEYS + (_DISTILLED_KEYS if distilled else ()))
            key = re.sub(r"^stages\.(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
            member = re.fullmatch(r"(.+\.mixer)\.mamba_g\d\.(.+)", key)
            if member and member[2] in _GROUP_KEYS:
                groups.setdefault(f"{member[1]}.{_GROUP_KEYS[member[2]]}", {})[key] = value
            else:
                renamed[key] = value
        for key, members in groups.items():
            if len(members) == _GROUPS:
                values = [members[name] for name in sorted(members)]
                renamed[key] = torch.cat(values) if key.endswith(_JOINED) else torch.stack(values)
            else:
                renamed.update(members)
        return renamed

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keys = self.official_keys(state_dict)
        last = str(len(self.stage_info) - 1)
        if last not in self.out_norms:
            return keys
        return {re.sub(r"^norm\.", f"out_norms.{last}.", key): value for key, value in keys.items()}

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("GroupMamba", config, _OFFICIAL_DEFAULTS, {*_OFFICIAL_REQUIRED, *_WITHOUT_EFFECT})
        missing = sorted(set(_OFFICIAL_REQUIRED) - set(config))
        if missing:
            raise ValueError(f"an original GroupMamba is described by {', '.join(missing)} as well")
        head = any(key.startswith("head.") for key in keys)
        return dict(
            depths=list(given["depths"]),
            dims=list(given["embed_dims"]),
            stem_dim=given["stem_hidden_dim"],
            mlp_ratios=list(given["mlp_ratios"]),
            distilled=given["distillation"],
            norm_eps=given["norm_eps"],
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if head else 0,
        )


_OFFICIAL_KEYS = (
    (r"^patch_embed1\.conv\.([036])\.", lambda match: f"stem.convs.{int(match[1]) // 3}.conv."),
    (r"^patch_embed1\.conv\.([147])\.", lambda match: f"stem.convs.{int(match[1]) // 3}.bn."),
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embed(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"^norm([123])\.", r"stages.\1.norm."),
    (r"^norm4\.", "norm."),
    (r"^post_network\.0\.", "class_block."),
    (r"\.attn\.fc1\.", ".mixer.affinity.reduce."),
    (r"\.attn\.fc2\.", ".mixer.affinity.expand."),
    (r"\.attn\.", ".mixer."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
)
_DISTILLED_KEYS = ((r"^head\.", "head.label."), (r"^dist_head\.", "head.teacher."))
_GROUP_KEYS = {
    "in_proj.weight": "in_proj_weight",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "core.x_proj_weight",
    "dt_projs_weight": "core.dt_proj_weight",
    "dt_projs_bias": "core.dt_proj_bias",
    "A_logs": "core.A_log",
    "Ds": "core.D",
    "out_norm.weight": "out_norm_weight",
    "out_norm.bias": "out_norm_bias",
    "out_proj.weight": "out_proj_weight",
}
"""Parameter of one group to the parameter of all groups, (4, ...)."""
_JOINED = ("conv.weight", "conv.bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias")  # have an axis to join along

_OFFICIAL_REQUIRED = ("depths", "embed_dims", "stem_hidden_dim")
_WITHOUT_EFFECT = ("drop_rate",)
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    in_chans=3, num_classes=1000, mlp_ratios=[8, 8, 4, 4], norm_eps=1e-6, drop_path_rate=0.05, distillation=True
)

VARIANTS: dict[str, dict[str, Any]] = {
    "groupmamba_tiny": dict(depths=(3, 4, 9, 3), dims=(64, 128, 348, 448), stem_dim=32, drop_path_rate=0.05),
    "groupmamba_small": dict(depths=(3, 4, 16, 3), dims=(64, 128, 348, 512), stem_dim=64, drop_path_rate=0.05),
    "groupmamba_base": dict(depths=(3, 6, 21, 3), dims=(96, 192, 424, 512), stem_dim=64, drop_path_rate=0.05),
    "groupmamba_micro": dict(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), stem_dim=8, scan={**_SCAN, "reduction": 4}),
}


def _published(size: str, top1: float) -> dict[str, Any]:
    url = f"https://huggingface.co/Abdelrahman-shaker/GroupMamba-{size}"
    return dict(url=url, top1_reported=top1, paper="arXiv:2407.13772")


PUBLISHED: dict[str, dict[str, Any]] = {
    "groupmamba_tiny": _published("Tiny", 83.3),
    "groupmamba_small": _published("Small", 83.9),
    "groupmamba_base": _published("Base", 84.5),
}

GroupMamba.variants = VARIANTS
GroupMamba.published = PUBLISHED
globals().update(register_family(GroupMamba))

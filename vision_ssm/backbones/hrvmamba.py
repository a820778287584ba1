"""HRVMamba: branches of several resolutions side by side, which exchange what they have seen, as in HRNet.

Paper: HRVMamba: Efficient High-Resolution Visual Representation Learning with State Space Model for Human Pose
Estimation, arXiv 2410.03174.
Source: github.com/zhanghao5201/HRVMamba, commit 7222bc4f, classification/models/hrvmamba.py and hrvmamba_se_lpu.py,
pose_estimation/mmpose/models/backbones/hrvmamba.py, semantic_segmentation/tools/hrvmamba.py. Weights: see `PUBLISHED`.

New in this family: the four maps are not the ends of four stages but of one, whose branches run at all resolutions;
its blocks (`DynamicScanBlock`, the paper's DVSS) convolve groups of channels with kernels of four sizes and then scan
along four routes, behind a deformable convolution (`MultiDirectionScan` with ``deformable``). A classifier adds up the
maps, widened, from the finest on. ``*_pose`` returns the finest map alone, ``*_seg`` the sums of the classifier.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import Bottleneck, ConvNorm, ConvNormStem, DepthwiseConv2d, Fusion, SumNeck, add_norm, get_norm
from ..registry import suggest
from ..scans.sequence import TokenLayout
from .base import Backbone, Branch, ScanBlock, Stage, add_branch, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename
from .vmamba import convert_mixers

_STRIDES = (4, 8, 16, 32)
_STEM_WIDTH = 64
_SCAN = dict(type="multi_direction", expand=2.0, state_dim=1, gate=False, deformable=True)


class ResidualBlock(Bottleneck):
    """`Bottleneck` with the interface of `ScanBlock`."""

    def forward(self, x: torch.Tensor, branch: Branch | None = None) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """As `ScanBlock.forward`, on maps alone."""
        return super().forward(add_branch(x, branch)), None


class MultiKernelConv(nn.ModuleList):
    """Depthwise convolutions of size 3, 5, 7 and 9, each of a quarter of the channels, which then alternate."""

    def __init__(self, dim: int):
        if dim % 4:
            raise ValueError(f"channels of a branch are convolved in four groups, which {dim} channels cannot form")
        super().__init__(DepthwiseConv2d(dim // 4, size) for size in (3, 5, 7, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape; channel 4 c + g is channel c of group g."""
        groups = x.chunk(len(self), dim=-1)
        return torch.stack([conv(group) for conv, group in zip(self, groups)], dim=-1).flatten(-2)


class DynamicScanBlock(ScanBlock):
    """`ScanBlock` behind a residual branch of convolutions: norm, `MultiKernelConv`, GELU.

    Args:
        dim, scan, options: see `ScanBlock`.
        position_convs: a depthwise 3x3 convolution of the input is added to what this branch sees, and one of the
            mixer's sum to that sum.
        drop_convs: whether drop path goes for the branch of convolutions too.
    """

    def __init__(
        self,
        dim: int,
        scan: dict | Literal[False],
        *,
        position_convs: bool = False,
        drop_convs: bool = True,
        **options: Any,
    ):
        super().__init__(dim, scan, **options)
        self.norm0 = get_norm("layer", dim)
        self.convs = MultiKernelConv(dim)
        self.drop_convs = self.drop_path if drop_convs else nn.Identity()
        self.position1 = DepthwiseConv2d(dim, 3) if position_convs else None
        self.position2 = DepthwiseConv2d(dim, 3) if position_convs else None

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        if self.position1 is None:
            x, normed = add_norm(self.norm0, x, *(branch or ()))
        else:
            x = add_branch(x, branch)
            normed = add_norm(self.norm0, x, self.position1(x))[1]  # the sum itself does not go on
        branch = F.gelu(self.convs(normed)), self.drop_convs
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x, *branch)
            branch = self.mixer(normed), self.drop_path
        if self.position2 is not None:
            x = add_branch(x, branch)
            branch = self.position2(x), nn.Identity()
        if self.mlp is not None:
            x, normed = add_norm(self.norm2, x, *branch)
            branch = self.mlp(normed), self.drop_path
        return x, branch


class ParallelModule(nn.Module):
    """Blocks of all branches, then their fusion."""

    def __init__(self, branches: Iterable[nn.Module], dims: Sequence[int]):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.fusion = Fusion(dims)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.fusion([branch(x) for branch, x in zip(self.branches, maps, strict=True)])


class ParallelStage(nn.Module):
    """New branches from the coarsest map, ``downsample``, then modules, ``blocks``."""

    def __init__(self, downsample: Iterable[nn.Module], blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = nn.ModuleList(downsample)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: of the branches that there are already."""
        grown = [*maps, *(conv(maps[-1]) for conv in self.downsample)]
        grown = grown[len(grown) - len(self.blocks[0].branches) :]  # the first stage with branches replaces its input
        for block in self.blocks:
            grown = block(grown)
        return grown


class HRVMamba(Backbone):
    """HRVMamba of any size and switch.

    The stages are those of HRNet: ResNet blocks, then modules of two, three and four branches. All maps come out of the
    last one, so a dense model has all stages whatever maps are asked for, but no fusion into the others.

    Args:
        dims: widths of the four branches; each divisible by 4.
        first_dim: width inside of the ResNet blocks, a quarter of what they give.
        depths: ResNet blocks, then modules of two, three and four branches.
        blocks: blocks per branch of a module.
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`); False
            leaves the mixers out.
        mlp_ratio: hidden width of the MLPs over the width of the branch.
        position_convs, drop_convs: see `DynamicScanBlock`.
        neck_dims, num_features: widths of the sums in the `SumNeck`, and of what it gives to the classifier.
        maps: what a dense model returns: ``"branches"``, or ``"sums"`` of the neck.
        multiscale: a dense model returns four maps by default; otherwise the finest alone.
        drop_path_rate: stochastic depth of the last blocks; earlier blocks rise to it linearly, alike in all branches.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "hrvmamba"
    classifier_parts = ("neck.", "head.")

    def __init__(
        self,
        *,
        dims: Sequence[int] = (32, 64, 128, 256),
        first_dim: int = 64,
        depths: Sequence[int] = (2, 1, 4, 2),
        blocks: int = 2,
        scan: str | dict | Literal[False] | None = None,
        mlp_ratio: float = 2.0,
        position_convs: bool = False,
        drop_convs: bool = True,
        neck_dims: Sequence[int] = (128, 256, 512, 1024),
        num_features: int = 2048,
        maps: str = "branches",
        multiscale: bool = True,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if not len(dims) == len(depths) == len(neck_dims) == len(_STRIDES):
            given = f"dims {tuple(dims)}, depths {tuple(depths)}, neck_dims {tuple(neck_dims)}"
            raise ValueError(f"dims, depths and neck_dims must have four entries, got {given}")
        if min(*depths, blocks) < 1:
            raise ValueError(f"every stage and branch needs a block, got depths {tuple(depths)} and blocks {blocks}")
        if maps not in ("branches", "sums"):
            raise ValueError(f"unknown maps {maps!r}.{suggest(str(maps), ('branches', 'sums'))}")
        self.maps, self.multiscale = maps, multiscale
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, position_convs=position_convs, drop_convs=drop_convs)
        spec = resolve_scan(scan, _SCAN)
        self.stem = ConvNormStem(self.in_chans, _STEM_WIDTH)
        wide = 4 * first_dim
        first = [ResidualBlock(_STEM_WIDTH if i == 0 else wide, first_dim) for i in range(depths[0])]
        self.stages = nn.ModuleList([Stage(first)])
        rates = drop_path_rates(drop_path_rate, [count * blocks for count in depths[1:]])
        for last, of_stage in enumerate(rates, 1):  # the coarsest branch
            new = [ConvNorm(wide if last == 1 else dims[last - 1], dims[last], 3, stride=2)]
            if last == 1:
                new.insert(0, ConvNorm(wide, dims[0], 3))
            modules = []
            for start in range(0, len(of_stage), blocks):
                of_module = of_stage[start : start + blocks]
                branches = [
                    Stage([DynamicScanBlock(dim, spec, drop_path=p, **options) for p in of_module])
                    for dim in dims[: last + 1]
                ]
                modules.append(ParallelModule(branches, dims[: last + 1]))
            self.stages.append(ParallelStage(new, modules))
        sums = maps == "sums"
        self.neck = None if self.features_only and not sums else SumNeck(dims, neck_dims, num_features)
        outputs = (*neck_dims[:-1], num_features) if sums else dims
        norm, last_width = "layer" if self.features_only else "none", None if self.neck is None else num_features
        self.finish(outputs, _STRIDES, norm, num_features=last_width)
        for info in self.stage_info:
            info["module"] = "neck" if sums else f"stages.{len(_STRIDES) - 1}"

    def default_out_indices(self) -> list[int]:
        return super().default_out_indices() if self.multiscale else [0]

    def _last_fusion(self) -> Fusion:
        return self.stages[-1].blocks[-1].fusion

    def prune(self) -> None:
        last, fusion = self.out_indices[-1], self._last_fusion()
        needed = range(last + 1) if self.maps == "sums" else self.out_indices
        for row in [row for row in fusion if int(row) not in needed]:
            del fusion[row]
        if self.neck is not None and self.maps == "sums":
            self.neck.keep(last + 1)
        else:
            self.neck = None  # it makes the vector for the classifier alone

    def built_maps(self) -> list[int]:
        return [int(row) for row in self._last_fusion()]

    def rule_for_extra(self, key: str) -> str | None:
        row = re.match(rf"stages\.3\.blocks\.{len(self.stages[-1].blocks) - 1}\.fusion\.(\d)\.", key)
        return "fusion into maps that are not asked for" if row and int(row[1]) not in self.built_maps() else None

    def forward_stages(self, x: torch.Tensor, last: int | None = None) -> dict[int, torch.Tensor]:  # type: ignore[override]
        """The maps of a dense model by their number, raw, each (B, H', W', C). All stages run, whatever is `last`."""
        maps = self._branches(x)
        if self.maps == "sums":
            assert self.neck is not None
            maps = self.neck(maps)
        return dict(zip(self.built_maps(), maps, strict=True))

    def _branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.check_images(x)
        maps = [self.stages[0](self.stem(x))]
        for stage in self.stages[1:]:
            maps = stage(maps)
        return maps

    def trace(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        maps = self._branches(x)
        sums = maps if self.neck is None else self.neck(maps)
        outputs = dict(zip(self.built_maps(), sums if self.maps == "sums" else maps, strict=True))
        return sums[-1].permute(0, 3, 1, 2), outputs

    def end_norm(self, index: int) -> nn.Module:
        return nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"] = [*groups["blocks"], (r"^neck\.", (99998,))]
        return groups

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return bool(keys & {f"{block}.norm0.weight" for block in ("stage2.0.branches.0.0", _OUR_FIRST_BLOCK)})

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        return convert_mixers({rename(key, _OFFICIAL_KEYS): value for key, value in state_dict.items()})

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("HRVMamba", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT, _CONSTANTS)
        if given["num_modules"][0] != 1:
            raise ValueError(f"the first stage of an original HRVMamba is one module, got {given['num_modules'][0]}")
        if given["dt_rank"] != "ceil(dim/16)":
            raise ValueError(f"dt_rank of an original HRVMamba is 'ceil(dim/16)', got {given['dt_rank']!r}")
        neck = any(key.startswith("neck.") for key in keys)
        norms = "outnorm0.weight" in keys
        several, offsets = given["multiscale_output"], given["offset_depthwise"]
        if several is None:
            last = given["num_modules"][3] - 1
            rows = (f"stage4.{last}.fuse_layers.1.", f"stages.3.blocks.{last}.fusion.1.")
            several = any(key.startswith(rows) for key in keys)
        if offsets is None:
            offsets = any(key.endswith(("conv2d.offset_mask_dw.weight", "conv.offset_conv.weight")) for key in keys)
        return dict(
            dims=tuple(given["channels"]),
            first_dim=given["stage1_channels"],
            depths=(given["bottlenecks_stage1"], *given["num_modules"][1:]),
            blocks=given["blocks_per_branch"],
            scan=dict(
                _SCAN,
                expand=given["ssm_ratio"],
                state_dim=given["ssm_d_state"],
                offset_kernel=_OFFSET_KERNEL if offsets is True else int(offsets),
                channel_gate=given["se_and_cpe"],
            ),
            mlp_ratio=given["mlp_ratio"],
            position_convs=given["se_and_cpe"],
            drop_convs=neck,
            maps="sums" if norms and neck else "branches",
            multiscale=several,
            drop_path_rate=given["drop_path_rate"],
            num_classes=given["num_classes"] if "head.weight" in keys else 0,
            features_only=norms or not neck,
            out_norm=norms,
        )


_OUR_FIRST_BLOCK = "stages.1.blocks.0.branches.0.blocks.0"
_CONV_NORM = ("conv", "bn")
_OFFICIAL_KEYS = (
    (r"^(conv|bn)([12])\.", lambda m: f"stem.{int(m[2]) - 1}.{m[1]}."),
    (r"^layer1\.", "stages.0.blocks."),
    (r"^neck\.increase_layers\.(\d)\.0\.", r"neck.increase.\1."),
    (r"^neck\.downsample_layers\.", "neck.downsample."),
    (r"^neck\.final_layer\.", "neck.final."),
    (r"^(stages\.0\.blocks|neck\.increase)\.(\d+)\.(conv|bn)(\d)\.", r"\1.\2.conv\4.\3."),
    (
        r"^(stages\.0\.blocks|neck\.increase)\.(\d+)\.downsample\.(\d)\.",
        lambda m: f"{m[1]}.{m[2]}.shortcut.{_CONV_NORM[int(m[3])]}.",
    ),
    (r"^transition1\.(\d)\.(?:0\.)?(\d)\.(?!\d)", lambda m: f"stages.1.downsample.{m[1]}.{_CONV_NORM[int(m[2])]}."),
    (r"^transition([23])\.\d\.0\.(\d)\.", lambda m: f"stages.{m[1]}.downsample.0.{_CONV_NORM[int(m[2])]}."),
    (r"^stage([234])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.branches\.(\d)\.(\d+)\.", r".branches.\1.blocks.\2."),
    (  # down: steps of convolution, norm, convolution, norm
        r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.(\d)\.",
        lambda m: f".fusion.{m[1]}.{m[2]}.{2 * int(m[3]) + int(m[4]) // 2}.{_CONV_NORM[int(m[4]) % 2]}.",
    ),
    (r"\.fuse_layers\.(\d)\.(\d)\.(\d)\.", lambda m: f".fusion.{m[1]}.{m[2]}.{_CONV_NORM[int(m[3])]}."),
    (r"(\.blocks\.\d+)\.conv2d\.", r"\1.convs."),
    (r"(\.blocks\.\d+)\.cpe([12])\.", r"\1.position\2."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"\.mixer\.conv2d\.offset_mask\.", ".mixer.conv.offset_mask."),
    (r"\.mixer\.conv2d\.offset_mask_dw\.", ".mixer.conv.offset_conv."),
    (r"\.mixer\.se\.fc\.0\.", ".mixer.channel_gate.reduce."),
    (r"\.mixer\.se\.fc\.2\.", ".mixer.channel_gate.expand."),
    (r"^outnorm(\d)\.", r"out_norms.\1."),
)
_OFFSET_KERNEL = 3
_WITHOUT_EFFECT = {"variant", "out_indices"}
_CONSTANTS = dict(in_chans=3)
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    channels=(32, 64, 128, 256),
    stage1_channels=64,
    num_modules=(1, 1, 4, 2),
    blocks_per_branch=2,
    bottlenecks_stage1=2,
    ssm_d_state=1,
    ssm_ratio=2.0,
    dt_rank="ceil(dim/16)",
    mlp_ratio=2.0,
    drop_path_rate=0.0,
    offset_depthwise=None,  # as the weights say
    se_and_cpe=False,
    multiscale_output=None,  # as the weights say
    num_classes=1000,
)

_LIGHT = dict(scan=dict(_SCAN, channel_gate=True), position_convs=True, drop_path_rate=0.1)
_TINY = dict(dims=(16, 32, 64, 128), first_dim=32)
_SMALL = dict(dims=(32, 64, 128, 256), scan=_SCAN)
_BASE = dict(dims=(80, 160, 320, 640), scan=dict(_SCAN, offset_kernel=3))
_POSE = dict(features_only=True, multiscale=False, drop_convs=False, out_norm=False)

VARIANTS: dict[str, dict[str, Any]] = {
    "hrvmamba_nano": dict(_LIGHT, dims=(8, 16, 32, 64), first_dim=16),
    "hrvmamba_tiny": dict(_LIGHT, **_TINY),
    "hrvmamba_small": dict(_SMALL, drop_path_rate=0.2),
    "hrvmamba_base": dict(_BASE, drop_path_rate=0.2),
    "hrvmamba_tiny_pose": dict(_TINY, **_POSE, scan=_SCAN),
    "hrvmamba_small_pose": dict(_SMALL, **_POSE, drop_path_rate=0.1),
    "hrvmamba_base_pose": dict(_BASE, **_POSE, drop_path_rate=0.2),
    "hrvmamba_base_seg": dict(_BASE, features_only=True, maps="sums", drop_path_rate=0.15),
    "hrvmamba_micro": dict(
        dims=(16, 16, 24, 32), first_dim=8, depths=(1, 1, 1, 1), blocks=1, scan=dict(_SCAN, channel_gate=True),
        position_convs=True, neck_dims=(16, 24, 32, 40), num_features=48,
    ),
}  # fmt: skip


def _weights(identity: str, height: int, width: int | None = None, **facts: Any) -> dict[str, Any]:
    url = f"https://drive.google.com/file/d/{identity}/view"
    size = (3, height, height if width is None else width)
    return dict(url=url, input_size=size, paper="arXiv:2410.03174", **facts)


def _classifier(size: str, identity: str, side: int, top1: float) -> dict[str, Any]:
    return _weights(identity, side, file=f"hrvmamba_{size}.pth", top1_reported=top1, crop_pct=1.0)


# The last ones of a pose variant are of all four maps, ``multiscale=True``.
PUBLISHED: dict[str, dict[str, Any]] = {
    "hrvmamba_nano": _classifier("nano", "1vjoEmX8NGh3D4aIB2zTP6eKN23zXmd7i", 256, 74.8),
    "hrvmamba_tiny": _classifier("tiny", "18MnK9b-Ip7RLevdAzzPBFNIe_BNHg2Ry", 256, 78.6),
    "hrvmamba_small": _classifier("small", "1Gxo0Pxg2D7x3dU0P2AZ2YGEFS-7XMxIX", 256, 81.3),
    "hrvmamba_base": _classifier("base", "1jbXjvCBdjgraeEaJrDjD2wStpxJtCEuy", 224, 84.2),
    "hrvmamba_tiny_pose": _weights("1cj6VPnSiyCDQHuDEZIIytyEQO-Xr-pPO", 256, 192, coco_ap_reported=69.5),
    "hrvmamba_small_pose": _weights(
        "1L3CO3D4L1Q1galRaSC82taDDqFqmukKt", 256, 192, coco_ap_reported=74.6, tag="coco_256x192", also=[
            _weights("1aqkUoQog4hl1dSbkUkwQvlwgistpxtzQ", 384, 288, coco_ap_reported=76.4, tag="coco_384x288"),
            _weights("1J4OoX8QeclHUGeBOTU8twPX8T7DYZ2EV", 640, crowdpose_ap_reported=68.8, tag="crowdpose"),
        ],
    ),
    "hrvmamba_base_pose": _weights(
        "14JE7v6jdxtJaEMJCatqbmuhLkfBYVBOX", 256, 192, coco_ap_reported=76.5, tag="coco_256x192", also=[
            _weights("161d_LhWBBvBOSXxPBGRBNCjYr8PP0w9c", 384, 288, coco_ap_reported=77.7, tag="coco_384x288"),
            _weights("1Xbuj1-NWg9ivCzUFaLUGc-eQp0d0146j", 640, crowdpose_ap_reported=69.6, tag="crowdpose"),
        ],
    ),
    "hrvmamba_base_seg": _weights("1O288Y_VhuWRtTXO2WpTbGkEwEn2raik-", 512, ade20k_miou_reported=51.4),
}  # fmt: skip

HRVMamba.variants = VARIANTS
HRVMamba.published = PUBLISHED
globals().update(register_family(HRVMamba))

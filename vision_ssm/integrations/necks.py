"""Necks for backbones that the pyramid of mmdet and mmseg does not suit, as ``vision_ssm.NAME`` in a config.

Papers: `SimpleFPN`: Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), arXiv 2203.16527.
`EfficientViMFPN`: EfficientViM, arXiv 2411.15241, which takes it from EfficientViT, arXiv 2305.07027.
"""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from ..registry import MODELS

MODELS.register_module(module=LayerNorm2d)  # for norm_cfg of heads, which ViTDet norms over the channels
Maps = Sequence[torch.Tensor]


def _check_maps(neck: nn.Module, maps: Maps, channels: Sequence[int]) -> None:
    given = [feature.shape[1] for feature in maps]
    if given != list(channels):
        raise ValueError(
            f"{type(neck).__name__} was built for {len(channels)} map(s) of {list(channels)} channels and got"
            f" {len(given)} of {given}: set out_indices of the backbone and in_channels of the neck accordingly"
        )


def _halve(x: torch.Tensor) -> torch.Tensor:
    """Every second row and column of (B, C, H, W)."""
    return x[:, :, ::2, ::2]


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """The pyramid of ViTDet: maps of several sizes from the one map of a plain backbone.

    A level of scale 4 is two transposed convolutions, which halve the channels each, with a norm and GELU in between;
    of scale 2 one of them, of scale 1 nothing, of scale 1/2 a max-pool. Then a 1x1 and a 3x3 convolution follow, each
    with a norm (layer norm over the channels). Further maps are the coarsest one without every second row and column.

    Args:
        in_channels: channels of the backbone's map, which should have stride 16.
        out_channels: channels of all maps.
        num_outs: maps to return, 4 or more.
        init_cfg: as of any mmengine module.
    """

    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if not isinstance(in_channels, int):
            raise TypeError(f"SimpleFPN takes the channels of one map, in_channels=N, got {in_channels!r}")
        if num_outs < len(self.scales):
            raise ValueError(f"SimpleFPN makes {len(self.scales)} maps or more, got num_outs={num_outs}")
        self.in_channels, self.out_channels, self.num_outs = in_channels, out_channels, num_outs
        half, quarter = in_channels // 2, in_channels // 4
        resizes = (
            (
                quarter,
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            (half, nn.ConvTranspose2d(in_channels, half, 2, stride=2)),
            (in_channels,),
            (in_channels, nn.MaxPool2d(2, stride=2, ceil_mode=True)),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resize,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for width, *resize in resizes
        )

    def forward(self, inputs: Maps) -> tuple[torch.Tensor, ...]:
        """inputs: one (B, in_channels, H, W). Returns `num_outs` maps (B, out_channels, H', W'), finest first.

        Their sizes are 4, 2, 1, 1/2, 1/4, ... times that of the input, rounded up.
        """
        _check_maps(self, inputs, [self.in_channels])
        maps = [level(inputs[0]) for level in self.levels]
        while len(maps) < self.num_outs:
            maps.append(_halve(maps[-1]))
        return tuple(maps)


@MODELS.register_module()
class EfficientViMFPN(BaseModule):
    """The feature pyramid under EfficientViM's detectors, whose backbone begins at stride 16.

    Inputs are normed (layer norm over the channels), projected and added up from coarse to fine as in a feature
    pyramid. Finer levels come from the finest sum by a chain of transposed convolutions, coarser ones from the coarsest
    normed input by a chain of strided convolutions. Every level up to the coarsest input ends in a 3x3 convolution.

    RetinaNet takes one finer and one coarser level (strides 8 to 128), Mask R-CNN two finer ones (strides 4 to 64).

    Args:
        in_channels: channels of the backbone's maps, finest first.
        out_channels: channels of all maps.
        finer: levels in front of the finest input, each of twice the size of the next.
        coarser: levels behind the coarsest input, each of half the size of the one before.
        init_cfg: as of any mmengine module.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        finer: int = 1,
        coarser: int = 1,
        init_cfg: dict | list[dict] | None = dict(type="Xavier", layer="Conv2d", distribution="uniform"),  # noqa: B006
    ):
        super().__init__(init_cfg)
        if isinstance(in_channels, int) or not in_channels:
            raise TypeError(f"EfficientViMFPN takes the channels of each map, in_channels=[...], got {in_channels!r}")
        if finer < 0 or coarser < 0:
            raise ValueError(f"finer and coarser are numbers of levels, got {finer} and {coarser}")
        self.in_channels, self.out_channels = list(in_channels), out_channels
        self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in in_channels)
        self.laterals = nn.ModuleList(nn.Conv2d(dim, out_channels, 1) for dim in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        dim = out_channels
        self.upsamples = nn.ModuleList(nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(finer))
        self.finer_outputs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(finer))
        widths = [self.in_channels[-1], *[out_channels] * coarser]
        self.downsamples = nn.ModuleList(
            nn.Conv2d(width, out_channels, 3, stride=2, padding=1) for width in widths[:coarser]
        )
        self.num_outs = finer + len(in_channels) + coarser

    def forward(self, inputs: Maps) -> tuple[torch.Tensor, ...]:
        """inputs: maps (B, in_channels[i], H, W). Returns `num_outs` maps (B, out_channels, H', W'), finest first."""
        _check_maps(self, inputs, self.in_channels)
        normed = [norm(x) for norm, x in zip(self.norms, inputs)]
        sums = [lateral(x) for lateral, x in zip(self.laterals, normed)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[2:], mode="nearest")
        maps = [output(x) for output, x in zip(self.outputs, sums)]
        x = sums[0]
        for upsample, output in zip(self.upsamples, self.finer_outputs):
            x = upsample(x)
            maps.insert(0, output(x))
        x = normed[-1]
        for downsample in self.downsamples:
            x = downsample(x)
            maps.append(x)
        return tuple(maps)

"""A pyramid of strides from maps of one stride, for dense heads on plain backbones."""

from collections.abc import Sequence

import torch
from torch import nn

from .downsample import Halve
from .norm import ChannelLastBatchNorm
from .upsample import TransposedConv2d

SCALES = (4.0, 2.0, 1.0, 0.5)


class SimplePyramid(nn.Module):
    """Four maps at 4, 2, 1 and 1/2 times the size of the given ones (the pyramid of BEiT and of Vim's dense backbone).

    Parameters are named ``levels.0`` (transposed convolution, batch norm, GELU, transposed convolution) and
    ``levels.1`` (transposed convolution).

    Args:
        dim: channels.
        remainder: what becomes of the last row or column of an odd size at 1/2 times the size: ``"pad"`` rounds up,
            ``"drop"`` leaves it out as the originals do.
    """

    def __init__(self, dim: int, remainder: str = "pad"):
        super().__init__()

        def double() -> nn.Module:
            return TransposedConv2d(dim, dim)

        self.levels = nn.ModuleList(
            [
                nn.Sequential(double(), ChannelLastBatchNorm(dim), nn.GELU(), double()),
                double(),
                nn.Identity(),
                Halve(ceil=remainder == "pad"),
            ]
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: four (B, H, W, dim), one per level, or one for all levels. Returns four maps, finest first."""
        sources = list(maps) * len(self.levels) if len(maps) == 1 else maps
        return [level(source) for level, source in zip(self.levels, sources, strict=True)]

"""A pyramid of strides from maps of one stride, for dense heads on plain backbones."""

from collections.abc import Sequence

import torch
from torch import nn

from .norm import ChannelLastBatchNorm

SCALES = (4.0, 2.0, 1.0, 0.5)


class _Upsample(nn.ConvTranspose2d):
    """Twice the size: every pixel of a (B, H, W, C) map becomes a 2 x 2 square."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 2, stride=2)

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, 2H, 2W, C)


class _Halve(nn.MaxPool2d):
    """Half the size: the maxima of 2 x 2 squares of a (B, H, W, C) map, which may reach over its edge if `ceil`."""

    def __init__(self, ceil: bool) -> None:
        super().__init__(2, stride=2, ceil_mode=ceil)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H/2, W/2, C)


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
        self.levels = nn.ModuleList(
            [
                nn.Sequential(_Upsample(dim), ChannelLastBatchNorm(dim), nn.GELU(), _Upsample(dim)),
                _Upsample(dim),
                nn.Identity(),
                _Halve(ceil=remainder == "pad"),
            ]
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: four (B, H, W, dim), one per level, or one for all levels. Returns four maps, finest first."""
        sources = list(maps) * len(self.levels) if len(maps) == 1 else maps
        return [level(source) for level, source in zip(self.levels, sources, strict=True)]

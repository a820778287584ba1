"""Learned position tables that serve any map size."""

import torch
from torch import nn
from torch.nn import functional as F

from .init import trunc_normal_


def resample_position_table(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic resampling (align_corners False) of a (1, C, H0, W0) table to (1, C, height, width)."""
    if table.shape[-2:] == (height, width):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(wide, size=(height, width), mode="bicubic", align_corners=False)
    return resized.to(table.dtype)


class PositionTable(nn.Module):
    """Adds a learned (1, dim, H0, W0) table to a channel-last map, resampled when the map has another size."""

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, dim, height, width))
        trunc_normal_(self.table, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        table = resample_position_table(self.table, x.shape[1], x.shape[2])
        return x + table.permute(0, 2, 3, 1)  # (1, H, W, dim)

"""Axial rotary position tables (RoFormer, arXiv 2104.09864, in the two-dimensional form of EVA-02)."""

import torch
from torch import nn

from .position import resample_position_table

_BASE = 10000.0
_PRETRAINED_SIDE = 14  # coordinates run over the side of this grid, whatever the grid


class RotaryTable(nn.Module):
    """Rotates pairs of neighbouring channels by angles that grow with the row (first half) or column (second half).

    With ``m = dim / 2``, pair k of a half turns by ``14 * i / n * 10000 ** (-2 * k / m)`` at coordinate i of n. At a
    grid of another size than the constructed one, cosines and sines are resampled bicubically, as the originals do.

    Args:
        dim: channels; must be divisible by 4.
        height, width: cells of the constructed grid.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f"a rotary table needs a width divisible by 4 (pairs of channels in halves), got {dim}")
        half = dim // 2
        rates = _BASE ** (-torch.arange(0, half, 2) / half)
        rows, columns = (
            torch.outer(torch.arange(side) / side * _PRETRAINED_SIDE, rates).repeat_interleave(2, dim=1)  # (side, half)
            for side in (height, width)
        )
        angles = torch.cat(
            [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
        ).unsqueeze(0)  # (1, H, W, dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape, in the wider of the dtypes of `x` and the table."""
        cos, sin = (
            resample_position_table(table.permute(0, 3, 1, 2), x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
            for table in (self.cos, self.sin)
        )  # (1, H, W, dim)
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)  # (x0, x1) -> (-x1, x0)
        return x * cos + turned * sin

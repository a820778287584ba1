"""Deformable convolution of channel-last maps."""

import torch
from torch import nn

from ..ops.dcnv4 import dcnv4
from .activation import get_activation
from .conv import DepthwiseConv2d


class DeformableConv2d(nn.Module):
    """DCNv4 (arXiv 2401.06197) without projections and softmax, then an activation.

    Every group of channels is sampled at ``kernel_size ** 2`` points around a cell, whose offsets and weights a linear
    layer, ``offset_mask``, makes from all channels of the cell. It starts at zero, as the original's does.

    Args:
        dim: channels.
        groups: groups of channels with points of their own; a divisor of `dim`.
        kernel_size: odd; the map keeps its size.
        offset_kernel: odd size of a depthwise convolution, ``offset_conv``, in front of ``offset_mask``; 0: none.
        act: name of the activation, see `get_activation`.
    """

    def __init__(self, dim: int, groups: int, kernel_size: int = 3, offset_kernel: int = 0, act: str = "identity"):
        super().__init__()
        if dim % groups:
            raise ValueError(
                f"groups of a deformable convolution must divide its {dim} channels, got {groups} (a mixer's dt_rank)"
            )
        if kernel_size % 2 == 0 or (offset_kernel and offset_kernel % 2 == 0):
            raise ValueError(f"kernel_size and offset_kernel must be odd, got {kernel_size} and {offset_kernel}")
        self.groups, self.kernel_size = groups, kernel_size
        self.offset_conv = DepthwiseConv2d(dim, offset_kernel) if offset_kernel else nn.Identity()
        # the original's kernels read eight numbers at once
        self.offset_mask = nn.Linear(dim, -(-3 * groups * kernel_size**2 // 8) * 8)
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        self.act = get_activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim), any float dtype. Returns the same shape and dtype."""
        numbers = self.offset_mask(self.offset_conv(x))
        padding = self.kernel_size // 2
        return self.act(dcnv4(x, numbers, self.groups, kernel_size=self.kernel_size, padding=padding))

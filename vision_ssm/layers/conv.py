"""Convolutions on channel-last maps."""

import torch
from torch import nn


class ChannelLastConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes and returns (B, H, W, C).

    The permuted view of a contiguous channel-last map is a channels_last tensor, so nothing is copied on the way in,
    and the convolution answers in the same memory format, so nothing is copied on the way out.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C_in), any float dtype. Returns (B, H', W', C_out)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

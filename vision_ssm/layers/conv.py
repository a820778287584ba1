"""Convolutions on channel-last maps."""

import torch
from torch import nn

from ..ops.depthwise_conv import depthwise_conv
from .activation import get_activation

_FUSED_ACTIVATIONS = {"identity": "none", "silu": "silu", "gelu": "gelu"}


class ChannelLastConv2d(nn.Conv2d):
    """`nn.Conv2d` that takes and returns (B, H, W, C).

    The permuted view of a contiguous channel-last map is a channels_last tensor, so nothing is copied on the way in,
    and the convolution answers in the same memory format, so nothing is copied on the way out.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C_in), any float dtype. Returns (B, H', W', C_out)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channel-last map, then an activation, in one operator where it has that activation.

    Args:
        dim: channels.
        kernel_size: odd; the map keeps its size.
        bias: whether there is a bias.
        act: name of the activation, see `get_activation`.
    """

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True, act: str = "identity"):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)
        self.fused_act = _FUSED_ACTIVATIONS.get(act, "none")
        self.act = nn.Identity() if act in _FUSED_ACTIVATIONS else get_activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim), any float dtype. Returns the same shape, in the autocast dtype if there is one."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.act(depthwise_conv(x, self.weight, self.bias, activation=self.fused_act))

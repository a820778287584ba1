"""Convolutions on channel-last maps."""

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.autocast import autocast_dtype
from ..ops.depthwise_conv import depthwise_conv
from ..ops.registration import is_transformed
from .activation import get_activation

_FUSED_ACTIVATIONS = {"identity": "none", "silu": "silu", "gelu": "gelu"}


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in the memory format of a channel-last map; as they are under `torch.func`, whose `vmap` has
    no memory formats."""
    return images if is_transformed() else images.contiguous(memory_format=torch.channels_last)


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
        if (dtype := autocast_dtype(x)) is not None:
            x = x.to(dtype)
        return self.act(depthwise_conv(x, self.weight, self.bias, activation=self.fused_act))


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution of a token sequence that sees a token and the ``width - 1`` before it, then an activation.

    Args:
        dim: channels.
        width: taps.
        bias: whether there is a bias.
        act: ``"silu"``, ``"gelu"`` or ``"identity"``, in the same operator.
        reverse: see the tokens behind instead: the convolution of the reversed sequence, turned back.
    """

    def __init__(self, dim: int, width: int = 4, bias: bool = True, act: str = "silu", reverse: bool = False):
        if width < 1:
            raise ValueError(f"a causal convolution has 1 tap or more, got {width}")
        super().__init__(dim, dim, width, groups=dim, bias=bias)
        self.reverse = reverse
        self.fused_act = _FUSED_ACTIVATIONS[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, dim), any float dtype. Returns the same shape, in the autocast dtype if there is one."""
        if (dtype := autocast_dtype(x)) is not None:
            x = x.to(dtype)
        # half of a centred kernel: taps behind the token are 0
        weight = F.pad(self.weight.flip(-1) if self.reverse else self.weight, self._padding())
        return depthwise_conv(x.unsqueeze(1), weight.unsqueeze(2), self.bias, activation=self.fused_act).squeeze(1)

    def _padding(self) -> tuple[int, int]:
        empty = self.kernel_size[0] - 1
        return (empty, 0) if self.reverse else (0, empty)

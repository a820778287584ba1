"""The MLP of a block with depthwise convolutions in its hidden layer."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.depthwise_conv import depthwise_conv
from .conv import DepthwiseConv2d


class ConvMlp(nn.Module):
    """``fc1 -> depthwise 3x3 convolution -> GELU -> fc2`` on channel-last maps; dropout behind either linear layer.

    Args:
        dim: input channels.
        hidden_dim: channels of the hidden layer.
        out_dim: output channels; None: `dim`.
        residual: add the input of the convolution to its output.
        dropout: probability of dropping a value, in training.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int | None = None, *, residual: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = DepthwiseConv2d(hidden_dim, 3, act="identity" if residual else "gelu")
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, H, W, out_dim)."""
        h = self.dropout(self.fc1(x))
        h = F.gelu(h + self.conv(h)) if self.residual else self.conv(h)
        return self.dropout(self.fc2(h))


class MultiScaleMlp(nn.Module):
    """``fc1 -> GELU -> h + sum of depthwise convolutions of h -> fc2`` on channel-last maps.

    MLP of MSVM-UNet (arXiv 2408.13735). Convolutions of one map add up to one convolution with the sum of their
    kernels, and that is how they are computed. Parameters: ``fc1``, ``convs`` (without biases), ``fc2``.

    Args:
        dim: input and output channels.
        hidden_dim: channels of the hidden layer.
        kernel_sizes: one convolution each, odd.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel_sizes: Sequence[int] = (1, 3, 5)):
        super().__init__()
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, so that maps keep their size; got {tuple(kernel_sizes)}")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.convs = nn.ModuleList(DepthwiseConv2d(hidden_dim, size, bias=False) for size in kernel_sizes)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def kernel(self) -> torch.Tensor:
        """The convolutions and the identity as one kernel, (hidden_dim, 1, k, k) with k the largest of the sizes."""
        weights = [conv.weight for conv in self.convs]
        largest = max(weight.shape[-1] for weight in weights)
        identity = torch.ones_like(weights[0][..., :1, :1])
        return sum(F.pad(weight, [(largest - weight.shape[-1]) // 2] * 4) for weight in [identity, *weights])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        h = F.gelu(self.fc1(x))
        return self.fc2(depthwise_conv(h, self.kernel(), None))

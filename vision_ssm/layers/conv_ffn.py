"""The MLP of a block with a depthwise convolution in its hidden layer."""

import torch
from torch import nn
from torch.nn import functional as F

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

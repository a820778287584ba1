"""An MLP that sees the neighbours of a cell."""

import torch
from torch import nn

from .activation import get_activation
from .conv import DepthwiseConv2d


class ConvMlp(nn.Module):
    """``fc2(gelu(conv(fc1(x))))`` on a channel-last map, with a depthwise 3x3 convolution.

    Args:
        dim: width of the input.
        hidden_dim: width of the convolution.
        out_dim: width of the output; `dim` by default.
        residual: add the convolution's input to its output, before the activation.
        dropout: dropout after each of the two linear layers.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int | None = None, *, residual: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = DepthwiseConv2d(hidden_dim, 3, act="identity" if residual else "gelu")
        self.act = get_activation("gelu" if residual else "identity")
        self.fc2 = nn.Linear(hidden_dim, dim if out_dim is None else out_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, H, W, out_dim)."""
        h = self.dropout(self.fc1(x))  # (B, H, W, hidden_dim)
        h = h + self.conv(h) if self.residual else self.conv(h)
        return self.dropout(self.fc2(self.act(h)))

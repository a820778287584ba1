"""Gates of channels."""

import torch
from torch import nn

from .norm import LayerNorm


class ChannelGate(nn.Module):
    """Scales every channel of a sequence by a number in (0, 1) that depends on the mean over its tokens.

    ``x * sigmoid(expand(gelu(reduce(mean(norm(x))))))``: a squeeze-and-excitation whose norm shapes the gate alone.
    Parameters: ``norm``, ``reduce`` (dim to dim / `reduction`), ``expand``.
    """

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        narrow = max(dim // reduction, 1)
        self.norm = LayerNorm(dim, eps=1e-5)
        self.reduce = nn.Linear(dim, narrow)
        self.act = nn.GELU()
        self.expand = nn.Linear(narrow, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, ..., dim), the mean goes over T. Returns the same shape."""
        pooled = self.norm(x).mean(dim=1, keepdim=True)  # (B, 1, ..., dim)
        return x * torch.sigmoid(self.expand(self.act(self.reduce(pooled))))

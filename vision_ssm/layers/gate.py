"""Gates of channels."""

import torch
from torch import nn

from .activation import get_activation
from .norm import get_norm


class ChannelGate(nn.Module):
    """Scales every channel of a sequence by a number in (0, 1) that depends on the means over its tokens.

    Squeeze and excitation: ``x * sigmoid(expand(act(reduce(mean(norm(x))))))``; the norm shapes the gate alone.
    Parameters: ``norm`` (if there is one), ``reduce`` (dim to dim / `reduction`), ``expand``.

    Args:
        dim: channels.
        reduction: channels over the hidden width.
        norm: see `get_norm`.
        act: see `get_activation`.
        bias: whether the two linear layers have biases.
    """

    def __init__(self, dim: int, reduction: int = 8, *, norm: str = "layer", act: str = "gelu", bias: bool = True):
        super().__init__()
        narrow = max(dim // reduction, 1)
        self.norm = get_norm(norm, dim)
        self.reduce = nn.Linear(dim, narrow, bias=bias)
        self.act = get_activation(act)
        self.expand = nn.Linear(narrow, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, ..., dim), the mean goes over T. Returns the same shape."""
        return x * self.gate(x)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, ..., dim). Returns the numbers that scale its channels, (B, 1, ..., dim)."""
        means = self.norm(x).mean(dim=1, keepdim=True)  # (B, 1, ..., dim)
        means = means.to(self.reduce.weight.dtype)  # a scan's float32, before weights of half precision
        return self.expand(self.act(self.reduce(means))).sigmoid()

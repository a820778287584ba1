"""Gates of whole channels."""

import torch
from torch import nn

from .activation import get_activation
from .norm import get_norm


class ChannelGate(nn.Module):
    """Squeeze and excitation: every channel times a number in (0, 1) that a small MLP makes of all channels' means.

    Parameters are named ``norm`` (if there is one), ``reduce`` and ``expand``.

    Args:
        dim: channels.
        reduction: channels over the hidden width of the MLP.
        act: activation of the hidden layer, see `get_activation`.
        bias: whether the MLP has biases.
        norm: norm of what is averaged, see `get_norm`; what is multiplied by the gate is not normalised.
    """

    def __init__(self, dim: int, reduction: int = 8, *, act: str = "relu", bias: bool = True, norm: str = "none"):
        super().__init__()
        hidden = max(1, dim // reduction)
        self.norm = get_norm(norm, dim)
        self.reduce = nn.Linear(dim, hidden, bias=bias)
        self.act = get_activation(act)
        self.expand = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, ..., dim). Returns the same shape."""
        means = self.norm(x).flatten(1, -2).mean(dim=1)  # (B, dim)
        gate = self.expand(self.act(self.reduce(means))).sigmoid()
        return x * gate.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])

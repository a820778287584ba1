"""Normalisation of channel-last maps."""

import torch
from torch import nn

from ..registry import suggest


class ChannelLastBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (B, H, W, C) maps over everything but the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def get_norm(name: str, dim: int) -> nn.Module:
    """A norm for (B, H, W, `dim`) maps: ``"layer"`` (over channels, eps 1e-5), ``"batch"`` or ``"none"``.

    Raises:
        ValueError: `name` is not one of them.
    """
    norms = {
        "layer": lambda: nn.LayerNorm(dim, eps=1e-5),
        "batch": lambda: ChannelLastBatchNorm(dim),
        "none": lambda: nn.Identity(),
    }
    if name not in norms:
        raise ValueError(f"unknown norm {name!r}.{suggest(str(name), norms)}")
    return norms[name]()

"""Softmax attention over all tokens, for hybrids of scans and attention."""

import math

import torch
from timm.layers import Attention
from torch import nn

from ..registry import SCANS
from .sequence import SequenceScan, TokenLayout
from .walks import NoRouteError, Walk

_HEAD_DIM = 32


@SCANS.register_module(name=["attention", "AttentionScan"])
class AttentionScan(SequenceScan):
    """Multi-head softmax attention of every cell to every cell: no scan, and a cost that grows with their square.

    Args:
        dim: width C of input and output.
        heads: attention heads; ``"auto"`` makes them 32 wide, or as wide as `dim` allows.
    """

    def __init__(self, dim: int, *, heads: int | str = "auto"):
        super().__init__()
        self.dim = dim
        if heads == "auto":
            heads = dim // math.gcd(dim, _HEAD_DIM)
        if not isinstance(heads, int) or heads < 1 or dim % heads:
            raise ValueError(f"heads is 'auto' or divides the width, got {heads!r} for {dim} channels")
        self.attention: nn.Module = Attention(dim, num_heads=heads)

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`."""
        raise NoRouteError("attention lets every cell read every other one at once, in no order")

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """tokens: (B, T, dim). Returns the same shape; the layout makes no difference."""
        return self.attention(tokens)

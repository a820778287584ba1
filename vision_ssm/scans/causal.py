"""Adventurer's token mixer: Mamba-2 over the patches as one causal sequence that begins with their mean.

Paper: Causal Image Modeling for Efficient Visual Understanding, arXiv 2410.07599. Source of the mathematics:
github.com/wangf3014/Adventurer, commit a895f9ed, models_mamba.py; Mamba-2 itself is arXiv 2405.21060.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import CausalConv1d, RMSNorm
from ..ops.ssd import ssd
from ..registry import SCANS
from .core import SSD_CHUNK, decay_rate, initial_dt_bias
from .sequence import SequenceScan, TokenLayout
from .walks import Walk, raster_walk

_HEAD_DIM = 64


@SCANS.register_module(name=["causal", "CausalScan"])
class CausalScan(SequenceScan):
    """One causal Mamba-2 scan of the patches, behind a heading token that is the mean of all tokens (Adventurer).

    ``y = out_proj(norm(ssd(silu(conv(x)), silu(conv(b)), silu(conv(c)), dt) * silu(z)))`` with ``z, x, b, c, dt`` from
    `in_proj`; the output of the heading token is dropped. Class tokens are seen where they stand: a last one has seen
    every patch.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        head_dim: channels P of a head, each head with one decay and one step size; must divide D. ``"auto"`` is the
            largest divisor of D that divides 64 as well.
        conv_kernel: taps of the causal convolution.
        heading: put the mean of all tokens in front.
        reverse: walk the patches from the last to the first; class tokens keep their places.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 64,
        head_dim: int | str = "auto",
        conv_kernel: int = 4,
        heading: bool = True,
        reverse: bool = False,
    ):
        super().__init__()
        self.dim = dim
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if head_dim == "auto":
            head_dim = math.gcd(inner, _HEAD_DIM)
        if not isinstance(head_dim, int) or head_dim < 1 or inner % head_dim:
            raise ValueError(f"head_dim is 'auto' or divides the inner width {inner}, got {head_dim!r}")
        self.state_dim, self.heading, self.reverse = state_dim, heading, reverse
        self.heads = heads = inner // head_dim
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * state_dim + heads, bias=False)
        self.conv = CausalConv1d(inner + 2 * state_dim, conv_kernel)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        if self.reverse:
            tokens = _flip_patches(tokens, layout)
        if self.heading:
            tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 1 + T, C)
        tokens = self.mix(tokens)
        if self.heading:
            tokens = tokens[:, 1:]
        return _flip_patches(tokens, layout) if self.reverse else tokens

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`."""
        return [raster_walk(height, width, self.reverse)]

    def mix(self, tokens: torch.Tensor) -> torch.Tensor:
        """The Mamba-2 mixer alone. tokens: (B, T, C). Returns the same shape."""
        inner = self.out_proj.in_features
        z, xbc, dt = self.in_proj(tokens).split([inner, inner + 2 * self.state_dim, self.heads], dim=-1)
        x, b, c = self.conv(xbc).split([inner, self.state_dim, self.state_dim], dim=-1)
        y: torch.Tensor = ssd(  # type: ignore[assignment]  # one tensor, as no final states are asked for
            x.unflatten(-1, (self.heads, -1)),  # (B, T, D) -> (B, T, heads, P)
            dt,
            decay_rate(self.A_log),
            b.unsqueeze(2),  # (B, T, 1, N): all heads share B and C
            c.unsqueeze(2),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            chunk_size=SSD_CHUNK,
        )
        y = y.flatten(2)  # (B, T, D)
        y = y.to(torch.promote_types(y.dtype, torch.bfloat16)) * F.silu(z)  # float16 would be too narrow for products
        return self.out_proj(self.norm.normalise(y, z.dtype))


def _flip_patches(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The sequence (B, T, ...) with its patches in reverse order and its class tokens in place."""
    patches, class_tokens = layout.split(tokens)
    return layout.join(patches.flip(1), class_tokens)

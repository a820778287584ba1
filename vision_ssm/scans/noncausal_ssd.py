"""VSSD's mixer: Mamba-2 without a scan, and its causal forms.

Paper: VSSD: Vision Mamba with Non-Causal State Space Duality, arXiv 2407.18559. Source of the mathematics and of the
switches: github.com/YuHengsss/VSSD, commit 87b753b3, classification/models/mamba2.py.
"""

import math

import torch
from torch import nn

from ..layers import DepthwiseConv2d, LayerNorm, add_norm
from ..ops import noncausal_ssd, ssd
from ..ops.checks import check_map
from ..registry import SCANS, suggest
from .core import decay_rate, initial_dt_bias
from .walks import NoRouteError, Walk, raster_walk

_HEAD_DIM = 64
_ORDERS = ("none", "raster", "bidirectional")


@SCANS.register_module(name=["noncausal_ssd", "NonCausalSSD"])
class NonCausalSSD(nn.Module):
    """One state per head is summed over all cells, each with a weight of its own, and read back by every cell (VSSD).

    ``out_proj(norm(y) * z)`` where ``y[t] = C[t] @ S + D * x[t]`` and ``S = sum over t of w[t] * outer(B[t], x[t])``
    with ``w = softplus(dt + dt_bias) * exp(A_log)``; ``z, x, B, C, dt`` are parts of one projection, and x, B and C go
    through a depthwise 3x3 convolution and SiLU, which is all that knows where a cell lies. The gate has no activation.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per head and channel.
        heads: heads that share the inner width; ``"auto"`` makes them 64 wide, or as wide as the inner width allows.
        groups: groups of heads that share B and C, or ``"heads"``: every head has its own.
        order: ``"none"``: all cells see all cells. ``"raster"``: Mamba-2's scan of the raster, with its decays.
            ``"bidirectional"``: the same, the second half of the heads and groups from the other end.
        positive_weights: False turns the sign of w, for ``order="none"``.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 64,
        heads: int | str = "auto",
        groups: int | str = 1,
        order: str = "none",
        positive_weights: bool = True,
    ):
        super().__init__()
        self.dim = dim
        if order not in _ORDERS:
            raise ValueError(f"unknown order {order!r}.{suggest(str(order), _ORDERS)}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if heads == "auto":
            heads = inner // math.gcd(inner, _HEAD_DIM)
        if not isinstance(heads, int) or heads < 1 or inner % heads:
            raise ValueError(f"heads is 'auto' or divides the inner width, got {heads!r} for {inner} channels")
        groups = heads if groups == "heads" else groups
        if not isinstance(groups, int) or groups < 1 or heads % groups:
            raise ValueError(f"groups is 'heads' or divides the heads, got {groups!r} for {heads} heads")
        if order == "bidirectional" and groups % 2:
            raise ValueError(f"order 'bidirectional' gives either direction half of the groups, got groups={groups}")
        self.heads, self.groups, self.state_dim, self.order = heads, groups, state_dim, order
        self.positive_weights = positive_weights
        wide = inner + 2 * groups * state_dim
        self.sizes = [inner, wide, heads]
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = DepthwiseConv2d(wide, 3, act="silu")
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        z, mixed, dt = self.in_proj(x).split(self.sizes, dim=-1)
        mixed = self.conv(mixed).flatten(1, 2)  # (B, L, D + 2GN)
        states = self.groups * self.state_dim
        value, b, c = mixed.split([self.sizes[0], states, states], dim=-1)
        y = self.mix(
            value.unflatten(2, (self.heads, -1)),
            dt.flatten(1, 2),
            b.unflatten(2, (self.groups, -1)),
            c.unflatten(2, (self.groups, -1)),
        )  # (B, L, heads, P), float32: sums over all cells do not fit in float16
        y = add_norm(self.norm, y.reshape(z.shape))[1].to(z.dtype)
        return self.out_proj(y * z)

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`."""
        if self.order == "none":
            raise NoRouteError("noncausal_ssd sums one state over all cells at once, in no order")
        ways = (False, True) if self.order == "bidirectional" else (False,)
        return [raster_walk(height, width, reverse) for reverse in ways]

    def mix(self, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (B, L, heads, P); dt: (B, L, heads), raw; b, c: (B, L, groups, N).

        Returns (B, L, heads, P) in float32 (float64 for float64 input).
        """
        rate = decay_rate(self.A_log)
        options = dict(D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        if self.order == "none":
            return noncausal_ssd(x, dt, rate if self.positive_weights else -rate, b, c, **options)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.order == "raster":
            return ssd(x, dt, rate, b, c, **options)
        x, dt, b, c = (_turn_half(part) for part in (x, dt, b, c))
        return _turn_half(ssd(x, dt, rate, b, c, **options))


def _turn_half(values: torch.Tensor) -> torch.Tensor:
    """(B, L, heads or groups, ...) with the second half of them in reversed order of the cells."""
    forwards, backwards = values.chunk(2, dim=2)
    return torch.cat([forwards, backwards.flip(1)], dim=2)

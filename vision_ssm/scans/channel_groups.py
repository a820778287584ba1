"""GroupMamba's modulated group layer: every group of channels is scanned along a route of its own.

Paper: GroupMamba: Efficient Group-Based Visual State Space Model, arXiv 2407.13772. Source of the mathematics:
github.com/Amshaker/GroupMamba, commit c1800ed2, classification/models/groupmamba.py. Gradients are the true ones on
maps of any shape; the original's are wrong for its two column routes wherever height and width differ.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import ChannelGate, DepthwiseConv2d, LayerNorm, add_norm, trunc_normal_
from ..ops.checks import check_map
from ..registry import SCANS
from .core import S6Core, resolve_dt_rank
from .routes import Routes, build_routes

_NORM_EPS = 1e-5


def _projection(groups: int, out_dim: int, dim: int) -> nn.Parameter:
    """Linear weights of all groups, (K, out_dim, dim)."""
    weight = nn.Parameter(torch.empty(groups, out_dim, dim))
    trunc_normal_(weight, std=0.02)
    return weight


def _project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: (B, L, K, C'), weight: (K, E, C'). Returns (B, L, K, E): every group by its own weight."""
    return torch.einsum("blkc,kec->blke", x, weight)


@SCANS.register_module(name=["channel_groups", "ChannelGroupsScan"])
class ChannelGroupsScan(nn.Module):
    """Selective scan of K groups of channels, each along one route, then channel affinity (GroupMamba).

    ``n = norm(x)``; its K groups run through gated mixers as in `MultiDirectionScan`, with one route each, to m; then
    ``y = proj(norm(m * n * skip_scale * affinity(n)))``. The norm is one and the same module; the affinity is that of a
    `ChannelGate`. All groups are computed together.

    Args:
        dim: width C of input and output, a multiple of K.
        expand: inner width D of a group = int(expand * C / K).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection of a group; ``"auto"`` is ceil(C / K / 16).
        routes: a route family, whose number of routes is the number of groups K.
        reduction: C over the inner width of the affinity.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        state_dim: int = 1,
        dt_rank: int | str = "auto",
        routes: str | dict | list | Routes = "cross",
        reduction: int = 16,
    ):
        super().__init__()
        self.dim = dim
        family = build_routes(routes)
        self.groups = family.num_routes
        if len(family.make_tables(1, 1)) > 1:
            raise ValueError(f"routes of channel groups run side by side, but {family} is a cascade")
        if dim % self.groups:
            raise ValueError(f"dim must be a multiple of the {self.groups} routes of {family}, got {dim}")
        width = dim // self.groups
        inner = int(expand * width)
        if inner < 1 or reduction < 1:
            raise ValueError(
                f"expand * dim / {self.groups} and reduction must be at least 1, got {expand} * {width} and {reduction}"
            )
        self.norm = LayerNorm(dim, eps=_NORM_EPS)
        self.affinity = ChannelGate(dim, reduction, norm="none", act="relu")
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.in_proj_weight = _projection(self.groups, 2 * inner, width)
        self.conv = DepthwiseConv2d(self.groups * inner, 3, act="silu")
        self.core = S6Core(inner, family, state_dim, resolve_dt_rank(dt_rank, width))
        self.out_norm_weight = nn.Parameter(torch.ones(self.groups, inner))
        self.out_norm_bias = nn.Parameter(torch.zeros(self.groups, inner))
        self.out_proj_weight = _projection(self.groups, width, inner)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        n = add_norm(self.norm, x)[1]
        scale = self.skip_scale * self.affinity.gate(n.flatten(1, 2))  # (B, 1, dim)
        m = self.mix_groups(n) * n * scale.unsqueeze(1)
        return self.proj(add_norm(self.norm, m)[1])

    def mix_groups(self, n: torch.Tensor) -> torch.Tensor:
        """n: (B, H, W, dim). Returns the outputs of all groups side by side, (B, H, W, dim)."""
        batch, height, width, dim = n.shape
        slices = n.reshape(batch, height * width, self.groups, dim // self.groups)
        h = _project(slices, self.in_proj_weight)  # (B, L, K, 2D)
        h, z = h.chunk(2, dim=-1)  # each (B, L, K, D)
        h = self.conv(h.flatten(2).unflatten(1, (height, width))).view(h.shape)
        (table,) = self.core.routes.tables(height, width, n.device)
        y = self.core.scan_routes(h, table, merge=False)  # (B, L, K, D), float32
        y = F.layer_norm(y, y.shape[-1:], eps=_NORM_EPS) * self.out_norm_weight + self.out_norm_bias
        return _project(y.to(h.dtype) * F.silu(z), self.out_proj_weight).reshape(batch, height, width, dim)

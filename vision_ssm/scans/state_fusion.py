"""Spatial-Mamba's mixer: one scan, whose states are mixed with those of neighbouring cells before they are read.

Paper: Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion, arXiv 2410.15091. Source of
the mathematics: github.com/EdwardChasel/Spatial-Mamba (Apache-2.0), classification/models/spatialmamba.py.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import DepthwiseConv2d, LayerNorm, add_norm
from ..ops.checks import check_map
from ..ops.scan_2d import scan_2d
from ..ops.state_fusion import state_fusion
from ..registry import SCANS
from .core import S6Core, decay_rate, resolve_dt_rank
from .routes import Routes, build_routes


class StateFusionCore(S6Core):
    """Selective scan of one state per channel along one route, and state fusion in front of the read-out.

    Beside the parameters of `S6Core`, ``kernels`` (3, dim, 3, 3) for the dilations 1, 3 and 5, and ``alpha`` (3).
    """

    def __init__(self, dim: int, routes: Routes, dt_rank: int):
        super().__init__(dim, routes, state_dim=1, dt_rank=dt_rank)
        self.kernels = nn.Parameter(torch.ones(3, dim, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape in float32 at least, or normalised."""
        height, width = x.shape[1:3]
        (table,) = self.routes.tables(height, width, x.device)
        tokens = x.flatten(1, 2)  # (B, L, D)
        projected = F.linear(tokens, self.x_proj_weight[0]).unsqueeze(2)  # (B, L, 1, R + 2)
        low_rank, b, c = projected.split([self.dt_rank, 1, 1], dim=-1)
        states = scan_2d(
            tokens,
            low_rank,
            decay_rate(self.A_log),
            b,
            torch.ones_like(c),  # the output is the state itself
            read=table.read,
            write=table.write,
            dt_weight=self.dt_proj_weight,
            dt_bias=self.dt_proj_bias,
            segment=table.segment,
        )
        c = c.reshape(*x.shape[:3], 1)
        y = state_fusion(states.view(x.shape), self.kernels, self.alpha, c, self.D[0], x)
        return y if norm is None else add_norm(norm, y)[1]


@SCANS.register_module(name=["state_fusion", "StateFusionScan"])
class StateFusionScan(nn.Module):
    """One raster scan whose states are fused with those of neighbouring cells by dilated convolutions (Spatial-Mamba).

    ``y = out_norm(fuse(scan(silu(conv(x)))))``, gated by ``silu(z)`` and projected back, with ``x, z = in_proj(...)``.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        route: a route family of one route.
        conv_kernel: odd size of the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        dt_rank: int | str = "auto",
        route: str | dict = "raster",
        conv_kernel: int = 3,
    ):
        super().__init__()
        self.dim = dim
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if conv_kernel < 1 or conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, so that the map keeps its size; got {conv_kernel}")
        routes = build_routes(route)
        if routes.num_routes != 1:
            raise ValueError(f"states of one route can be fused, but {route!r} has {routes.num_routes}; try 'raster'")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv2d(inner, conv_kernel, act="silu")
        self.core = StateFusionCore(inner, routes, resolve_dt_rank(dt_rank, dim))
        self.out_norm = LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        h, z = self.in_proj(x).chunk(2, dim=-1)  # each (B, H, W, D)
        h = self.conv(h)
        y = self.core(h, norm=self.out_norm).to(h.dtype)
        return self.out_proj(y * F.silu(z))

"""PlainMamba's continuous scan, in the form of PlainMamba and in that of VCMamba.

Papers: PlainMamba, arXiv 2403.17695; VCMamba, arXiv 2509.04669. Sources of the mathematics:
github.com/ChenhongyiYang/PlainMamba, commit 0975a1d, mmcls/plain_mamba_dev, and github.com/Wertyuui345/VCMamba, commit
f8795a0, model/plain_mamba_layer.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import (
    ChannelLastBatchNorm,
    ChannelLastConv2d,
    DepthwiseConv2d,
    LayerNorm,
    get_activation,
    get_norm,
    is_plain,
    trunc_normal_,
)
from ..ops.checks import check_map
from ..ops.scan_2d import scan_2d
from ..registry import SCANS, suggest
from .core import RouteCore, decay_rate, initial_dt_bias, resolve_dt_rank, unpack
from .routes import RouteTable, Snake

_MOVES = 5
_INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class MoveTable(RouteTable):
    """Routes whose steps go from a cell to its neighbour.

    Attributes:
        step: (K, H*W) int64, the step at which route k visits a cell.
        move: (K, H*W) int64, the move by which route k gets to a cell: 0 none (it starts there), 1 right, 2 left, 3 up,
            4 down.
    """

    step: torch.Tensor
    move: torch.Tensor

    def to(self, device: torch.device | str) -> "MoveTable":
        order = self.read.to(device)
        return MoveTable(order, order, step=self.step.to(device), move=self.move.to(device))


class DirectedSnake(Snake):
    """The snake's routes with the moves that they make."""

    def make_tables(self, height, width, device=None):
        order = self.orders(height, width, device)
        step = order.argsort(dim=1)  # the inverse permutation
        down, right = (order // width).diff(dim=1), (order % width).diff(dim=1)  # (4, H*W - 1)
        move = torch.where(right > 0, 1, torch.where(right < 0, 2, torch.where(down < 0, 3, 4)))
        return [MoveTable(order, order, step=step, move=F.pad(move, (1, 0)).gather(1, step))]


class ContinuousCore(RouteCore):
    """Selective scan along the snake's four routes, all with the same weights, that is told of every move.

    Args:
        dim: channels D of the scanned map.
        state_dim: states N per channel.
        dt_rank: rank R of the step-size projection.
        parameters: whose step sizes, B and C step t of a route uses: those of cell t in raster order (``"raster"``) or
            those of the cell that it visits (``"token"``).
        init: ``"mamba"`` (decays 1..N, step sizes log-uniform in [1e-3, 0.1]) or ``"trunc_normal"`` (the same decays,
            projections from a normal distribution of deviation 0.02, step sizes of softplus(0)).
    """

    def __init__(self, dim: int, state_dim: int, dt_rank: int, parameters: str = "raster", init: str = "mamba"):
        super().__init__(dim, DirectedSnake())
        for name, value, choices in (
            ("parameters", parameters, ("raster", "token")),
            ("init", init, ("mamba", "trunc_normal")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}.{suggest(str(value), choices)}")
        self.state_dim, self.dt_rank, self.parameters_of = state_dim, dt_rank, parameters
        self.x_proj_weight = nn.Parameter(torch.empty(dt_rank + 2 * state_dim, dim))
        self.dt_proj_weight = nn.Parameter(torch.empty(dim, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.zeros(dim))
        self.A_log = nn.Parameter(torch.arange(1, state_dim + 1, dtype=torch.float32).log().expand(dim, -1).clone())
        self.D = nn.Parameter(torch.ones(dim))
        self.direction_bias = nn.Parameter(torch.empty(_MOVES, state_dim))
        trunc_normal_(self.direction_bias, std=_INITIAL_STD)
        if init == "mamba":
            nn.init.uniform_(self.x_proj_weight, -(dim**-0.5), dim**-0.5)
            nn.init.uniform_(self.dt_proj_weight, -(dt_rank**-0.5), dt_rank**-0.5)
            self.dt_proj_bias.data = initial_dt_bias(dim) / 2  # because it counts twice
        else:
            trunc_normal_(self.x_proj_weight, std=_INITIAL_STD)
            trunc_normal_(self.dt_proj_weight, std=_INITIAL_STD)

    def scan(  # type: ignore[override]  # its routes make these tables
        self, x: torch.Tensor, table: MoveTable, norm: nn.LayerNorm | None = None
    ) -> torch.Tensor:
        return self.scan_projected(x, F.linear(x, self.x_proj_weight), table, norm)

    def scan_projected(
        self, x: torch.Tensor, projected: torch.Tensor, table: MoveTable, norm: nn.LayerNorm | None = None
    ) -> torch.Tensor:
        """`scan` with given projections.

        Args:
            x: (B, L, D).
            projected: (B, L, R+2N), low-rank step sizes, B and C of the cells in raster order.
            table: the routes.
            norm: normalises the merged output.

        Returns:
            (B, L, D), float32 (float64 for float64 input) without a norm.
        """
        routes, cells = table.read.shape
        if self.parameters_of == "raster":  # the cell of step t gets what cell t projects to
            projected = projected.index_select(1, table.step.t().flatten()).unflatten(1, (cells, routes))
        else:
            projected = projected.unsqueeze(2)  # (B, L, 1 or K, R+2N)
        # added to all columns, so that the three parts still lie side by side
        bias = F.pad(self.direction_bias, (self.dt_rank, self.state_dim))[table.move.t()]  # (L, K, R+2N)
        low_rank, b, c = unpack(projected + bias, [self.dt_rank, self.state_dim, self.state_dim])
        options: dict[str, Any] = {}
        if norm is not None:
            options = dict(norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps)
        return scan_2d(
            x,
            low_rank,
            decay_rate(self.A_log).expand(routes, -1, -1),
            b,
            c,
            self.D.expand(routes, -1),
            read=table.read,
            write=table.write,
            dt_weight=self.dt_proj_weight.expand(routes, -1, -1),
            dt_bias=2 * self.dt_proj_bias.expand(routes, -1),  # the originals add it in the projection and in the scan
            **options,
        )


def _projection(name: str, dim: int, out_dim: int, bias: bool) -> nn.Module:
    if name == "linear":
        return nn.Linear(dim, out_dim, bias=bias)
    if name == "conv_norm":
        return nn.Sequential(ChannelLastConv2d(dim, out_dim, 1, bias=bias), ChannelLastBatchNorm(out_dim))
    raise ValueError(f"unknown projection {name!r}.{suggest(str(name), ('linear', 'conv_norm'))}")


@SCANS.register_module(name=["continuous", "ContinuousScan"])
class ContinuousScan(nn.Module):
    """Selective scan along four snake routes of neighbouring cells, each step told of its direction (PlainMamba).

    ``y = out_act(out_norm(scan(silu(conv(in_proj(x))))))``, gated by ``silu(z)``, then projected back. The routes share
    all weights. At each step a learned vector of the move right, left, up or down that led there is added to B.
    Defaults are PlainMamba's; VCMamba has ``gate=False, projection="conv_norm", out_norm="layer", out_act="relu"``.
    The initialisation of both is ``init="trunc_normal"``.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        conv_kernel: odd size of the depthwise convolution.
        conv_bias: whether that convolution has a bias.
        gate: multiply the output by a second half of the input projection, through SiLU.
        projection: ``"linear"``, or ``"conv_norm"`` (1x1 convolution and batch norm), in front and behind.
        bias: whether the projections have biases.
        out_norm: ``"none"`` or another norm of the merged output, see `get_norm`.
        out_act: activation of the normalised output.
        parameters: whose step sizes, B and C a step uses. ``"raster"``: at step t of every route, those of cell t in
            raster order, as all published weights need it. ``"token"``: those of the cell that it visits, as the
            PlainMamba paper describes it.
        init: initialisation of the core, see `ContinuousCore`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        conv_kernel: int = 7,
        conv_bias: bool = True,
        gate: bool = True,
        projection: str = "linear",
        bias: bool = True,
        out_norm: str = "none",
        out_act: str = "identity",
        parameters: str = "raster",
        init: str = "mamba",
    ):
        super().__init__()
        self.dim = dim
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if conv_kernel < 1 or conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, so that the map keeps its size; got {conv_kernel}")
        self.gate = gate
        self.in_proj = _projection(projection, dim, 2 * inner if gate else inner, bias)
        self.conv = DepthwiseConv2d(inner, conv_kernel, bias=conv_bias, act="silu")
        self.core = ContinuousCore(inner, state_dim, resolve_dt_rank(dt_rank, dim), parameters, init)
        self.out_norm = get_norm(out_norm, inner)
        self.out_act = get_activation(out_act)
        self.out_proj = _projection(projection, inner, dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        h = self.in_proj(x)
        if self.gate:
            h, z = h.chunk(2, dim=-1)  # each (B, H, W, D)
        h = self.conv(h)
        if is_plain(self.out_norm, LayerNorm):
            y = self.core(h, norm=self.out_norm).to(h.dtype)
        else:
            y = self.out_norm(self.core(h)).to(h.dtype)
        y = self.out_act(y)
        if self.gate:
            y = y * F.silu(z)
        return self.out_proj(y)

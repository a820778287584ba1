"""State-space cores: input-dependent parameters, a scan along routes, and the merge. No projections around them.

The S6 core is Mamba's selective scan (arXiv 2312.00752) along the routes of VMamba (arXiv 2401.10166); the SSD core
is Mamba-2's scan with one scalar decay per head (arXiv 2405.21060).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.plain import add_up
from ..ops.registration import are_replaced, is_transformed
from ..ops.scan_2d import scan_2d
from ..ops.ssd import ssd
from .routes import Routes, RouteTable

_NORM_EPS = 1e-5
SSD_CHUNK = 32  # measured on a CPU: as fast as 16, a quarter faster than 64 at the head widths of these models


def resolve_dt_rank(dt_rank: int | str, dim: int) -> int:
    """Rank of the step-size projection: ``"auto"`` is ceil(dim / 16)."""
    if dt_rank == "auto":
        return math.ceil(dim / 16)
    if not isinstance(dt_rank, int) or dt_rank < 1:
        raise ValueError(f"dt_rank is 'auto' or a positive whole number, got {dt_rank!r}")
    return dt_rank


def initial_dt_bias(*shape: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> torch.Tensor:
    """Bias whose softplus is log-uniform in [low, high]: Mamba's initial step sizes."""
    drawn = torch.rand(shape)
    if drawn.is_meta:  # no values, but what follows would take time
        return drawn
    step = torch.exp(drawn * (math.log(high) - math.log(low)) + math.log(low)).clamp_(min=floor)
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def decay_rate(log_rate: torch.Tensor) -> torch.Tensor:
    """-exp(log_rate), in float32 at least: half precision would round the decays of a whole image's length."""
    return -torch.exp(log_rate.to(torch.promote_types(log_rate.dtype, torch.float32)))


class _Unpack(torch.autograd.Function):
    """Splits the last axis. Gradients that lie side by side in one tensor, as kernels leave them, are not copied."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return packed.split(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *parts: torch.Tensor) -> tuple[torch.Tensor, None]:
        first, place = parts[0], parts[0].data_ptr()
        width = sum(part.shape[-1] for part in parts)
        for part in parts:
            if part.stride() != first.stride() or part.stride(-2) != width or part.data_ptr() != place:
                return torch.cat(parts, dim=-1), None
            place += part.shape[-1] * part.element_size()
        return first.as_strided((*first.shape[:-1], width), first.stride()), None


def unpack(packed: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """`packed` (..., P) split into parts of `sizes` along its last axis, as views."""
    traced = torch.compiler.is_compiling() or is_transformed()
    if traced or not (torch.is_grad_enabled() and packed.requires_grad):
        return packed.split(sizes, dim=-1)
    return _Unpack.apply(packed, sizes)


class RouteCore(nn.Module):
    """Runs `scan` for every table of the routes; a cascade normalises the map before each of its tables."""

    def __init__(self, dim: int, routes: Routes):
        super().__init__()
        self.dim = dim
        self.routes = routes

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the sum over routes, (B, H, W, dim), float32 (float64 for float64 input).

        With a `norm` over the channels, the normalised sum.
        """
        rows, columns = x.shape[1:3]
        bottom, right = -rows % self.routes.multiple, -columns % self.routes.multiple
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        batch, height, width, dim = x.shape
        tables = self.routes.tables(height, width, x.device)
        tokens = x.reshape(batch, height * width, dim)  # (B, L, D)
        for table in tables:
            if len(tables) > 1:
                tokens = F.layer_norm(tokens, (dim,), eps=_NORM_EPS)
            tokens = self.scan(tokens, table, norm if table is tables[-1] else None)
        merged = tokens.view(batch, height, width, dim)
        return merged[:, :rows, :columns] if bottom or right else merged

    def of_routes(self, name: str, table: RouteTable) -> torch.Tensor:
        """The part of a parameter (K, ...) that belongs to the routes of one table."""
        parameter: torch.Tensor = getattr(self, name)
        return parameter if table.read.shape[0] == parameter.shape[0] else parameter[table.routes]

    def scan(self, x: torch.Tensor, table: RouteTable, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """x: (B, L, dim). Returns the merged output of the table's routes, normalised by `norm`, (B, L, dim)."""
        raise NotImplementedError


class S6Core(RouteCore):
    """Selective scan along K routes, each with projections, step sizes, decays and skip of its own.

    Args:
        dim: channels D of the scanned map.
        routes: the routes, K in all.
        state_dim: states N per channel.
        dt_rank: rank R of the step-size projection.
        init: ``"mamba"`` (decays 1..N, step sizes log-uniform in [1e-3, 0.1]), ``"normal"`` (N(0, 1) decay logarithms,
            0.1 * N(0, 1) step sizes) or ``"uniform"`` (zeros, 0.1 * U(0, 1)): VMamba's v0, v1 and v2.
    """

    def __init__(self, dim: int, routes: Routes, state_dim: int, dt_rank: int, init: str = "mamba"):
        super().__init__(dim, routes)
        count, self.state_dim, self.dt_rank = routes.num_routes, state_dim, dt_rank
        self.x_proj_weight = _uniform(count, dt_rank + 2 * state_dim, dim, bound=dim**-0.5)
        if init == "mamba":
            decay = torch.arange(1, state_dim + 1, dtype=torch.float32).log().expand(count, dim, -1).clone()
            self.dt_proj_weight = _uniform(count, dim, dt_rank, bound=dt_rank**-0.5)
            bias = initial_dt_bias(count, dim)
        elif init == "normal":
            decay = torch.randn(count, dim, state_dim)
            self.dt_proj_weight = nn.Parameter(0.1 * torch.randn(count, dim, dt_rank))
            bias = 0.1 * torch.randn(count, dim)
        elif init == "uniform":
            decay = torch.zeros(count, dim, state_dim)
            self.dt_proj_weight = nn.Parameter(0.1 * torch.rand(count, dim, dt_rank))
            bias = 0.1 * torch.rand(count, dim)
        else:
            raise ValueError(f"init is 'mamba', 'normal' or 'uniform', got {init!r}")
        self.dt_proj_bias = nn.Parameter(bias)
        self.A_log = nn.Parameter(decay)
        self.D = nn.Parameter(torch.ones(count, dim))

    def scan(self, x: torch.Tensor, table: RouteTable, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        return self.scan_routes(x, table, norm)

    def scan_routes(
        self, x: torch.Tensor, table: RouteTable, norm: nn.LayerNorm | None = None, merge: bool = True
    ) -> torch.Tensor:
        """`scan` of maps that may differ from route to route, with outputs that may be kept apart.

        Args:
            x: (B, L, dim), or (B, L, K, dim) where every route has a map of its own.
            table: the routes.
            norm: normalises the merged output.
            merge: add the outputs of all routes.

        Returns:
            (B, L, dim), or (B, L, K, dim) if not `merge`; float32 (float64 for float64 input) without a norm.
        """
        weight = self.of_routes("x_proj_weight", table)
        # pointwise, so it commutes with the routes
        if x.dim() == 4:
            projected = torch.einsum("blkd,kpd->blkp", x, weight)  # (B, L, K, R+2N)
        else:
            projected = F.linear(x, weight.flatten(0, 1)).view(*x.shape[:2], *weight.shape[:2])  # (B, L, K, R+2N)
        low_rank, b, c = unpack(projected, [self.dt_rank, self.state_dim, self.state_dim])
        options = {} if norm is None else dict(norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps)
        return scan_2d(
            x,
            low_rank,
            decay_rate(self.of_routes("A_log", table)),
            b,
            c,
            self.of_routes("D", table),
            read=table.read,
            write=table.write,
            dt_weight=self.of_routes("dt_proj_weight", table),
            dt_bias=self.of_routes("dt_proj_bias", table),
            segment=table.segment,
            merge=merge,
            **options,
        )


class SSDCore(RouteCore):
    """Mamba-2 along K routes: `heads` heads of width P = dim / heads, each with one scalar decay and step size.

    The heads of a route share B and C. No step-size projection: the heads' step sizes are outputs of `x_proj_weight`.

    Args:
        dim: channels D of the scanned map.
        routes: the routes, K in all.
        state_dim: states N per head and channel.
        heads: heads R per route; must divide `dim`.
        init: ``"normal"`` or ``"uniform"``, as in `S6Core`.
    """

    def __init__(self, dim: int, routes: Routes, state_dim: int, heads: int, init: str = "uniform"):
        super().__init__(dim, routes)
        if dim % heads:
            raise ValueError(
                f"heads must divide the scanned width: {heads} heads for {dim} channels (a mixer's dt_rank sets them)"
            )
        count, self.state_dim, self.heads = routes.num_routes, state_dim, heads
        self.x_proj_weight = _uniform(count, heads + 2 * state_dim, dim, bound=dim**-0.5)
        if init == "normal":
            decay, bias = torch.randn(count, heads), 0.1 * torch.randn(count, heads)
        elif init == "uniform":
            decay, bias = torch.zeros(count, heads), 0.1 * torch.rand(count, heads)
        else:
            raise ValueError(f"init of the SSD core is 'normal' or 'uniform', got {init!r}")
        self.dt_proj_bias = nn.Parameter(bias)
        self.A_log = nn.Parameter(decay)
        self.D = nn.Parameter(torch.ones(count, heads, dim // heads))

    def scan(self, x: torch.Tensor, table: RouteTable, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        batch, length, dim = x.shape
        weight, (count, steps) = self.of_routes("x_proj_weight", table), table.read.shape
        projected = F.linear(x, weight.flatten(0, 1)).view(batch, length, count, -1)  # (B, L, K, R+2N)
        inputs = torch.cat([x.unsqueeze(2).expand(-1, -1, count, -1), projected], dim=-1)  # (B, L, K, D+R+2N)
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))  # routes are summed in float32
        # one gather brings every route's inputs into its order: (B, T, K, D+R+2N)
        walked = inputs.gather(1, table.read.t()[None, :, :, None].expand(batch, -1, -1, inputs.shape[-1]))
        segment = table.segment or steps
        walked = walked.reshape(batch * steps // segment, segment, count, -1)
        u, dt, b, c = walked.split([dim, self.heads, self.state_dim, self.state_dim], dim=-1)
        y: torch.Tensor = ssd(  # type: ignore[assignment]  # one tensor, as no final states are asked for
            u.reshape(-1, segment, count * self.heads, dim // self.heads),
            dt.reshape(-1, segment, count * self.heads),
            decay_rate(self.of_routes("A_log", table)).flatten(),
            b,
            c,
            D=self.of_routes("D", table).flatten(0, 1),
            dt_bias=self.of_routes("dt_proj_bias", table).flatten(),
            dt_softplus=True,
            chunk_size=SSD_CHUNK,
        )
        y = y.reshape(batch, steps, count, dim)
        if are_replaced():  # onnxscript takes an addition at all cells in their order for an assignment
            merged = add_up(y.transpose(1, 2), table.write, length, merge=True)
        else:
            merged = y.new_zeros(batch, length, dim)
            for k in range(count):  # one route at a time: each cell is written once per route, so sums keep one order
                merged.index_add_(1, table.write[k], y[:, :, k])
        return merged if norm is None else norm(merged)

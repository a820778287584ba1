"""LocalMamba's scans: rows, columns and windows of the map, forwards and backwards, each gated per channel.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv 2403.09338. Source of the mathematics:
github.com/hunto/LocalMamba (Apache-2.0), classification/lib/models/mamba/{multi_mamba,local_scan}.py.

A direction is ``"raster"`` (row by row), ``"column"`` or ``"windowK"`` (K x K windows in raster order, each of them row
by row), with ``"_reversed"`` for the whole walk from its end. Windows that reach over the edge of the map read zeros
there. These steps of padding belong to the walk: the state decays over them.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import CausalConv1d, ChannelGate, DepthwiseConv2d, LayerNorm
from ..ops.checks import check_map
from ..registry import SCANS, suggest
from .core import S6Core, resolve_dt_rank
from .routes import Routes, RouteTable, Unidirectional
from .sequence import CLASS_TOKENS, SequenceScan, TokenLayout

SEARCHED = tuple(f"{walk}{end}" for walk in ("raster", "column", "window2", "window7") for end in ("", "_reversed"))
"""The directions that LocalMamba chooses from."""
FIXED = ("raster", "raster_reversed", "window2", "window2_reversed")
"""The directions of LocalMamba without a search."""

_DIRECTION = re.compile(r"(raster|column|window([1-9]\d*))(_reversed)?")
_INVERSES = ("exact", "official")
_NORM_EPS = 1e-5


class DirectionRoutes(Routes):
    """Walks of one or more directions, each filled up at its end to the length of the longest.

    The number behind the last cell (and behind the class tokens) stands for a cell of zeros: steps of padding read it
    and write to it.

    Args:
        directions: names, see the module.
        inverse: ``"exact"`` puts every output where its input came from. ``"official"`` undoes a walk along columns as
            the original does: it reads the outputs as an H x W map and transposes that, which is right on square maps
            alone.
        class_tokens: class tokens, numbered behind the cells, that have this place in every walk, see `TokenLayout`.
    """

    def __init__(self, directions: Sequence[str], inverse: str = "exact", class_tokens: str = "none"):
        super().__init__()
        if isinstance(directions, str) or not directions:
            raise ValueError(f"directions is a list of one or more names, such as {FIXED}, got {directions!r}")
        for direction in directions:
            if not _DIRECTION.fullmatch(direction):
                raise ValueError(f"unknown direction {direction!r}.{suggest(direction, SEARCHED)}")
        if inverse not in _INVERSES:
            raise ValueError(f"inverse is 'exact' or 'official', got {inverse!r}")
        self.directions = tuple(directions)
        self.inverse = inverse
        self.class_tokens = class_tokens
        self.num_routes = len(self.directions)

    def route_names(self):
        return list(self.directions)

    def orders(self, height, width, device=None):
        return self._walks(height, width, device, self._reads)

    def make_tables(self, height, width, device=None):
        read = self.orders(height, width, device)
        write = read if self.inverse == "exact" else self._walks(height, width, device, self._transposed)
        return [RouteTable(read, write)]

    def _walks(self, height, width, device, cells_of) -> torch.Tensor:
        """(K, T): what `cells_of` says of every direction, with class tokens, filled up with the cell of zeros."""
        cells = height * width
        zeros = cells + len(TokenLayout(height, width, self.class_tokens).positions)
        class_tokens = torch.arange(cells, zeros, device=device)[None]
        walks = []
        for direction in self.directions:
            walk = cells_of(direction, torch.arange(cells, device=device).view(height, width), zeros)
            layout = TokenLayout(1, walk.shape[0], self.class_tokens)
            walks.append(layout.join(walk[None], class_tokens)[0])
        longest = max(walk.shape[0] for walk in walks)
        return torch.stack([F.pad(walk, (0, longest - walk.shape[0]), value=zeros) for walk in walks])

    @staticmethod
    def _reads(direction: str, grid: torch.Tensor, zeros: int) -> torch.Tensor:
        """Cells of `grid`, (H, W), in the order of a direction; padding is the cell `zeros`."""
        match = _DIRECTION.fullmatch(direction)
        assert match is not None  # directions are checked where routes are made
        walk, side, backwards = match.groups()
        if walk == "column":
            grid = grid.t()
        elif side is not None:
            side = int(side)
            grid = F.pad(grid, (0, -grid.shape[1] % side, 0, -grid.shape[0] % side), value=zeros)
            grid = grid.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)  # (H/K, W/K, K, K)
        order = grid.reshape(-1)
        return order.flip(0) if backwards else order

    @classmethod
    def _transposed(cls, direction: str, grid: torch.Tensor, zeros: int) -> torch.Tensor:
        """Where the original puts the outputs of a direction."""
        if direction.startswith("column"):
            grid = grid.reshape(grid.shape[1], grid.shape[0])
        return cls._reads(direction, grid, zeros)


class WindowedCore(S6Core):
    """`S6Core` along directions, whose outputs are gated per channel, each on its own, and added.

    Without `directions` it is the network in which LocalMamba searches them: all of `SEARCHED`, whose gated outputs are
    normalised and weighted by the softmax of the parameter ``direction_weights``.

    Args:
        dim: channels D of the scanned map.
        directions: names, see the module, or None.
        inverse: see `DirectionRoutes`.
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection.
    """

    def __init__(self, dim: int, directions: Sequence[str] | None, inverse: str, state_dim: int, dt_rank: int):
        routes = DirectionRoutes(SEARCHED if directions is None else directions, inverse)
        super().__init__(dim, routes, state_dim, dt_rank)
        self.gate = ChannelGate(dim)
        self.direction_weights = None
        if directions is None:
            self.direction_weights = nn.Parameter(1e-3 * torch.randn(routes.num_routes))

    def merge(self, y: torch.Tensor) -> torch.Tensor:
        """y: (B, L, K, D), outputs of the directions. Returns (B, L, D)."""
        y = self.gate(y)
        if self.direction_weights is None:
            return y.sum(dim=2)
        weights = self.direction_weights.to(y.dtype).softmax(dim=0)
        return (F.layer_norm(y, y.shape[-1:], eps=_NORM_EPS) * weights[:, None]).sum(dim=2)

    def scan(self, x: torch.Tensor, table: RouteTable, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        cells = x.shape[1]
        if table.read.shape[1] > cells:  # some direction reads the cell of zeros
            x = F.pad(x, (0, 0, 0, 1))
        merged = self.merge(self.scan_routes(x, table, merge=False)[:, :cells])
        return merged if norm is None else norm(merged)


def _inner_width(dim: int, expand: float) -> int:
    inner = int(expand * dim)
    if inner < 1:
        raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
    return inner


@SCANS.register_module(name=["windowed", "WindowedScan"])
class WindowedScan(nn.Module):
    """Rows, columns and K x K windows of the convolved map, each direction gated per channel (LocalVMamba).

    ``y = out_norm(sum of gated scans of silu(conv(x))) * silu(z)`` with ``x, z = in_proj(input)``, projected back. One
    depthwise convolution of the map precedes all directions.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        directions: names such as ``"column_reversed"`` or ``"window7"``, see the module; None: all of `SEARCHED`, mixed
            by learned weights.
        inverse: ``"exact"`` or, for weights trained on maps that are not square, ``"official"``; see `DirectionRoutes`.
        conv_kernel: odd size of the depthwise convolution.
        conv_bias: whether that convolution has a bias.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        directions: Sequence[str] | None = FIXED,
        inverse: str = "exact",
        conv_kernel: int = 3,
        conv_bias: bool = True,
    ):
        super().__init__()
        self.dim = dim
        inner = _inner_width(dim, expand)
        if conv_kernel < 1 or conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, so that the map keeps its size, got {conv_kernel}")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv2d(inner, conv_kernel, bias=conv_bias, act="silu")
        self.core = WindowedCore(inner, directions, inverse, state_dim, resolve_dt_rank(dt_rank, dim))
        self.out_norm = LayerNorm(inner, eps=_NORM_EPS)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        h, z = self.in_proj(x).chunk(2, dim=-1)  # each (B, H, W, D)
        h = self.conv(h)
        return self.out_proj(self.core(h, norm=self.out_norm).to(h.dtype) * F.silu(z))


@SCANS.register_module(name=["windowed_sequence", "WindowedSequenceScan"])
class WindowedSequenceScan(SequenceScan):
    """Rows, columns and K x K windows, each convolved along its walk and gated per channel (LocalVim).

    Every direction has a causal convolution of its own, which also sees steps of padding, and ends with a gate
    ``silu(z)`` and the gate of its channels. Class tokens keep their place in every walk, padding included.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        directions, inverse: as of `WindowedScan`.
        conv_width: taps of the causal convolutions.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        directions: Sequence[str] | None = FIXED,
        inverse: str = "exact",
        conv_width: int = 4,
    ):
        super().__init__()
        self.dim = dim
        inner = _inner_width(dim, expand)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.core = WindowedCore(inner, directions, inverse, state_dim, resolve_dt_rank(dt_rank, dim))
        routes = self.core.routes
        assert isinstance(routes, DirectionRoutes)
        count, names = routes.num_routes, routes.directions
        self.inverse = inverse
        self.conv = CausalConv1d(count * inner, conv_width)  # of all directions, side by side
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._walks = {place: DirectionRoutes(names, inverse, place) for place in CLASS_TOKENS}
        self._steps = Unidirectional(count)

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """tokens: (B, T, dim), class tokens at ``layout.positions``. Returns the same shape."""
        x, z = (torch.cat(layout.split(part), dim=1) for part in self.in_proj(tokens).chunk(2, dim=-1))
        batch, count, inner = x.shape  # cells of the map, then class tokens
        table = self._walks[layout.class_tokens].tables(layout.height, layout.width, x.device)[0]
        routes, steps = table.read.shape
        if steps > count:  # some direction reads the cell of zeros
            x = F.pad(x, (0, 0, 0, 1))
        x = x.index_select(1, table.read.t().reshape(-1)).view(batch, steps, routes * inner)
        x = self.conv(x).view(batch, steps, routes, inner)
        walk = RouteTable(self._steps.tables(1, steps, x.device)[0].read, table.write)
        y = self.core.scan_routes(x, walk, merge=False)[:, :count]  # (B, L + n, K, D)
        y = self.core.merge(y * F.silu(self._gates(z, table))).to(x.dtype)
        height, width = layout.height, layout.width
        return self.out_proj(layout.join(y[:, : height * width], y[:, height * width :]))

    def _gates(self, z: torch.Tensor, table: RouteTable) -> torch.Tensor:
        """z: (B, L, D) of the cells that were read. Returns it at the cells that are written, (B, L, 1 or K, D)."""
        if self.inverse == "exact":
            return z.unsqueeze(2)
        source = torch.zeros_like(table.read).scatter(1, table.write, table.read)[:, : z.shape[1]]  # (K, L)
        return z.index_select(1, source.t().reshape(-1)).view(z.shape[0], z.shape[1], -1, z.shape[2])

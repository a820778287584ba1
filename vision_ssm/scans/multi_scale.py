"""MSVMamba's multi-scale scan: one route sees the map, three see it at half resolution.

Paper: Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model, arXiv 2405.14174 (NeurIPS 2024). Source of
the mathematics: github.com/YuHengsss/MSVMamba, classification/models/vmamba.py of the branches master and v2.
"""

import torch
from torch.nn import functional as F

from ..layers import ChannelLastConv2d, LayerNorm, get_activation, is_plain
from ..registry import SCANS, suggest
from .multi_direction import MultiDirectionScan
from .routes import Routes, RouteTable
from .walks import Walk

_LOW_KERNEL = 7
_LOW_ROUTES = 3
_RESIZING = {"add_norm": "nearest", "norm_add": "bilinear"}


def _halved(side: int) -> int:
    return (side + 1) // 2


class _TwoScales(Routes):
    """One route over the cells of a map and one, three times as long, over the cells of its half-resolution map.

    Args:
        reverse_full: walk the map from its end.
        low_first: the half-resolution route is route 0, not route 1.
        unfolded: number the steps of the long route instead of the cells: its map is laid out by `lay_out`.
    """

    num_routes = 2

    def __init__(self, reverse_full: bool, low_first: bool, unfolded: bool):
        super().__init__()
        self.reverse_full, self.low_first, self.unfolded = reverse_full, low_first, unfolded

    def make_tables(self, height, width, device=None):
        """Table of the map, table of the half-resolution map."""
        cells = torch.arange(height * width, device=device)[None]
        rows, columns = _halved(height), _halved(width)
        if self.unfolded:
            steps = torch.arange(_LOW_ROUTES * rows * columns, device=device)[None]
        else:
            steps = self.lay_out(torch.arange(rows * columns, device=device).view(1, rows, columns))
        cells = cells.flip(-1) if self.reverse_full else cells
        return [RouteTable(cells, cells, first=int(self.low_first)), RouteTable(steps, steps, first=1 - self.low_first)]

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, ...) to (B, 3 * H * W, ...): rows (from the end, unless the full route is), columns, both ways."""
        rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
        return torch.cat([rows if self.reverse_full else rows.flip(1), columns, columns.flip(1)], dim=1)

    def fold(self, y: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, 3 * H * W, D), outputs along the long route, to their sum at every cell, (B, H, W, D)."""
        rows, columns, back = y.chunk(_LOW_ROUTES, dim=1)
        rows = rows if self.reverse_full else rows.flip(1)
        columns = (columns + back.flip(1)).unflatten(1, (width, height))  # (B, W, H, D)
        return rows.unflatten(1, (height, width)) + columns.transpose(1, 2)


@SCANS.register_module(name=["multi_scale", "MultiScaleScan"])
class MultiScaleScan(MultiDirectionScan):
    """One scan of the map and one long scan, along three routes, of its half-resolution map, added up (MSVMamba).

    A depthwise 7x7 convolution with stride 2 makes the half-resolution map beside the convolution of
    `MultiDirectionScan`. Its reversed rows, its columns and its reversed columns form one sequence with one set of
    weights: the state is carried from route to route.

    Args:
        dim: width C of input and output.
        merge: ``"add_norm"``: the half-resolution output is enlarged by nearest neighbours, added, and the sum goes
            through `out_norm`. ``"norm_add"``: both outputs go through `out_norm`, token by token, and the
            half-resolution one is then put on its map, enlarged bilinearly and added. Scan weights are stored in the
            order of the code that published each form: map, half-resolution map in the first; the other way round in
            the second.
        reverse_full: walk the map from its end, and the rows of the half-resolution map from their start.
        expand, state_dim, dt_rank, conv_kernel, conv_bias, act, gate, gate_act, out_norm: see `MultiDirectionScan`;
            `conv_bias` and `act` hold for both convolutions.
        channel_gate, out_act, dropout, init: see `MultiDirectionScan`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        state_dim: int = 1,
        dt_rank: int | str = "auto",
        merge: str = "add_norm",
        reverse_full: bool = False,
        conv_kernel: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
        gate: bool = False,
        gate_act: bool = True,
        out_norm: str = "layer",
        channel_gate: bool = True,
        out_act: bool = False,
        dropout: float = 0.0,
        init: str | None = None,
    ):
        if merge not in _RESIZING:
            raise ValueError(f"unknown merge {merge!r}.{suggest(str(merge), _RESIZING)}")
        norm_first = merge == "norm_add"
        if norm_first and out_norm != "layer":
            raise ValueError(f"merge='norm_add' normalises tokens by themselves: out_norm is 'layer', got {out_norm!r}")
        super().__init__(
            dim,
            expand=expand,
            state_dim=state_dim,
            dt_rank=dt_rank,
            routes=_TwoScales(reverse_full, low_first=norm_first, unfolded=norm_first),
            conv_kernel=conv_kernel,
            conv_bias=conv_bias,
            act=act,
            gate=gate,
            gate_act=gate_act,
            out_norm=out_norm,
            channel_gate=channel_gate,
            out_act=out_act,
            dropout=dropout,
            init=init,
        )
        self.norm_first, self.resizing = norm_first, _RESIZING[merge]
        inner = self.core.dim
        self.low_conv = ChannelLastConv2d(
            inner, inner, _LOW_KERNEL, stride=2, padding=_LOW_KERNEL // 2, groups=inner, bias=conv_bias
        )
        self.low_act = get_activation(act)

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`: the walk over the map, and three over its half-resolution map that pass their state on."""
        routes, rows, columns = self.core.routes, _halved(height), _halved(width)
        assert isinstance(routes, _TwoScales)
        full = routes.tables(height, width)[0].read[0]
        passes = routes.lay_out(torch.arange(rows * columns).view(1, rows, columns))[0].chunk(_LOW_ROUTES)
        titles = [f"half resolution, pass {number} of {_LOW_ROUTES}" for number in range(1, _LOW_ROUTES + 1)]
        low = [Walk(title, rows, columns, order) for title, order in zip(titles, passes)]
        return [Walk("full resolution", height, width, full), *low]

    def scan(self, h: torch.Tensor) -> torch.Tensor:
        full, low = self.conv(h), self.low_act(self.low_conv(h))  # (B, H, W, D), (B, ceil(H/2), ceil(W/2), D)
        routes = self.core.routes
        assert isinstance(routes, _TwoScales)
        full_table, low_table = routes.tables(full.shape[1], full.shape[2], h.device)
        if self.norm_first:
            y = self._normed_scan(full.flatten(1, 2), full_table)
            low_y = routes.fold(self._normed_scan(routes.lay_out(low), low_table), *low.shape[1:3])
            return y.view(full.shape) + self._enlarged(low_y, full)
        y = self.core.scan_routes(full.flatten(1, 2), full_table)
        low_y = self.core.scan_routes(low.flatten(1, 2), low_table)
        return self.out_norm(y.view(full.shape) + self._enlarged(low_y.view(low.shape), full)).to(full.dtype)

    def _normed_scan(self, tokens: torch.Tensor, table: RouteTable) -> torch.Tensor:
        """(B, T, D) to the same shape and dtype."""
        if is_plain(self.out_norm, LayerNorm):
            return self.core.scan_routes(tokens, table, self.out_norm).to(tokens.dtype)
        return self.out_norm(self.core.scan_routes(tokens, table)).to(tokens.dtype)

    def _enlarged(self, y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(B, H', W', D) at the height and width of the map `like`."""
        return F.interpolate(y.permute(0, 3, 1, 2), size=like.shape[1:3], mode=self.resizing).permute(0, 2, 3, 1)

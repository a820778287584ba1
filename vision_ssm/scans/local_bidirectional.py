"""LBMamba's mixer: one scan of the raster that also looks ahead inside short windows.

Paper: LBMamba: Locally Bi-directional Mamba, arXiv 2506.15976. Source of the mathematics:
github.com/cvlab-stonybrook/LBMamba, commit 52155516.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import CausalConv1d
from ..ops.local_selective_scan import local_scan
from ..registry import SCANS
from .core import S6Core, decay_rate, resolve_dt_rank, unpack
from .routes import build_routes
from .sequence import SequenceScan, TokenLayout
from .walks import Walk, raster_walk


class _LocalCore(S6Core):
    """The S6 core of one route, whose scan looks ahead in windows."""

    def __init__(self, dim: int, state_dim: int, dt_rank: int, window: int | None, reverse: bool):
        super().__init__(dim, build_routes("reversed" if reverse else "raster"), state_dim, dt_rank)
        self.window, self.reverse = window, reverse

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """x: (B, T, dim). Returns the same shape, float32 (float64 for float64 input)."""
        x = x.unsqueeze(2)  # (B, T, 1, dim)
        low_rank, b, c = unpack(F.linear(x, self.x_proj_weight[0]), [self.dt_rank, self.state_dim, self.state_dim])
        y = local_scan(
            x,
            low_rank,
            decay_rate(self.A_log),
            b,
            c,
            self.D,
            dt_weight=self.dt_proj_weight,
            dt_bias=self.dt_proj_bias,
            window=self.window,
            reverse=self.reverse,
        )
        return y.squeeze(2)


@SCANS.register_module(name=["local_bidirectional", "LocalBidirectionalScan"])
class LocalBidirectionalScan(SequenceScan):
    """Raster scanned once, each step also seeing those behind it in its window (LBMamba).

    ``y = scan(silu(conv(x))) * silu(z)`` with ``x, z = in_proj(u)``, then projected back. Class tokens are steps of the
    sequence like any other.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        conv_width: taps of the causal convolution.
        window: steps of a window; None: 4, 8 or 16, depending on the length of the sequence as in the published
            kernels. Fix it to run trained weights at another image size.
        reverse: walk the sequence from its end, windows counted from there.
        both: add a scan of all of the sequence the other way, with a convolution and parameters of its own, that does
            not look ahead.
        average: halve the sum of `both`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        conv_width: int = 4,
        window: int | None = None,
        reverse: bool = False,
        both: bool = False,
        average: bool = False,
    ):
        super().__init__()
        self.dim = dim
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window is a positive whole number or None, got {window!r}")
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CausalConv1d(inner, conv_width, reverse=reverse)
        self.core = _LocalCore(inner, state_dim, resolve_dt_rank(dt_rank, dim), window, reverse)
        self.average = both and average
        self.other_conv = CausalConv1d(inner, conv_width, reverse=not reverse) if both else None
        self.other_core = _LocalCore(inner, state_dim, resolve_dt_rank(dt_rank, dim), 1, not reverse) if both else None
        if self.other_core is not None:
            nn.init.zeros_(self.other_core.dt_proj_bias)  # as of Vim's second direction
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`."""
        window = "" if self.core.window is None else f" of {self.core.window} steps"
        main = raster_walk(height, width, self.core.reverse)
        walks = [replace(main, title=f"{main.title}, looking ahead in windows{window}")]
        return walks if self.other_core is None else [*walks, raster_walk(height, width, self.other_core.reverse)]

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # each (B, T, D)
        y = self.core(self.conv(x))
        if self.other_conv is not None and self.other_core is not None:
            y = y + self.other_core(self.other_conv(x))
        return self.out_proj((y / 2 if self.average else y).to(z.dtype) * F.silu(z))

"""Vim's mixer: the raster as one sequence, scanned from both ends.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, arXiv 2401.09417.
Source of the mathematics: github.com/hustvl/Vim (Apache-2.0), mamba-1p1p1 and vim/models_mamba.py.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import CausalConv1d
from ..registry import SCANS, suggest
from .core import S6Core, resolve_dt_rank
from .routes import build_routes
from .sequence import SequenceScan, TokenLayout

_ROUTES: dict[str, str | dict] = {
    "both": dict(type="bidirectional", repeats=1),
    "shared": dict(type="bidirectional", repeats=1),
    "forward": "raster",
    "backward": "reversed",
}


class _SharedCore(S6Core):
    """Both directions have the projections and the skip of the first; only the decays are their own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "D"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[:1].clone()))

    def of_routes(self, name, table):
        parameter = getattr(self, name)
        return parameter.expand(table.read.shape[0], *parameter.shape[1:])


@SCANS.register_module(name=["bidirectional", "BidirectionalScan"])
class BidirectionalScan(SequenceScan):
    """Raster scanned from both ends, each with a causal convolution and parameters of its own (Vim).

    ``y = sum over directions of scan(silu(conv(x)))``, times ``silu(z)``, with ``x, z = in_proj(u)``; then projected
    back. Class tokens are steps of the sequence like any other.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(dim / 16).
        conv_width: taps of the causal convolutions.
        directions: ``"both"``; ``"shared"``, both with one convolution, projection and skip, so that only the decays
            differ; ``"forward"`` or ``"backward"``, one direction alone.
        average: halve the sum of both directions.
        layer_scale: initial value of a learned factor per channel of the output; None: no factor.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        conv_width: int = 4,
        directions: str = "both",
        average: bool = False,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.dim = dim
        if directions not in _ROUTES:
            raise ValueError(f"unknown directions {directions!r}.{suggest(str(directions), _ROUTES)}")
        if average and directions not in ("both", "shared"):
            raise ValueError(f"average is the mean of two directions, there is one: directions={directions!r}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        self.average = average
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        ways = {"both": (False, True), "backward": (True,)}.get(directions, (False,))
        self.convs = nn.ModuleList([CausalConv1d(inner, conv_width, reverse=reverse) for reverse in ways])
        core = _SharedCore if directions == "shared" else S6Core
        self.core = core(inner, build_routes(_ROUTES[directions]), state_dim, resolve_dt_rank(dt_rank, dim))
        if directions == "both":
            with torch.no_grad():
                self.core.dt_proj_bias[1].zero_()  # the original gives Mamba's initial step sizes to the first alone
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # each (B, T, D)
        x = torch.stack([conv(x) for conv in self.convs], dim=2) if len(self.convs) > 1 else self.convs[0](x)
        (table,) = self.core.routes.tables(1, tokens.shape[1], tokens.device)
        y = self.core.scan_routes(x, table).to(z.dtype) * F.silu(z)  # every direction has the same gate
        y = self.out_proj(y / 2 if self.average else y)
        return y if self.layer_scale is None else y * self.layer_scale

"""MHS-VM's token mixer: heads of channels, each scanned along routes of its own shape, merged by how routes disagree.

Paper: MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, arXiv 2406.05992. Source of the mathematics:
github.com/PixDeep/MHS-VM, commit be64b6fa, models/vmunet.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import DepthwiseConv2d, LayerNorm
from ..ops.checks import check_map
from ..registry import SCANS
from .core import S6Core, resolve_dt_rank
from .routes import Routes, build_routes

_NORM_EPS = 1e-5
_SPREAD_EPS = 1e-5
# heads of the original by the letters of its parameters' names, in its order
_OFFICIAL_HEADS = {"C": "snake_pair", "X": "diagonal_pair", "S": "spiral_pair", "Z": "raster_pair"}


def route_attention(y: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """Sum over routes, weighted at every position and channel by how far the routes disagree there.

    The weight is ``relu(std / (mean - min + 1e-5) - threshold)``, with the unbiased standard deviation. Thresholds up
    to 2/3 subtract a constant from the weight for four routes, whose quotient lies between 2/3 and 2.

    Args:
        y: (..., K, D), outputs of K routes.
        threshold: see above.

    Returns:
        (..., D).
    """
    # from the differences: routes agree to many digits at first, and a mean of the values themselves would round those
    # away that matter, to gradients of noise that grow a hundredfold from block to block
    above = y - y.amin(dim=-2, keepdim=True)
    spread = above.std(dim=-2) / (above.mean(dim=-2) + _SPREAD_EPS)
    return y.sum(dim=-2) * F.relu(spread - threshold)


@SCANS.register_module(name=["multi_head", "MultiHeadScan"])
class MultiHeadScan(nn.Module):
    """Heads of channels in subspaces of their own, each scanned along its own kind of route pair (MHS-VM).

    ``y = out_norm(mix_proj(mix_norm(heads(head_proj(act(conv(x))))))) * silu(z)`` with ``x, z = in_proj(input)``; the
    outputs of a head's routes are merged by `route_attention`.

    Args:
        dim: width C of input and output.
        heads: one route family per head, all of the same number of routes, two at least. The original's three-head
            form leaves the last of the default ones out.
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection; ``"auto"`` is ceil(channels of a head / 16).
        threshold: of `route_attention`.
        mix: normalise and project the joined heads; without that their widths must add up to C.
        dropout: dropout after the gate.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: Sequence[str | dict | list | Routes] = tuple(_OFFICIAL_HEADS.values()),
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        threshold: float = 0.0,
        mix: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dim = dim
        counts = {build_routes(head).num_routes for head in heads}
        if len(counts) != 1 or counts == {1}:
            raise ValueError(f"heads need the same number of routes each, two at least; {heads} have {sorted(counts)}")
        self.heads, width = len(heads), dim // len(heads)
        joined = self.heads * width
        if not width or not (mix or joined == dim):
            raise ValueError(f"{self.heads} heads cannot share {dim} channels{'' if mix else ' without mix=True'}")
        self.threshold = threshold
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv = DepthwiseConv2d(dim, 3, act="silu")
        self.head_proj = nn.Linear(dim, joined, bias=False)
        self.core = S6Core(width, build_routes(list(heads)), state_dim, resolve_dt_rank(dt_rank, width))
        self.mix_norm = LayerNorm(joined, eps=_NORM_EPS) if mix else nn.Identity()
        self.mix_proj = nn.Linear(joined, dim, bias=False) if mix else nn.Identity()
        self.out_norm = LayerNorm(dim, eps=_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        height, width = x.shape[1:3]
        h, z = self.in_proj(x).chunk(2, dim=-1)  # each (B, H, W, C)
        h = self.head_proj(self.conv(h)).flatten(1, 2).unflatten(-1, (self.heads, 1, -1))  # (B, L, heads, 1, D)
        (table,) = self.core.routes.tables(height, width, x.device)
        routes = h.expand(-1, -1, -1, len(table.read) // self.heads, -1)  # (B, L, heads, K, D)
        y = self.core.scan_routes(routes.flatten(2, 3), table, merge=False)  # (B, L, heads * K, D)
        y = route_attention(y.view(routes.shape), self.threshold).flatten(2)  # (B, L, heads * D)
        y = self.mix_proj(self.mix_norm(y).to(h.dtype))
        return self.dropout(self.out_norm(y).to(h.dtype).view(z.shape) * F.silu(z))


_OFFICIAL_KEYS = (
    (r"(^|\.)conv2d\.", r"\1conv."),
    (r"(^|\.)mhs\.x_ssproj\.", r"\1head_proj."),
    (r"(^|\.)mhs\.cat_norm\.", r"\1mix_norm."),
    (r"(^|\.)mhs\.y_proj\.", r"\1mix_proj."),
)
_OFFICIAL_ENGINE = re.compile(r"(.*?)mhs\.scanhead_(\w)\.scanning\.seq2seq_engine\.(\w+)")
_OFFICIAL_LEAVES = {"dt_projs_weight": "dt_proj_weight", "dt_projs_bias": "dt_proj_bias", "A_logs": "A_log", "Ds": "D"}


def convert_multi_heads(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes of original MHS parameters as `MultiHeadScan` has them; other entries are kept.

    The original names some tensors twice, and the second name is in force where the two differ. The routes of all
    heads are stored in one tensor here.
    """
    converted: dict[str, torch.Tensor] = {}
    engines: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        second = key.replace(".mambaeng.", ".scanning.seq2seq_engine.").replace("x_ssproj_W", "x_ssproj.weight")
        if second != key and second in state_dict:
            continue
        match = _OFFICIAL_ENGINE.fullmatch(second)
        if match:
            leaf = _OFFICIAL_LEAVES.get(match[3], match[3])
            routes = build_routes(_OFFICIAL_HEADS[match[2]]).num_routes
            if leaf in ("A_log", "D"):
                value = value.unflatten(0, (routes, -1))  # (K*D, ...) -> (K, D, ...)
            engines[f"{match[1]}core.{leaf}"][match[2]] = value
            continue
        for pattern, replacement in _OFFICIAL_KEYS:
            second = re.sub(pattern, replacement, second)
        converted[second] = value
    for key, of_heads in engines.items():
        converted[key] = torch.cat([of_heads[letter] for letter in _OFFICIAL_HEADS if letter in of_heads])
    return converted

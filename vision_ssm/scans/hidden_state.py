"""EfficientViM's mixer (HSM-SSD): gating and projection happen on a few hidden states in place of all cells.

Paper: EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality, arXiv 2411.15241. Source
of the mathematics: github.com/mlvlab/EfficientViM (MIT), commit 304340cb, detection/efficientViM.py.
"""

import torch
from torch import nn

from ..layers import DepthwiseConv2d
from ..ops import hidden_state_mixer
from ..ops.checks import check_map
from ..registry import SCANS
from .core import _uniform
from .walks import NoRouteError, Walk


@SCANS.register_module(name=["hidden_state", "HiddenStateMixer"])
class HiddenStateMixer(nn.Module):
    """Cells are gathered into a few hidden states, which are gated and projected, and read back by every cell.

    B, C and dt come from one projection and a depthwise 3x3 convolution. State n gathers the map with weights
    ``softmax(dt[:, n]) * B[:, n]`` over the cells and becomes ``h = out(v * silu(z) + D * v)`` with
    ``v, z = in(state)``; a cell reads ``C @ h``. Only the convolution knows where a cell lies.

    Args:
        dim: width C of input and output.
        state_dim: hidden states N.
        expand: width D = int(expand * dim) in which the states are gated.
        inert_decay: also hold the parameter A of the published models. It cancels in the softmax: it has no influence
            and its gradient is zero.
    """

    def __init__(self, dim: int, *, state_dim: int = 64, expand: float = 1.0, inert_decay: bool = False):
        super().__init__()
        self.dim = dim
        inner = int(expand * dim)
        if state_dim < 1 or inner < 1:
            raise ValueError(
                f"state_dim and expand * dim must be at least 1, got state_dim={state_dim} and {expand} * {dim}"
            )
        self.in_proj = nn.Linear(dim, 3 * state_dim, bias=False)
        self.conv = DepthwiseConv2d(3 * state_dim, 3, bias=False)
        self.hidden_in_weight = _uniform(2 * inner, dim, bound=dim**-0.5)
        self.hidden_out_weight = _uniform(dim, inner, bound=inner**-0.5)
        self.D = nn.Parameter(torch.ones(1))
        self.A = nn.Parameter(torch.empty(state_dim).uniform_(1, 16)) if inert_decay else None

    def walks(self, height: int, width: int) -> list[Walk]:
        """See `walks_of`."""
        raise NoRouteError("hidden_state gathers all cells into a few states at once, in no order")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        return self.mix(x)[0]

    def mix(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the hidden states h, (B, N, dim), in float32 (float64 for float64 input)."""
        projected = self.conv(self.in_proj(x)).flatten(1, 2)  # (B, L, 3N)
        b, c, dt = projected.chunk(3, dim=-1)
        weights = self.hidden_in_weight, self.hidden_out_weight
        y, hidden = hidden_state_mixer(x.flatten(1, 2), dt, b, c, *weights, self.D, self.A)
        return y.view(x.shape).to(projected.dtype), hidden

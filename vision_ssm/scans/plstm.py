"""pLSTM's mixer: a linear recurrence on the edges of the grid, in four orientations.

Paper: pLSTM: parallelizable Linear Source Transition Mark networks, arXiv 2506.11997. Source of the mathematics:
github.com/ml-jku/plstm (MIT), commit a404ff38, src/plstm/torch.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.autocast import without_autocast
from ..ops.checks import check_map
from ..ops.plstm import plstm2d
from ..registry import SCANS, suggest
from .walks import Wave

ORIENTATIONS = 4
MODES = ("propagation", "diffusion")
_LEVELS = {"propagation": 2, "diffusion": 4}  # sources and marks
_TRANSITIONS = {"propagation": 1, "diffusion": 3}
_HEAD_WIDTH = 64
_NORM_EPS = 1e-5


def resolve_heads(num_heads: int | str, dim: int) -> int:
    """Heads whose gates, of four orientations each, divide the channels; ``"auto"``: about 64 channels in each."""
    if dim % ORIENTATIONS:
        raise ValueError(f"gates of {ORIENTATIONS} orientations share the channels, but dim={dim} is no multiple of it")
    if num_heads == "auto":
        most = max(1, dim // _HEAD_WIDTH)
        return max(heads for heads in range(1, most + 1) if dim % (ORIENTATIONS * heads) == 0)
    if not isinstance(num_heads, int) or num_heads < 1 or dim % (ORIENTATIONS * num_heads):
        raise ValueError(
            f"num_heads must be 'auto' or a number whose {ORIENTATIONS}-fold divides dim={dim}, got {num_heads!r}"
        )
    return num_heads


@SCANS.register_module(name=["plstm", "PLSTMScan"])
class PLSTMScan(nn.Module):
    """A linear recurrence on the edges of the grid, whose states travel as a beam or spread (pLSTM).

    Query, key and value are linear; sources, transitions and marks are gates of `plstm2d`, for every head and
    orientation, each computed from a slice of the channels of its own. Orientations are added, heads normalised by
    their root mean square and projected.

    - Propagation: an orientation gate o, from all channels, divides what a node sends between its two edges:
      ``S_r = o * source``, ``S_d = 1 - S_r``, ``T_rl = T_ru = o * transition``, ``T_dl = T_du = 1 - T_rl``.
    - Diffusion: sources, transitions and marks of the edges are independent, and one of the turns is cut, so that
      there is a single path between two nodes.

    Parameters: ``transition_weight``, ``transition_bias`` (1 or 3, 4H[, C / 4H]), ``gate_weight``, ``gate_bias`` (2 or
    4 sources and marks, 4H[, C / 4H]), where row h * 4 + n is of head h and orientation n; ``orientation_weight``
    (4H, C), ``orientation_bias`` (4H); ``D`` (H), the direct term before its sigmoid; ``norm_weight`` (C).

    Args:
        dim: width C of input and output, a multiple of 4.
        num_heads: heads H, ``"auto"`` for about 64 channels each.
        mode: ``"propagation"`` or ``"diffusion"``.
        chirality: which turn diffusion cuts, ``"L"``: the one into the next column, ``"R"``: into the next row.
        gate_weights: whether sources, transitions and marks depend on the input; without, ``transition_weight`` is
            held as published models have it, has no influence and is not trained.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | str = "auto",
        mode: str = "propagation",
        chirality: str = "L",
        gate_weights: bool = True,
    ):
        super().__init__()
        self.dim = dim
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}.{suggest(str(mode), MODES)}")
        if chirality not in ("L", "R"):
            raise ValueError(f"chirality is 'L' or 'R', got {chirality!r}")
        self.heads, self.mode, self.chirality = resolve_heads(num_heads, dim), mode, chirality
        self.gate_weights = gate_weights
        entries = ORIENTATIONS * self.heads
        self.qkv = nn.Linear(dim, 3 * dim)
        transition_weight = torch.empty(_TRANSITIONS[mode], entries, dim // entries)
        self.transition_weight = nn.Parameter(transition_weight, requires_grad=gate_weights)
        self.transition_bias = nn.Parameter(torch.empty(_TRANSITIONS[mode], entries))
        self.gate_weight = None
        if gate_weights:
            self.gate_weight = nn.Parameter(torch.empty(_LEVELS[mode], entries, dim // entries))
        self.gate_bias = nn.Parameter(torch.empty(_LEVELS[mode], entries))
        self.orientation_weight = self.orientation_bias = None
        if mode == "propagation":
            self.orientation_weight = nn.Parameter(torch.empty(entries, dim))
            self.orientation_bias = nn.Parameter(torch.empty(entries))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm_weight = nn.Parameter(torch.empty(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates start without weights: states decay slowly, little enters and is read, beams spread over angles."""
        nn.init.normal_(self.qkv.weight, std=(2 / (5 * self.qkv.in_features)) ** 0.5)
        nn.init.zeros_(self.qkv.bias)
        self.out_proj.reset_parameters()
        for weight in (self.transition_weight, self.gate_weight, self.orientation_weight):
            if weight is not None:
                nn.init.zeros_(weight)
        nn.init.ones_(self.transition_bias)
        nn.init.constant_(self.gate_bias, -4.0)
        nn.init.constant_(self.D, -6.0)
        nn.init.ones_(self.norm_weight)
        if self.orientation_bias is not None:
            with torch.no_grad():  # the published layer counts up orientations by head, and reads heads by orientation
                angles = torch.linspace(-2, 2, self.heads) if self.heads > 1 else torch.zeros(1)
                self.orientation_bias.copy_(angles.repeat(ORIENTATIONS))

    def _by_orientation(self, gates: torch.Tensor) -> torch.Tensor:
        """(..., 4H) -> (..., H, 4, 1)"""
        return gates.unflatten(-1, (self.heads, ORIENTATIONS)).unsqueeze(-1)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, X, Y, C). Gates before their activation, (B, X, Y, G, 4H): transitions, sources and marks, angle.

        One matrix product gives them all: rows of slices are filled up with zeros, which costs a GPU less than a
        product of its own for every slice.
        """
        biases = torch.cat([self.transition_bias, self.gate_bias]).to(x.dtype)  # (G, 4H)
        angle = None
        if self.orientation_weight is not None and self.orientation_bias is not None:
            scaled = self.orientation_weight.to(x.dtype) * (0.5 / x.shape[-1])  # (4H, C)
            angle = scaled, self.orientation_bias.to(x.dtype)
        if self.gate_weight is None:
            given = biases.expand(*x.shape[:3], *biases.shape)
            return given if angle is None else torch.cat([given, F.linear(x, *angle).unsqueeze(-2)], -2)
        slices = torch.cat([self.transition_weight, self.gate_weight]).to(x.dtype)  # (G, 4H, C / 4H)
        own = torch.eye(slices.shape[1], dtype=x.dtype, device=x.device).unsqueeze(-1)  # (4H, 4H, 1)
        weights = (slices.unsqueeze(2) * own).flatten(2)  # (G, 4H, C)
        if angle is not None:
            weights, biases = torch.cat([weights, angle[0][None]]), torch.cat([biases, angle[1][None]])
        return F.linear(x, weights.flatten(0, 1), biases.flatten()).unflatten(-1, biases.shape)

    def gates(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """x: (B, X, Y, C). Returns the gates of `plstm2d` by name, in float32 at least."""
        with without_autocast(x):
            given = self._linear(x.to(torch.promote_types(x.dtype, torch.float32)))
            count = _TRANSITIONS[self.mode]
            transitions = self._by_orientation(torch.tanh(5 * given[..., :count, :])).unsqueeze(-1).unbind(3)
            levels = self._by_orientation(torch.sigmoid(given[..., count:, :])).unbind(3)
            if self.mode == "diffusion":
                (rl, du, turn), (r, d, mark_l, mark_u) = transitions, levels
                turns = dict(T_dl=None, T_ru=turn) if self.chirality == "L" else dict(T_dl=turn, T_ru=None)
                return dict(S_r=r, S_d=d, T_rl=rl, T_du=du, M_l=mark_l, M_u=mark_u, **turns)
            source, mark, share = levels  # (B, X, Y, H, 4, 1) each
            right = share * source
            straight = share.unsqueeze(-1) * transitions[0]
            down = 1 - straight
            transitions_of = dict(T_rl=straight, T_ru=straight, T_dl=down, T_du=down)
            return dict(S_r=right, S_d=1 - right, M_l=mark, M_u=mark, **transitions_of)

    def walks(self, height: int, width: int) -> list[Wave]:
        """See `walks_of`: a wave from every corner, in the order of the orientations."""
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        waves = []
        for number, (up, left) in enumerate(((False, False), (True, False), (False, True), (True, True))):
            steps = (rows.flip(0) if up else rows) + (columns.flip(0) if left else columns)  # (H, W)
            corner = f"{'bottom' if up else 'top'} {'right' if left else 'left'}"
            edges = ((-1 if up else 1, 0), (0, -1 if left else 1))
            waves.append(Wave(f"orientation {number}, from the {corner}", steps, edges))
        return waves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        projected = self.qkv(x)
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).unbind(3)  # (B, X, Y, H, C / H) each
        direct = self.D.sigmoid().expand(query.shape[:4])
        y = plstm2d(query, key, value, **self.gates(x), D=direct)
        y = F.rms_norm(y, y.shape[-1:], eps=_NORM_EPS).flatten(-2) * self.norm_weight
        return self.out_proj(y.to(projected.dtype))

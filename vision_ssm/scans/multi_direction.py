"""VMamba's SS2D: one input projection, a depthwise convolution, a scan along several routes, one output projection.

Paper: VMamba: Visual State Space Model, arXiv 2401.10166. Source of the mathematics and of the variants:
github.com/MzeroMiko/VMamba (MIT), classification/models/vmamba.py.
"""

import torch
from torch import nn

from ..layers import ChannelGate, DeformableConv2d, DepthwiseConv2d, LayerNorm, get_activation, is_plain
from ..ops.checks import check_map
from ..registry import SCANS, suggest
from .core import S6Core, SSDCore, resolve_dt_rank
from .routes import Routes, build_routes


class SpatialSoftmax(nn.Module):
    """Softmax over all positions of a (B, H, W, C) map, per channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)  # (B, H*W, C)


def _depthwise(dim: int) -> nn.Module:
    return DepthwiseConv2d(dim, 3, bias=False)


_OUT_NORMS = {
    "layer": lambda dim: LayerNorm(dim, eps=1e-5),
    "none": lambda dim: nn.Identity(),
    "conv": _depthwise,
    "layer_conv": lambda dim: nn.Sequential(LayerNorm(dim, eps=1e-5), _depthwise(dim)),
    "softmax": lambda dim: SpatialSoftmax(),
    "sigmoid": lambda dim: nn.Sigmoid(),
}


@SCANS.register_module(name=["multi_direction", "MultiDirectionScan"])
class MultiDirectionScan(nn.Module):
    """Selective scan along any routes (VMamba's SS2D), or the Mamba-2 form of it.

    ``y = out_norm(scan(act(conv(in_proj(x)))))``, gated by ``act(z)``, then projected back.

    Args:
        dim: width C of input and output.
        expand: inner width D = int(expand * dim).
        state_dim: states N per channel.
        dt_rank: rank of the step-size projection of the S6 core, or number of heads per route of the SSD core;
            ``"auto"`` is ceil(dim / 16).
        routes: a route family (``"cross"``, ``dict(type="bidirectional", repeats=1)``, a list of families, ...).
        core: ``"s6"`` (Mamba) or ``"ssd"`` (Mamba-2).
        conv_kernel: odd size of the depthwise convolution; 1 or less leaves it out.
        conv_bias: whether that convolution has a bias.
        deformable: a `DeformableConv2d` in its place, in as many groups as `dt_rank` says (HRVMamba's DSS2D).
        offset_kernel: see `DeformableConv2d`.
        act: activation after the convolution, and of the gate.
        gate: multiply the normalised output by a second half of the input projection.
        gate_act: activate the gate.
        out_norm: ``"layer"``, ``"none"``, ``"conv"`` (depthwise 3x3), ``"layer_conv"``, ``"softmax"`` (over positions)
            or ``"sigmoid"``.
        channel_gate: squeeze and excitation of the normalised output (hidden width D // 8, no biases).
        out_act: GELU before the gate.
        dropout: dropout after the output projection.
        init: initialisation of the core, see `S6Core` and `SSDCore`; None takes the core's default.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        routes: str | dict | list | Routes = "cross",
        core: str = "s6",
        conv_kernel: int = 3,
        conv_bias: bool = True,
        deformable: bool = False,
        offset_kernel: int = 0,
        act: str = "silu",
        gate: bool = True,
        gate_act: bool = True,
        out_norm: str = "layer",
        channel_gate: bool = False,
        out_act: bool = False,
        dropout: float = 0.0,
        init: str | None = None,
    ):
        super().__init__()
        self.dim = dim
        cores = {"s6": S6Core, "ssd": SSDCore}
        if core not in cores:
            raise ValueError(f"unknown core {core!r}.{suggest(str(core), cores)}")
        if out_norm not in _OUT_NORMS:
            raise ValueError(f"unknown out_norm {out_norm!r}.{suggest(str(out_norm), _OUT_NORMS)}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand * dim must be at least 1, got {expand} * {dim}")
        if conv_kernel > 1 and conv_kernel % 2 == 0:
            raise ValueError(
                f"conv_kernel must be odd, so that the map keeps its size, or at most 1; got {conv_kernel}"
            )
        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        rank = resolve_dt_rank(dt_rank, dim)
        if deformable:
            self.conv: nn.Module = DeformableConv2d(inner, rank, conv_kernel, offset_kernel, act)
        elif conv_kernel > 1:
            self.conv = DepthwiseConv2d(inner, conv_kernel, bias=conv_bias, act=act)
        else:
            self.conv = get_activation(act)
        self.gate_act = get_activation(act if gate and gate_act else "identity")
        options = {} if init is None else {"init": init}
        self.core = cores[core](inner, build_routes(routes), state_dim, rank, **options)
        self.out_norm = _OUT_NORMS[out_norm](inner)
        self.channel_gate = ChannelGate(inner, norm="none", act="relu", bias=False) if channel_gate else None
        self.out_act = get_activation("gelu" if out_act else "identity")
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        check_map(self, x, self.dim)
        h = self.in_proj(x)
        if self.gate:
            h, z = h.chunk(2, dim=-1)  # each (B, H, W, D)
        y = self.scan(h)
        if self.channel_gate is not None:
            y = self.channel_gate(y.flatten(1, 2)).view(y.shape)  # (B, H*W, D) inside
        y = self.out_act(y)
        if self.gate:
            y = y * self.gate_act(z)
        return self.dropout(self.out_proj(y))

    def scan(self, h: torch.Tensor) -> torch.Tensor:
        """Convolution, scan and output norm of the projected map: (B, H, W, D) to the same shape."""
        h = self.conv(h)
        if is_plain(self.out_norm, LayerNorm):
            return self.core(h, norm=self.out_norm).to(h.dtype)
        return self.out_norm(self.core(h)).to(h.dtype)

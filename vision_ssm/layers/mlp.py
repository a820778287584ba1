"""The MLP of a block."""

from timm.layers import GluMlp, Mlp
from torch import nn

from .activation import get_activation


def build_mlp(dim: int, hidden_dim: int, act: str = "gelu", gated: bool = False, dropout: float = 0.0) -> nn.Module:
    """``fc1 -> act -> fc2`` over the last axis, or ``fc2(a * act(g))`` with ``a, g = fc1(x)`` when `gated`.

    Parameters are named ``fc1`` (`dim` to `hidden_dim`, or twice that when gated) and ``fc2``.
    """
    act_layer = type(get_activation(act))
    if gated:
        return GluMlp(dim, 2 * hidden_dim, act_layer=act_layer, gate_last=True, drop=dropout)
    return Mlp(dim, hidden_dim, act_layer=act_layer, drop=dropout)

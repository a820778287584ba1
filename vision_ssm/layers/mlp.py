"""The MLP of a block."""

from typing import Any

import torch
from timm.layers import GluMlp
from timm.layers import Mlp as TimmMlp
from torch import nn
from torch.nn import functional as F

from ..ops.registration import is_transformed
from .activation import get_activation
from .watched import is_plain


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(h))`` that keeps `h` alone: the activated values, as large as it, are made again in backward."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        of_h, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_h = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), h) if of_h else None
        grad_weight = None
        if of_weight:
            grad_weight = rows.t() @ F.gelu(h).reshape(-1, h.shape[-1]).to(grad.dtype)
        return grad_h, grad_weight, rows.sum(0) if of_bias else None


class Mlp(TimmMlp):
    """timm's MLP; in training, GELU's output is not kept between forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        # a compiler decides by itself what to make again
        light = torch.is_grad_enabled() and not (torch.compiler.is_compiling() or is_transformed())
        light = light and is_plain(self.act, nn.GELU) and is_plain(self.fc2, nn.Linear)
        if not light or (self.training and self.drop1.p > 0):
            return super().forward(x)
        return self.drop2(_GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias))


def build_mlp(dim: int, hidden_dim: int, act: str = "gelu", gated: bool = False, dropout: float = 0.0) -> nn.Module:
    """``fc1 -> act -> fc2`` over the last axis, or ``fc2(a * act(g))`` with ``a, g = fc1(x)`` when `gated`.

    Parameters are named ``fc1`` (`dim` to `hidden_dim`, or twice that when gated) and ``fc2``.
    """
    act_layer = type(get_activation(act))
    if gated:
        return GluMlp(dim, 2 * hidden_dim, act_layer=act_layer, gate_last=True, drop=dropout)
    return Mlp(dim, hidden_dim, act_layer=act_layer, drop=dropout)

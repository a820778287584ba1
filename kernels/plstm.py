"""pLSTM on a grid: weights between all pairs of nodes, and matrix products with them.

A node reads another one with a weight: the sum over all paths between the two, and over all orientations. Weights are
found by walking every source over the grid, and multiply the products of query and key as in attention. The backward
pass keeps nothing but the inputs and finds the weights again. Memory of the weights is bounded: heads of images beyond
a budget wait for their turn.
"""

from typing import Any

import torch
from torch import Tensor

from .plstm_products import Products
from .plstm_walk import Walk

MAX_WORKSPACE = 2**28
"""Float32 numbers of weights and states that are held at a time."""


def _prepare(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    S_r: Tensor,
    S_d: Tensor,
    T_rl: Tensor,
    T_du: Tensor,
    T_dl: Tensor | None,
    T_ru: Tensor,
    M_l: Tensor,
    M_u: Tensor,
    D: Tensor | None,
) -> tuple[Walk, Products]:
    walk = Walk(dict(T_rl=T_rl, T_du=T_du, T_ru=T_ru, S_r=S_r, S_d=S_d, M_l=M_l, M_u=M_u, T_dl=T_dl))
    return walk, Products(Q, K, V, None if D is None else D.contiguous())


def _turns(walk: Walk, sequences: int, matrices: int) -> list[tuple[int, int]]:
    """First and number of the heads of images that are worked on at a time, each with `matrices` like its weights."""
    count = max(1, MAX_WORKSPACE // (matrices * walk.cells * walk.padded))
    return [(first, min(count, sequences - first)) for first in range(0, sequences, count)]


def forward(Q: Tensor, K: Tensor, V: Tensor, *others: Any) -> Tensor:
    """Inputs as those of the operator, `T_ru` given. Returns (B, X, Y, H, DV) in float32."""
    out = torch.empty(V.shape, dtype=torch.float32, device=V.device)
    if out.numel():
        walk, products = _prepare(Q, K, V, *others)
        for first, count in _turns(walk, len(Q) * walk.heads, matrices=1):
            products.forward(walk.weights(first, count), out, first)
    return out


def backward(grad: Tensor, Q: Tensor, K: Tensor, V: Tensor, *others: Any) -> dict[str, Tensor]:
    """grad: (B, X, Y, H, DV). Returns the gradients of all inputs that are given."""
    walk, products = _prepare(Q, K, V, *others)
    given = dict(Q=Q, K=K, V=V) | ({} if products.direct is None else dict(D=products.direct))
    gradients = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in given.items()}
    of_gates = torch.zeros_like(walk.gates)
    if grad.numel() and Q.numel():
        of_heads = []
        for first, count in _turns(walk, len(Q) * walk.heads, matrices=2 + walk.orientations * walk.states):
            weights = walk.weights(first, count)
            of_heads.append(walk.of_gates(products.backward(grad, weights, gradients, first), first))
        of_gates = torch.cat(of_heads).unflatten(0, (len(Q), walk.heads)).transpose(1, 2)  # (B, cells, H, O, COUNT)
        of_gates = of_gates.unflatten(1, (walk.height, walk.width))
    return gradients | walk.unpacked(of_gates)

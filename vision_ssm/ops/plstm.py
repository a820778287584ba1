"""pLSTM: a linear recurrence on the edges of a grid that is read as a directed acyclic graph.

Source of the mathematics: Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks",
arXiv 2506.11997, and github.com/ml-jku/plstm (MIT), commit a404ff38.
"""

from typing import Any

import torch
from torch import Tensor

from . import torch_plstm
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .registration import register_operator
from .torch_plstm import plstm2d_reference

_OP = "plstm2d"


def _fake(Q: Tensor, K: Tensor, V: Tensor, *_: object) -> Tensor:
    return Q.new_empty(V.shape, dtype=work_dtype(Q))


def plstm2d_flops(
    nodes: int, key_dim: int, value_dim: int, orientations: int, states: int = 1, turns: int = 2, direct: bool = True
) -> int:
    """FLOPs of the recurrence for `nodes` nodes of all heads: independent of the form in which it is computed.

    Per orientation and number of a (key_dim, value_dim) matrix, 2 for each entry of the 2 straight transitions and the
    `turns`, the 2 sources and the 2 marks; once, 1 for the product of key and value, 2 for the query and 2 for the
    direct term.
    """
    moves = orientations * (2 * (2 + turns) * states**2 + 8 * states)
    return nodes * key_dim * value_dim * (moves + 3 + 2 * direct)


def _flops(Q: tuple[int, ...], K: Any, V: tuple[int, ...], S_r: tuple[int, ...], *others: Any) -> int:
    batch, height, width, heads, key_dim = Q
    turns = 2 if others[3] is not None else 1
    nodes = batch * height * width * heads
    return plstm2d_flops(nodes, key_dim, V[4], S_r[4], S_r[5], turns, others[7] is not None)


_plstm2d = register_operator(
    _OP,
    "Tensor Q, Tensor K, Tensor V, Tensor S_r, Tensor S_d, Tensor T_rl, Tensor T_du, Tensor? T_dl, Tensor T_ru, "
    "Tensor M_l, Tensor M_u, Tensor? D",
    ("y",),
    torch_plstm,
    _fake,
    _flops,
)


def _transposed(gate: Tensor | None) -> Tensor | None:
    """A gate of the transposed grid: what flips rows there flips columns here."""
    if gate is None:
        return None
    gate = gate.transpose(1, 2)
    return gate if gate.shape[4] == 1 else gate.unflatten(4, (2, 2)).transpose(4, 5).flatten(4, 5)


def plstm2d(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    S_r: Tensor,
    S_d: Tensor,
    T_rl: Tensor,
    T_du: Tensor,
    T_dl: Tensor | None,
    T_ru: Tensor | None,
    M_l: Tensor,
    M_u: Tensor,
    D: Tensor | None = None,
) -> Tensor:
    """States travel along the edges of a grid: down, from row x to x + 1, and right, from column y to y + 1.

    With ``kv = outer(K, V)``, ``l`` the state that enters node (x, y) from row x - 1 and ``u`` the one that enters it
    from column y - 1, both 0 at the border, and all gates those of the node::

        y = (Q / sqrt(DK)) @ (M_l @ l + M_u @ u + D * kv)
        to row x + 1:    T_rl @ l + T_ru @ u + S_r * kv
        to column y + 1: T_du @ u + T_dl @ l + S_d * kv

    Letters follow the paper: r(ight) and l(eft) go along x, d(own) and u(p) along y. A node reads itself through `D`
    alone. One orientation walks as said. Of four, orientation 0 does; 1 walks the grid with rows reversed, 2 with
    columns reversed, 3 with both; their results are added, and `D` counts once. All arithmetic is float32 (float64 for
    float64 `Q`), whatever autocast says; but the matrix products of the GPU's kernels take operands of bfloat16 where
    `Q`, `K` and `V` are bfloat16, and 10 bits of them for float16. Memory grows with the square of the nodes of a map,
    for as many images or heads at a time as fit a budget; only the inputs are kept for the backward pass.

    Args:
        Q: (B, X, Y, H, DK), queries of H heads.
        K: (B, X, Y, H, DK), keys.
        V: (B, X, Y, H, DV), values.
        S_r, S_d: (B, X, Y, H, O, J), sources; J numbers track the state, O is 1 or 4 orientations.
        T_rl, T_du: (B, X, Y, H, O, J, J), straight transitions (out, in).
        T_dl, T_ru: like them, the turns; None: no path turns there. One of them None is the D-mode of the paper, of
            chirality "L" without `T_dl` and "R" without `T_ru`; with both given it is the P-mode.
        M_l, M_u: (B, X, Y, H, O, J), marks.
        D: (B, X, Y, H), direct term; None: nodes do not read themselves.

    Returns:
        (B, X, Y, H, DV) in float32 (float64 for float64 `Q`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit; VISION_SSM_BACKEND names no backend.
    """
    required = dict(Q=Q, K=K, V=V, S_r=S_r, S_d=S_d, T_rl=T_rl, T_du=T_du, M_l=M_l, M_u=M_u)
    check_tensors(_OP, required, dict(T_dl=T_dl, T_ru=T_ru, D=D))
    check_dimensions(_OP, "Q", Q, "(B, X, Y, H, DK)")
    check_dimensions(_OP, "V", V, "(B, X, Y, H, DV)")
    check_dimensions(_OP, "S_r", S_r, "(B, X, Y, H, O, J)")
    nodes = tuple(Q.shape[:4])
    orientations, states = S_r.shape[4:]
    if orientations not in (1, 4):
        raise ValueError(f"{_OP}: S_r has {orientations} orientations, expected 1 or 4")
    check_shape(_OP, "K", K, (*nodes, Q.shape[4]), "(B, X, Y, H, DK)")
    check_shape(_OP, "V", V, (*nodes, V.shape[4]), "(B, X, Y, H, DV)")
    for name, gate in dict(S_r=S_r, S_d=S_d, M_l=M_l, M_u=M_u).items():
        check_shape(_OP, name, gate, (*nodes, orientations, states), "(B, X, Y, H, O, J)")
    for name, transition in dict(T_rl=T_rl, T_du=T_du, T_dl=T_dl, T_ru=T_ru).items():
        check_shape(_OP, name, transition, (*nodes, orientations, states, states), "(B, X, Y, H, O, J, J)")
    check_shape(_OP, "D", D, nodes, "(B, X, Y, H)")

    if demanded_backend() == "reference":
        return plstm2d_reference(Q, K, V, S_r, S_d, T_rl, T_du, T_dl, T_ru, M_l, M_u, D)
    if T_ru is not None:
        return _plstm2d(Q, K, V, S_r, S_d, T_rl, T_du, T_dl, T_ru, M_l, M_u, D)
    if T_dl is None:
        return _plstm2d(Q, K, V, S_r, S_d, T_rl, T_du, None, torch.zeros_like(T_rl), M_l, M_u, D)
    # no path turns into the next row: in the transposed grid, none turns into the next column
    gates = [_transposed(gate) for gate in (S_d, S_r, T_du, T_rl, None, T_dl, M_u, M_l)]
    Q, K, V = (tensor.transpose(1, 2) for tensor in (Q, K, V))
    return _plstm2d(Q, K, V, *gates, None if D is None else D.transpose(1, 2)).transpose(1, 2)

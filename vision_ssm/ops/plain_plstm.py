"""pLSTM as `torch_plstm` computes it, in functions that change nothing in place and that graph formats know."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import work_dtype
from .plstm_paths import Gates, _flips, _product, flip_orientations
from .torch_plstm import _gates, _heads, _nodes


def _decay(transition: Tensor) -> Tensor:
    """As `plstm_paths.decay`: (..., S, J, J) -> (..., S, J, S', J), place by place."""
    size, states = transition.shape[-3:-1]
    steps = transition.unbind(-3)
    reached = torch.zeros_like(steps[0])[..., :0]  # (..., J, S' J) of the sources so far
    one = torch.eye(states, dtype=transition.dtype, device=transition.device).expand_as(steps[0])
    rows = [F.pad(reached, (0, size * states))]
    for place in range(1, size):
        reached = torch.cat([steps[place - 1] @ reached, one], -1) if place > 1 else one
        rows.append(F.pad(reached, (0, (size - place) * states)))
    return torch.stack(rows, -3).unflatten(-1, (size, states))


def _on_diagonal(values: Tensor, axis: int) -> Tensor:
    """Values of places along `axis` as a map between places, zero off its diagonal.

    (..., S, J, R) -> (..., S, J, S', R) for ``axis = -3``.
    """
    size = values.shape[axis]
    eye = torch.eye(size, dtype=values.dtype, device=values.device)  # (S, S')
    return values.unsqueeze(-2) * eye.view(size, *[1] * (-axis - 2), size, 1)


def _row_maps(gates: Gates) -> Tensor:
    """As `plstm_paths.row_maps`: (N, O, X, Y, J + 1, Y', R)."""
    source = gates.S_d.unsqueeze(-1)
    right = source if gates.T_dl is None else torch.cat([gates.T_dl, source], -1)  # (N, O, X, Y, J, R)
    left = torch.cat([gates.T_ru, gates.M_u.unsqueeze(-2)], -2)  # (N, O, X, Y, J + 1, J)
    moved = _product(_decay(gates.T_du).unsqueeze(-1), right[:, :, :, None, None], -2)  # (N, O, X, Y, J, Y', R)
    rows = _product(left[..., None, None], moved.unsqueeze(-4), -3)
    straight = torch.cat([gates.S_r, torch.zeros_like(gates.S_r[..., :1])], -1).unsqueeze(-1)  # (N, O, X, Y, J + 1, 1)
    if gates.T_dl is not None:
        turned = torch.cat([gates.T_rl, gates.M_l.unsqueeze(-2)], -2)  # (N, O, X, Y, J + 1, J)
        straight = torch.cat([turned, straight], -1)
    return rows + _on_diagonal(straight, -3)


def _diagonal_weights(gates: Gates) -> Tensor:
    """As `plstm_paths.Diagonal`."""
    states = gates.S_d.shape[-1]
    products = _decay(gates.T_rl.transpose(2, 3))  # (N, O, Y, X, J, X', J)
    down = _product(products, gates.M_l.transpose(2, 3)[..., None, None], -3)  # (N, O, Y, X, X', J)
    down = flip_orientations(down, 1, (3, 4), (2,))
    entry, read = _row_maps(gates)[..., 0].split([states, 1], -2)  # (N, O, X, Y, J or 1, Y')
    entry = flip_orientations(entry, 1, (2,), (3, 5))
    read = flip_orientations(read.squeeze(-2), 1, (2,), (3, 4)).sum(1)  # (N, X, Y, Y')
    total = torch.einsum("noyxaj,noayjb->nyxab", down, entry).transpose(1, 2)
    return total + _on_diagonal(read, -3)


def _full_weights(gates: Gates) -> Tensor:
    """As `plstm_paths.Full`, whose sources of later rows are left out until the end."""
    batch, orientations, height, width, states = gates.S_d.shape
    maps = _row_maps(gates).transpose(3, 4).transpose(5, 6).flatten(0, 1)  # (N O, X, J + 1, Y, J + 1, Y')
    moves = maps[:, :, :, :, :states].flatten(4).flatten(2, 3)  # (N O, X, (J + 1) Y, J Y')
    own = maps[:, :, :, :, states].flatten(2, 3).mT  # (N O, X, Y', (J + 1) Y)
    marks, reach = [], own[:, 0]
    for x in range(height):
        if x:
            reach = torch.cat([reach[..., : states * width] @ moves[:, x].mT, own[:, x]], 1)  # of sources X' Y'
        marks.append(F.pad(reach[..., states * width :], (0, 0, 0, (height - 1 - x) * width)))
    weights = torch.stack(marks, 1).unflatten(2, (height, width))  # (N O, X, X', Y', Y)
    weights = weights.unflatten(0, (-1, orientations)).transpose(0, 2)  # (X, O, N, X', Y', Y)
    first, *others = _flips(weights.unbind(1), (0, 2), (3, 4))
    return sum(others, first).permute(1, 0, 4, 2, 3)


def plstm2d(
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
) -> Tensor:
    work = work_dtype(Q)
    given = dict(T_rl=T_rl, T_du=T_du, T_ru=T_ru, S_r=S_r, S_d=S_d, M_l=M_l, M_u=M_u)
    gates = _gates(given if T_dl is None else {**given, "T_dl": T_dl}, work)
    weights = (_diagonal_weights if T_dl is None else _full_weights)(gates)  # (N, X, Y, X', Y')
    query, key, value = (_heads(tensor, work) for tensor in (Q, K, V))
    scores = (query * Q.shape[-1] ** -0.5) @ key.mT  # (N, L, L)
    y = (scores * weights.flatten(3).flatten(1, 2)) @ value
    if D is not None:
        y = y + _heads(D.unsqueeze(-1), work) * scores.diagonal(dim1=1, dim2=2).unsqueeze(-1) * value
    return _nodes(y, V)

"""pLSTM on a grid in plain PyTorch: the twin that defines it, and its path where no kernel runs.

The path is attention without softmax: the weight with which a node reads another one, summed over all paths between the
two and over all orientations, times the product of query and key. States of (DK, DV) numbers are never made.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from .chunked import work_dtype
from .plstm_paths import Diagonal, Full, Gates, flip_orientations

MAX_WEIGHTS = {"cpu": 2**21, "cuda": 2**27}
"""Weights of all orientations that are worked on at a time; images beyond that wait for their turn."""


def plstm2d_reference(
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
    """The twin: a walk over the nodes; see :func:`vision_ssm.ops.plstm.plstm2d` for the arguments."""
    work = work_dtype(Q)
    query, key, value = (tensor.to(work) for tensor in (Q, K, V))
    query = query * Q.shape[-1] ** -0.5
    outer = torch.einsum("bxyhd,bxyhv->bxyhdv", key, value)
    height, width = Q.shape[1:3]
    y = torch.zeros_like(value)
    if D is not None:
        y = y + D.to(work).unsqueeze(-1) * (query * key).sum(-1, keepdim=True) * value
    for orientation in range(S_r.shape[4]):
        axes = [axis for axis in (1, 2) if orientation >> (axis - 1) & 1]
        q, kv = query.flip(axes), outer.flip(axes)
        first = [gate.to(work)[:, :, :, :, orientation].flip(axes) for gate in (S_r, S_d, T_rl, T_du, M_l, M_u)]
        source_r, source_d, rl, du, mark_l, mark_u = first
        dl, ru = (None if gate is None else gate.to(work)[:, :, :, :, orientation].flip(axes) for gate in (T_dl, T_ru))
        nothing = kv.new_zeros(*kv[:, 0, 0].shape, S_r.shape[-1])  # (B, H, DK, DV, J)
        right = {(-1, j): nothing for j in range(width)}  # states that leave a node to the next row
        down = {(i, -1): nothing for i in range(height)}  # ... and to the next column
        read = []

        def move(transition: Tensor | None, state: Tensor, i: int, j: int) -> Tensor:
            if transition is None:
                return torch.zeros_like(state)
            return torch.einsum("bhij,bhdvj->bhdvi", transition[:, i, j], state)

        for i, j in itertools.product(range(height), range(width)):
            left, up, new = right[i - 1, j], down[i, j - 1], kv[:, i, j].unsqueeze(-1)
            seen = torch.einsum("bhj,bhdvj->bhdv", mark_l[:, i, j], left)
            seen = seen + torch.einsum("bhj,bhdvj->bhdv", mark_u[:, i, j], up)
            read.append(torch.einsum("bhd,bhdv->bhv", q[:, i, j], seen))
            right[i, j] = move(rl, left, i, j) + move(ru, up, i, j) + source_r[:, i, j, :, None, None] * new
            down[i, j] = move(du, up, i, j) + move(dl, left, i, j) + source_d[:, i, j, :, None, None] * new
        y = y + torch.stack(read, 1).unflatten(1, (height, width)).flip(axes)
    return y


def _gates(given: dict[str, Tensor], work: torch.dtype) -> Gates:
    """Gates (B, X, Y, H, O, ...) in the order of the sweep, (B H, O, X, Y, ...)."""
    packed = torch.cat([gate.flatten(5).to(work) for gate in given.values()], -1)
    packed = flip_orientations(packed.permute(0, 3, 4, 1, 2, 5).flatten(0, 1), 1, (2,), (3,))
    parts = packed.split([gate.shape[5:].numel() for gate in given.values()], -1)
    gates = {name: part.unflatten(-1, given[name].shape[5:]) for name, part in zip(given, parts)}
    return Gates(T_dl=gates.pop("T_dl", None), **gates)


def _ungated(gradients: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Inverse of `_gates`, for gradients."""
    flat = {name: gradient.flatten(4) for name, gradient in gradients.items()}  # (B H, O, X, Y, J or J^2)
    packed = flip_orientations(torch.cat(list(flat.values()), -1), 1, (2,), (3,))
    packed = packed.unflatten(0, (packed.shape[0] // heads, heads)).permute(0, 3, 4, 1, 2, 5)  # (B, X, Y, H, O, ...)
    parts = packed.split([gradient.shape[-1] for gradient in flat.values()], -1)
    return {name: part.unflatten(-1, gradients[name].shape[4:]) for name, part in zip(gradients, parts)}


def _heads(tensor: Tensor, work: torch.dtype) -> Tensor:
    """(B, X, Y, H, C) -> (B H, X Y, C)"""
    return tensor.to(work).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _nodes(tensor: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_heads`; `like` is the map."""
    batch, height, width, heads = like.shape[:4]
    return tensor.view(batch, heads, height, width, tensor.shape[-1]).permute(0, 2, 3, 1, 4)


class _Images:
    """What forward and backward have in common, for some images."""

    def __init__(
        self,
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
    ):
        work = work_dtype(Q)
        given = dict(T_rl=T_rl, T_du=T_du, T_ru=T_ru, S_r=S_r, S_d=S_d, M_l=M_l, M_u=M_u)
        gates = _gates(given if T_dl is None else {**given, "T_dl": T_dl}, work)
        self.paths = Diagonal(gates) if T_dl is None else Full(gates)
        self.query, self.key, self.value = (_heads(tensor, work) for tensor in (Q, K, V))
        self.query = self.query * Q.shape[-1] ** -0.5
        self.like = V
        self.weights = self.paths.weights()  # (N, X, Y, X', Y')
        self.flat = self.weights.flatten(3).flatten(1, 2)  # (N, L, L)
        if D is not None:
            self.flat.diagonal(dim1=1, dim2=2).add_(_heads(D.unsqueeze(-1), work).squeeze(-1))
        self.direct = D is not None
        self.scores = self.query @ self.key.mT

    def forward(self) -> Tensor:
        return _nodes((self.scores * self.flat) @ self.value, self.like)

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        grad = _heads(grad, self.value.dtype)
        of_attention = grad @ self.value.mT  # (N, L, L)
        of_scores, of_weights = of_attention * self.flat, of_attention.mul_(self.scores)
        scale = self.query.shape[-1] ** -0.5
        gradients = {
            "Q": _nodes((of_scores @ self.key) * scale, self.like),
            "K": _nodes(of_scores.mT @ self.query, self.like),
            "V": _nodes((self.scores * self.flat).mT @ grad, self.like),
        }
        if self.direct:
            of_direct = of_weights.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            gradients["D"] = _nodes(of_direct.contiguous(), self.like).squeeze(-1)
        of_gates = self.paths.backward(of_weights.view(self.weights.shape))
        return gradients | _ungated(of_gates, self.like.shape[3])


def _slices(Q: Tensor, S_r: Tensor) -> list[slice]:
    """The images that are worked on at a time."""
    batch, height, width, heads = Q.shape[:4]
    orientations, states = S_r.shape[4:]
    each = heads * orientations * states * (height * width) ** 2
    count = max(1, MAX_WEIGHTS.get(Q.device.type, MAX_WEIGHTS["cuda"]) // each)
    return [slice(first, first + count) for first in range(0, max(batch, 1), count)]


def _images(part: slice, inputs: tuple[Any, ...]) -> _Images:
    return _Images(*(None if tensor is None else tensor[part] for tensor in inputs))


def forward(*inputs: Any) -> Tensor:
    """inputs: as those of the operator, `T_ru` given. Returns (B, X, Y, H, DV)."""
    parts = [_images(part, inputs).forward() for part in _slices(inputs[0], inputs[3])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def backward(grad: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """grad: (B, X, Y, H, DV). Returns the gradients of all inputs that are given; the paths are summed again."""
    parts = [_images(part, inputs).backward(grad[part]) for part in _slices(inputs[0], inputs[3])]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

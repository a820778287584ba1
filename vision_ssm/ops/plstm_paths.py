"""Sums over the paths between all pairs of nodes of a grid, for pLSTM: few large matrix products, with their adjoints.

All functions work on gates in the order of the sweep (every orientation flipped so that paths lead down and right), of
shape (N, O, X, Y, ...): N heads of images, O orientations. The vertical state `l` enters a node from above, the
horizontal state `u` from the left; J numbers make up a state. Within a row, `u` is solved for: what is left is a linear
map from `l` and the sources of the row to the next `l` and the marks of the row, of which there is one per row. The map
of a row is diagonal in `l` if no horizontal path turns down again (`T_dl` absent): then rows need no loop.

The result G (N, X, Y, X', Y') has the weight with which the node (x, y) reads the node (x', y'), summed over
orientations, in the order of the map.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Gates of all nodes: transitions (N, O, X, Y, J, J), sources and marks (N, O, X, Y, J)."""

    T_rl: Tensor
    T_du: Tensor
    T_ru: Tensor
    T_dl: Tensor | None
    S_r: Tensor
    S_d: Tensor
    M_l: Tensor
    M_u: Tensor


def flip_orientations(values: Tensor, axis: int, down: tuple[int, ...], right: tuple[int, ...]) -> Tensor:
    """`values` with orientations 1 and 3 of 4, along `axis`, flipped along the axes `down`, and 2 and 3 along `right`.

    It is its own inverse. A single orientation stays as it is.
    """
    if values.shape[axis] == 1:
        return values
    flipped = [
        part.flip(axes) if axes else part
        for part, axes in zip(values.split(1, axis), ((), down, right, (*down, *right)), strict=True)
    ]
    return torch.cat(flipped, axis)


def _product(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Sum of ``a * b`` over an axis that is short, and mostly of size 1."""
    product = a * b
    return product.squeeze(axis) if product.shape[axis] == 1 else product.sum(axis)


def decay(transition: Tensor) -> Tensor:
    """Products of the transitions strictly between the places of a line.

    transition: (..., S, J, J). Returns (..., S, J, S', J), 0 unless S' < S.
    """
    *batch, size, states, _ = transition.shape
    places = torch.arange(size, device=transition.device)
    if states == 1:
        previous = transition[..., 0, 0].roll(1, -1).unsqueeze(-1)  # (..., S, 1)
        between = places.unsqueeze(1) - 1 > places
        factors = torch.where(between, previous, 1)
        products = factors.cumprod(-2) * (places.unsqueeze(1) > places)
        return products.view(*batch, size, 1, size, 1)
    system = transition.new_zeros(*batch, size, states, size, states)
    steps = system.diagonal(offset=-1, dim1=-4, dim2=-2)  # (..., J, J, S - 1)
    steps.copy_(transition[..., 1:, :, :].movedim(-3, -1).neg())
    system = system.view(*batch, size * states, size * states)
    one = torch.eye(size * states, dtype=system.dtype, device=system.device).expand_as(system)
    arrived = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    result = torch.zeros_like(arrived)
    result[..., states:, :] = arrived[..., :-states, :]
    return result.view(*batch, size, states, size, states)


def decay_backward(grad: Tensor, products: Tensor) -> Tensor:
    """Gradient (..., S, J, J) of the transitions; `grad` and `products`: (..., S, J, S', J)."""
    *batch, size, states, _, _ = products.shape
    matrix = products.reshape(*batch, size * states, size * states)
    behind = (matrix.mT @ grad.reshape(matrix.shape)).view(*batch, size, states, size * states)
    return behind @ matrix.view(behind.shape).mT


class Rows(NamedTuple):
    """The map of each row, (N, O, X, Y, J + 1, Y', R), and what its adjoint needs.

    Down each column of blocks stand what reaches the next `l`, J numbers, and what is read at Y; R are the inputs at
    Y': `l`, unless rows are diagonal in it, and the source.
    """

    map: Tensor
    products: Tensor
    right: Tensor
    left: Tensor
    moved: Tensor


def row_maps(gates: Gates) -> Rows:
    """Solve every row for `u`."""
    states = gates.S_d.shape[-1]
    source = gates.S_d.unsqueeze(-1)
    right = source if gates.T_dl is None else torch.cat([gates.T_dl, source], -1)  # (N, O, X, Y, J, R)
    left = torch.cat([gates.T_ru, gates.M_u.unsqueeze(-2)], -2)  # (N, O, X, Y, J + 1, J)
    products = decay(gates.T_du)  # (N, O, X, Y, J, Y', J)
    moved = _product(products.unsqueeze(-1), right[:, :, :, None, None], -2)  # (N, O, X, Y, J, Y', R)
    rows = _product(left[..., None, None], moved.unsqueeze(-4), -3)  # (N, O, X, Y, J + 1, Y', R)
    straight = rows.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (N, O, X, Y, J + 1, R)
    straight[..., :states, -1].add_(gates.S_r)
    if gates.T_dl is not None:
        straight[..., :states, :-1].add_(gates.T_rl)
        straight[..., states, :-1].add_(gates.M_l)
    return Rows(rows, products, right, left, moved)


def row_maps_backward(grad: Tensor, rows: Rows) -> dict[str, Tensor]:
    """Gradients of the gates from that of the maps; without T_dl, those of `T_rl` and `M_l` are elsewhere."""
    states = rows.left.shape[-1]
    straight = grad.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (N, O, X, Y, J + 1, R)
    wide = grad.flatten(-2)  # (N, O, X, Y, J + 1, Y' R)
    of_left = wide @ rows.moved.flatten(-2).mT
    of_moved = (rows.left.mT @ wide).view(rows.moved.shape)  # (N, O, X, Y, J, Y', R)
    of_right = torch.einsum("...yajb,...yajr->...jbr", rows.products, of_moved)
    of_products = _product(of_moved.unsqueeze(-2), rows.right[:, :, :, None, None], -1)  # (N, O, X, Y, J, Y', J)
    gradients = {
        "T_du": decay_backward(of_products, rows.products),
        "T_ru": of_left[..., :states, :],
        "M_u": of_left[..., states, :],
        "S_d": of_right[..., -1],
        "S_r": straight[..., :states, -1],
    }
    if rows.right.shape[-1] > 1:
        gradients["T_dl"] = of_right[..., :-1]
        gradients["T_rl"] = straight[..., :states, :-1]
        gradients["M_l"] = straight[..., states, :-1]
    return gradients


class Diagonal:
    """Without `T_dl`: a path goes right, turns down once and stays in its column."""

    def __init__(self, gates: Gates):
        self.gates, self.rows = gates, row_maps(gates)
        states = gates.S_d.shape[-1]
        self.products = decay(gates.T_rl.transpose(2, 3))  # (N, O, Y, X, J, X', J)
        down = _product(self.products, gates.M_l.transpose(2, 3)[..., None, None], -3)  # (N, O, Y, X, X', J)
        self.down = flip_orientations(down, 1, (3, 4), (2,))
        entry, read = self.rows.map[..., 0].split([states, 1], -2)  # (N, O, X, Y, J or 1, Y')
        self.entry = flip_orientations(entry, 1, (2,), (3, 5))
        self.read = flip_orientations(read.squeeze(-2), 1, (2,), (3, 4)).sum(1)  # (N, X, Y, Y')

    def weights(self) -> Tensor:
        """G, see the head of the file."""
        total = torch.einsum("noyxaj,noayjb->nyxab", self.down, self.entry).transpose(1, 2).contiguous()
        total.diagonal(dim1=1, dim2=3).add_(self.read.movedim(1, -1))
        return total

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """grad: of G. Returns the gradients of the gates."""
        of_down = torch.einsum("nxyab,noayjb->noyxaj", grad, self.entry)
        of_entry = torch.einsum("nxyab,noyxaj->noayjb", grad, self.down)
        of_down = flip_orientations(of_down, 1, (3, 4), (2,))
        of_read = grad.diagonal(dim1=1, dim2=3).movedim(-1, 1).unsqueeze(1)  # (N, 1, X, Y, Y')
        of_read = of_read.expand(-1, of_entry.shape[1], -1, -1, -1).unsqueeze(-2)
        of_map = flip_orientations(torch.cat([of_entry, of_read], -2), 1, (2,), (3, 5))
        gradients = row_maps_backward(of_map.unsqueeze(-1), self.rows)
        mark = self.gates.M_l.transpose(2, 3)
        of_products = of_down.unsqueeze(-3) * mark[..., None, None]  # (N, O, Y, X, J, X', J)
        gradients["T_rl"] = decay_backward(of_products, self.products).transpose(2, 3)
        gradients["M_l"] = torch.einsum("noyxiaj,noyxaj->noxyi", self.products, of_down)
        return gradients


class Full:
    """With `T_dl`: rows one after the other, each a product of its map and all sources above it."""

    def __init__(self, gates: Gates):
        self.rows = row_maps(gates)
        states = gates.S_d.shape[-1]
        count, orientations, height, width = gates.S_d.shape[:4]
        self.shape, self.batch = (count, orientations), count * orientations
        self.states, self.height, self.width = states, height, width
        maps = self.rows.map.movedim(2, 0).flatten(1, 2)  # (X, N O, Y, J + 1, Y', J + 1)
        self.step = maps[:, :, :, :states, :, :states].reshape(height, self.batch, width * states, -1)
        self.mark = maps[:, :, :, states, :, :states].reshape(height, self.batch, width, -1)  # (X, N O, Y, Y' J)
        entry = maps[:, :, :, :states, :, states].movedim(-1, 2)  # (X, N O, Y', Y, J)
        read = maps[:, :, :, states, :, states].mT  # (X, N O, Y', Y)
        # what enters each row, for every source above it: sources first, so that those of the next rows come behind
        self.above = entry.new_zeros(height, self.batch, height, width, width * states)
        self._next(self.above).copy_(entry[:-1].flatten(-2).movedim(0, -1))
        flat = self.above.flatten(2, 3)  # (X, N O, X' Y', Y J)
        for x in range(1, height - 1):
            torch.bmm(flat[x, :, : x * width], self.step[x].mT, out=flat[x + 1, :, : x * width])
        self.read = read

    def _next(self, values: Tensor) -> Tensor:
        """Of values like `above`, the sources of the row right above: (N O, Y', Y J, X - 1)."""
        return values[1:].diagonal(dim1=0, dim2=2)

    def weights(self) -> Tensor:
        """G, see the head of the file."""
        total = (self.above.flatten(2, 3) @ self.mark.mT).view(*self.above.shape[:-1], self.width)
        total.diagonal(dim1=0, dim2=2).add_(self.read.movedim(0, -1))
        total = flip_orientations(total.unflatten(1, self.shape), 2, (0, 3), (4, 5)).sum(2)  # (X, N, X', Y', Y)
        return total.permute(1, 0, 4, 2, 3).contiguous()

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """grad: of G. Returns the gradients of the gates."""
        grad = grad.permute(1, 0, 3, 4, 2).unsqueeze(2).expand(-1, -1, self.shape[1], -1, -1, -1)
        grad = flip_orientations(grad, 2, (0, 3), (4, 5)).flatten(1, 2)  # (X, N O, X', Y', Y)
        flat, above = grad.flatten(2, 3), self.above.flatten(2, 3)
        of_above = flat @ self.mark  # (X, N O, X' Y', Y J)
        for x in reversed(range(1, self.height - 1)):
            seen = slice(x * self.width)
            of_above[x, :, seen].baddbmm_(of_above[x + 1, :, seen], self.step[x])
        of_map = torch.zeros_like(self.rows.map)
        maps = of_map.movedim(2, 0)  # (X, N, O, Y, J + 1, Y', J + 1)
        states, size = self.states, (*self.shape, self.width)
        of_step = of_above[1:].mT @ above[:-1]  # (X - 1, N O, Y J, Y' J)
        maps[:-1, :, :, :, :states, :, :states] = of_step.view(-1, *size, states, self.width, states)
        of_mark = flat.mT @ above  # (X, N O, Y, Y' J)
        maps[..., states, :, :states] = of_mark.view(-1, *size, self.width, states)
        of_entry = self._next(of_above.view(self.above.shape)).movedim(-1, 0)  # (X - 1, N O, Y', Y J)
        maps[:-1, :, :, :, :states, :, states] = of_entry.reshape(-1, *size, self.width, states).movedim(3, -1)
        maps[..., states, :, states] = grad.diagonal(dim1=0, dim2=2).movedim(-1, 0).unflatten(1, self.shape).mT
        return row_maps_backward(of_map, self.rows)

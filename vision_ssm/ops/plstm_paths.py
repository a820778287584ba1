"""Sums over the paths between all pairs of nodes of a grid, for pLSTM: few large matrix products, with their adjoints.

All functions work on gates in the order of the sweep (every orientation flipped so that paths lead down and right), of
shape (N, O, X, Y, ...): N heads of images, O orientations. The vertical state `l` enters a node from above, the
horizontal state `u` from the left; J numbers make up a state. Within a row, `u` is solved for: what is left is a linear
map from `l` and the sources of the row to the next `l` and the marks of the row, of which there is one per row. The map
of a row is diagonal in `l` if no horizontal path turns down again (`T_dl` absent): then rows need no loop.

The result G (N, X, Y, X', Y') has the weight with which the node (x, y) reads the node (x', y'), summed over
orientations, in the order of the map.
"""

from collections.abc import Sequence
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


def _flips(parts: Sequence[Tensor], down: tuple[int, ...], right: tuple[int, ...]) -> list[Tensor]:
    """1 or 4 orientations, 1 and 3 flipped along the axes `down`, 2 and 3 along `right`."""
    axes = ((), down, right, (*down, *right))
    return [part.flip(along) if along else part for part, along in zip(parts, axes)]


def flip_orientations(values: Tensor, axis: int, down: tuple[int, ...], right: tuple[int, ...]) -> Tensor:
    """`values` with orientations 1 and 3 of 4, along `axis`, flipped along the axes `down`, and 2 and 3 along `right`.

    It is its own inverse. A single orientation stays as it is.
    """
    if values.shape[axis] == 1:
        return values
    return torch.cat(_flips(values.split(1, axis), down, right), axis)


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
    """With `T_dl`: rows one after the other, each a product of its map and what reaches it from all sources above.

    Sources come first in the products, so that those that a row does not see lie behind those that it does.
    """

    def __init__(self, gates: Gates):
        self.rows = row_maps(gates)
        height, width, states = gates.S_d.shape[2:]
        self.shape, self.state = gates.S_d.shape[:2], states * width  # numbers that enter a row
        maps = self._turned(self.rows.map.movedim(2, 0).flatten(1, 2))  # (X, N O, J + 1, Y, J + 1, Y')
        self.step = maps[..., :states, :].flatten(4).flatten(2, 3)  # (X, N O, (J + 1) Y, J Y')
        batch, columns = self.step.shape[1:3]
        # of every row and source: the state that leaves to the next row, and the weights of the row
        self.reach = self.step.new_zeros(height, batch, height, width, columns)
        self._own(self.reach).copy_(maps[..., states, :].flatten(2, 3).permute(1, 3, 2, 0))
        reach = self.reach.flatten(2, 3)  # (X, N O, X' Y', (J + 1) Y)
        for x in range(1, height):
            above = slice(x * width)
            torch.bmm(reach[x - 1, :, above, : self.state], self.step[x].mT, out=reach[x, :, above])

    @staticmethod
    def _turned(maps: Tensor) -> Tensor:
        """(..., Y, J + 1, Y', J + 1) -> (..., J + 1, Y, J + 1, Y'), and back."""
        return maps.transpose(2, 3).transpose(4, 5)

    @staticmethod
    def _own(reach: Tensor) -> Tensor:
        """Of values like `reach`, the sources of each row in that row: (N O, Y', (J + 1) Y, X)."""
        return reach.diagonal(dim1=0, dim2=2)

    def weights(self) -> Tensor:
        """G, see the head of the file."""
        marks = self.reach[..., self.state :].unflatten(1, self.shape)
        first, *others = _flips(marks.unbind(2), (0, 2), (3, 4))  # (X, N, X', Y', Y) each
        return sum(others, first).permute(1, 0, 4, 2, 3).contiguous()

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """grad: of G. Returns the gradients of the gates."""
        grad = grad.permute(1, 0, 3, 4, 2).contiguous()  # (X, N, X', Y', Y)
        of_reach = torch.zeros_like(self.reach)
        of_marks = of_reach[..., self.state :].unflatten(1, self.shape)
        for i, values in enumerate(_flips([grad] * self.shape[1], (0, 2), (3, 4))):
            of_marks[:, :, i] = values
        height, width = self.reach.shape[2:4]
        flat, reach = of_reach.flatten(2, 3), self.reach.flatten(2, 3)
        for x in reversed(range(1, height)):
            above = slice(x * width)
            torch.bmm(flat[x, :, above], self.step[x], out=flat[x - 1, :, above, : self.state])
        states, columns = self.state // width, self.step.shape[2]
        of_maps = self.step.new_zeros(height, self.step.shape[1], columns, states + 1, width)
        of_step = flat[1:].mT @ reach[:-1, ..., : self.state]  # (X - 1, N O, (J + 1) Y, J Y'); nothing enters row 0
        of_maps[1:, :, :, :states] = of_step.unflatten(3, (states, width))
        of_maps[:, :, :, states] = self._own(of_reach).permute(3, 0, 2, 1)
        of_map = self._turned(of_maps.unflatten(2, (states + 1, width)))
        return row_maps_backward(of_map.unflatten(1, self.shape).movedim(0, 2), self.rows)

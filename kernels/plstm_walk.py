"""Walks over a grid for pLSTM: weights with which nodes read each other, and gradients of the gates.

Each lane of a program is a source, whose state it walks over the grid, row by row: what it reads on its way is a column
of the matrix of weights. The vertical states of a row wait in memory for the next one; only the lane that wrote them
reads them, so nothing waits for other lanes. The backward pass walks every source back along its way. Gradients are
summed in each program, and afterwards over the blocks of sources, always in one order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div

_LANES = 32  # sources of a program: one warp
_COLUMNS = 8  # nodes whose states are loaded together


class _Layout(NamedTuple):
    """Places of the gates of a node, J x J or J numbers each; T_dl, if there is one, comes last."""

    T_rl: int
    T_du: int
    T_ru: int
    S_r: int
    S_d: int
    M_l: int
    M_u: int
    T_dl: int
    count: int

    @classmethod
    def of(cls, states: int, turns_down: bool) -> "_Layout":
        sizes = [states**2] * 3 + [states] * 4 + [states**2 * turns_down]
        places = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return cls(*places)


@triton.jit
def _moved(state, transition, added, STATES: tl.constexpr, TURNED: tl.constexpr):
    """``added + T @ state``, or with the transpose of T if TURNED; `transition` points to T, (J, J)."""
    result = ()
    for i in tl.static_range(STATES):
        value = added[i]
        for j in tl.static_range(STATES):
            place = transition + (j * STATES + i if TURNED else i * STATES + j)
            value += tl.load(place) * state[j]
        result = result + (value,)
    return result


@triton.jit
def _scaled(factor, vector, added, STATES: tl.constexpr):
    """``added + factor * v``; `vector` points to the J numbers of v."""
    result = ()
    for i in tl.static_range(STATES):
        result = result + (added[i] + factor * tl.load(vector + i),)
    return result


@triton.jit
def _nothing(LANES: tl.constexpr, STATES: tl.constexpr):
    result = ()
    for _ in tl.static_range(STATES):
        result = result + (tl.zeros([LANES], tl.float32),)
    return result


@triton.jit
def _load_states(place, step, mask, STATES: tl.constexpr):
    """J tiles [LANES], `step` numbers apart."""
    result = ()
    for i in tl.static_range(STATES):
        result = result + (tl.load(place + i * step, mask=mask, other=0.0),)
    return result


@triton.jit
def _store_states(place, states, step, mask, STATES: tl.constexpr):
    for i in tl.static_range(STATES):
        tl.store(place + i * step, states[i], mask=mask)


@triton.jit
def _task(first_sequence, height, width, LANES: tl.constexpr, HEADS: tl.constexpr):
    """Of a program that walks: its sources, number of its sequence here, image, head, first and last row of sources."""
    blocks = tl.cdiv(height * width, LANES)
    pid = tl.program_id(0)
    block = pid % blocks
    local = (pid // blocks).to(tl.int64)
    sequence = local + first_sequence
    last = tl.minimum(block * LANES + LANES, height * width) - 1
    source = block * LANES + tl.arange(0, LANES)
    return source, block, local, sequence // HEADS, sequence % HEADS, block * LANES // width, last // width


@triton.jit
def _walk(
    gates,  # of this head and orientation, of the node (0, 0)
    weights,  # (cells, padded) of this sequence, or None
    kept,  # (2, J, cells, LANES) of this program, or None: the states that enter every node
    line,  # (J, width, LANES) of this program: vertical states that enter the next row
    source,
    first_row,
    rows,
    rising,
    leftward,
    height,
    width,
    padded,
    NODE: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    T_RL: tl.constexpr,
    T_DU: tl.constexpr,
    T_RU: tl.constexpr,
    S_R: tl.constexpr,
    S_D: tl.constexpr,
    M_L: tl.constexpr,
    M_U: tl.constexpr,
    T_DL: tl.constexpr,
    TURNS_DOWN: tl.constexpr,
):
    """One orientation of the walk of all sources of a program; what they read is added to `weights`."""
    lane = tl.arange(0, LANES)
    nothing = _nothing(LANES, STATES)
    for column in range(0, width):
        _store_states(line + column * LANES + lane, nothing, width * LANES, lane >= 0, STATES)
    for turn in range(0, rows):
        row = first_row - turn if rising else first_row + turn
        horizontal = nothing
        for start in range(0, width, COLUMNS):
            entering = ()
            before = ()
            for c in tl.static_range(COLUMNS):
                column = tl.minimum(start + c, width - 1)
                column = width - 1 - column if leftward else column
                inside = lane * 0 + (start + c) < width
                entering = entering + (
                    _load_states(line + column * LANES + lane, width * LANES, inside, STATES),
                )
                if weights is not None:
                    place = weights + (row * width + column).to(tl.int64) * padded + source
                    before = before + (tl.load(place, mask=inside, other=0.0),)
            leaving = ()
            passing = ()
            after = ()
            for c in tl.static_range(COLUMNS):
                column = tl.minimum(start + c, width - 1)
                column = width - 1 - column if leftward else column
                node = row * width + column
                gate = gates + node.to(tl.int64) * NODE
                here = tl.where(source == node, 1.0, 0.0)
                vertical = entering[c]
                passing = passing + (horizontal,)
                if weights is not None:
                    read = before[c]
                    for i in tl.static_range(STATES):
                        read += vertical[i] * tl.load(gate + M_L + i) + horizontal[i] * tl.load(gate + M_U + i)
                    after = after + (read,)
                down = _scaled(here, gate + S_R, nothing, STATES)
                down = _moved(vertical, gate + T_RL, down, STATES, False)
                leaving = leaving + (_moved(horizontal, gate + T_RU, down, STATES, False),)
                right = _scaled(here, gate + S_D, nothing, STATES)
                right = _moved(horizontal, gate + T_DU, right, STATES, False)
                if TURNS_DOWN:
                    right = _moved(vertical, gate + T_DL, right, STATES, False)
                horizontal = right
            for c in tl.static_range(COLUMNS):
                column = tl.minimum(start + c, width - 1)
                column = width - 1 - column if leftward else column
                node = row * width + column
                inside = lane * 0 + (start + c) < width
                _store_states(line + column * LANES + lane, leaving[c], width * LANES, inside, STATES)
                if weights is not None:
                    tl.store(weights + node.to(tl.int64) * padded + source, after[c], mask=inside)
                if kept is not None:
                    place = kept + node * LANES + lane
                    step = height * width * LANES
                    _store_states(place, entering[c], step, inside, STATES)
                    _store_states(place + STATES * step, passing[c], step, inside, STATES)


@triton.jit
def _plstm_weights_kernel(
    gates,  # (B, cells, heads, orientations, COUNT)
    weights,  # (sequences, cells, padded), zeros: of the node that reads, and the source
    lines,  # (programs, J, width, LANES)
    first_sequence, height, width, padded,
    HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
    T_RL: tl.constexpr, T_DU: tl.constexpr, T_RU: tl.constexpr, S_R: tl.constexpr, S_D: tl.constexpr,
    M_L: tl.constexpr, M_U: tl.constexpr, T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    NODE: tl.constexpr = HEADS * ORIENTATIONS * COUNT
    source, _, local, image, head, top, bottom = _task(first_sequence, height, width, LANES, HEADS)
    weights += local * height * width * padded
    line = lines + tl.program_id(0).to(tl.int64) * (STATES * width * LANES)
    for orientation in range(0, ORIENTATIONS):
        rising = orientation % 2 == 1
        base = gates + image * height * width * NODE + (head * ORIENTATIONS + orientation) * COUNT
        first_row = tl.where(rising, bottom, top)
        rows = tl.where(rising, bottom + 1, height - top)
        _walk(
            base, weights, None, line, source, first_row, rows, rising, orientation // 2 == 1, height, width, padded,
            NODE, STATES, LANES, COLUMNS, T_RL, T_DU, T_RU, S_R, S_D, M_L, M_U, T_DL, TURNS_DOWN,
        )  # fmt: skip


@triton.jit
def _plstm_gates_kernel(
    gates,  # (B, cells, heads, orientations, COUNT)
    of_weights,  # (sequences, cells, padded)
    lines,  # (programs, J, width, LANES)
    kept,  # (programs, 2, J, cells, LANES)
    partial,  # (blocks, sequences, cells, orientations, COUNT), zeros: what each block adds to the gradients
    first_sequence, sequences, height, width, padded,
    HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
    T_RL: tl.constexpr, T_DU: tl.constexpr, T_RU: tl.constexpr, S_R: tl.constexpr, S_D: tl.constexpr,
    M_L: tl.constexpr, M_U: tl.constexpr, T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    NODE: tl.constexpr = HEADS * ORIENTATIONS * COUNT
    source, block, local, image, head, top, bottom = _task(first_sequence, height, width, LANES, HEADS)
    cells = height * width
    lane = tl.arange(0, LANES)
    every = lane >= 0
    program = tl.program_id(0).to(tl.int64)
    of_weights += local * cells * padded
    line = lines + program * (STATES * width * LANES)
    kept += program * (2 * STATES * LANES) * cells
    step = cells * LANES  # between states of one node
    partial += (block * sequences + local) * cells * (ORIENTATIONS * COUNT)
    nothing = _nothing(LANES, STATES)
    for orientation in range(0, ORIENTATIONS):
        rising = orientation % 2 == 1
        leftward = orientation // 2 == 1
        base = gates + image * cells * NODE + (head * ORIENTATIONS + orientation) * COUNT
        first_row = tl.where(rising, bottom, top)
        rows = tl.where(rising, bottom + 1, height - top)
        _walk(
            base, None, kept, line, source, first_row, rows, rising, leftward, height, width, padded,
            NODE, STATES, LANES, COLUMNS, T_RL, T_DU, T_RU, S_R, S_D, M_L, M_U, T_DL, TURNS_DOWN,
        )  # fmt: skip
        # and back: gradients of the states that leave a node, down from the line and right from the node before
        for column in range(0, width):
            _store_states(line + column * LANES + lane, nothing, width * LANES, every, STATES)
        for turn in range(0, rows):
            row = first_row - (rows - 1 - turn) if rising else first_row + (rows - 1 - turn)
            of_right = nothing
            for number in range(0, width):
                column = number if leftward else width - 1 - number
                node = row * width + column
                gate = base + node.to(tl.int64) * NODE
                target = partial + (node.to(tl.int64) * ORIENTATIONS + orientation) * COUNT
                of_down = _load_states(line + column * LANES + lane, width * LANES, every, STATES)
                vertical = _load_states(kept + node * LANES + lane, step, every, STATES)
                horizontal = _load_states(kept + STATES * step + node * LANES + lane, step, every, STATES)
                grad = tl.load(of_weights + node.to(tl.int64) * padded + source)
                here = source == node
                for i in tl.static_range(STATES):
                    tl.store(target + M_L + i, tl.sum(grad * vertical[i], 0))
                    tl.store(target + M_U + i, tl.sum(grad * horizontal[i], 0))
                    # only the lane of the node itself has a share
                    tl.store(target + S_R + i + tl.zeros([LANES], tl.int32), of_down[i], mask=here)
                    tl.store(target + S_D + i + tl.zeros([LANES], tl.int32), of_right[i], mask=here)
                    for j in tl.static_range(STATES):
                        k = i * STATES + j
                        tl.store(target + T_RL + k, tl.sum(of_down[i] * vertical[j], 0))
                        tl.store(target + T_RU + k, tl.sum(of_down[i] * horizontal[j], 0))
                        tl.store(target + T_DU + k, tl.sum(of_right[i] * horizontal[j], 0))
                        if TURNS_DOWN:
                            tl.store(target + T_DL + k, tl.sum(of_right[i] * vertical[j], 0))
                of_vertical = _scaled(grad, gate + M_L, nothing, STATES)
                of_vertical = _moved(of_down, gate + T_RL, of_vertical, STATES, True)
                if TURNS_DOWN:
                    of_vertical = _moved(of_right, gate + T_DL, of_vertical, STATES, True)
                of_horizontal = _scaled(grad, gate + M_U, nothing, STATES)
                of_horizontal = _moved(of_down, gate + T_RU, of_horizontal, STATES, True)
                of_right = _moved(of_right, gate + T_DU, of_horizontal, STATES, True)
                _store_states(line + column * LANES + lane, of_vertical, width * LANES, every, STATES)


class Walk:
    """Gates of the nodes of a map, packed, and the walks over it.

    Args:
        gates: by name: transitions (B, X, Y, H, O, J, J), T_dl may be None; sources and marks (B, X, Y, H, O, J).
    """

    def __init__(self, gates: dict[str, Tensor | None]):
        given = [gates[name] for name in _Layout._fields[:-1]]
        parts = [gate.flatten(5).float() for gate in given if gate is not None]
        self.gates = torch.cat(parts, -1)  # (B, X, Y, H, O, COUNT)
        _, self.height, self.width, self.heads, self.orientations, _ = self.gates.shape
        self.states = parts[3].shape[-1]
        self.layout = _Layout.of(self.states, given[-1] is not None)
        self.cells = self.height * self.width
        self.padded = ceil_div(self.cells, _LANES) * _LANES
        self.blocks = self.padded // _LANES

    def _lines(self, count: int) -> Tensor:
        return self.gates.new_empty(count * self.blocks, self.states, self.width, _LANES)

    def _constants(self) -> dict[str, Any]:
        places = {name.upper(): place for name, place in self.layout._asdict().items()}
        return dict(
            HEADS=self.heads, ORIENTATIONS=self.orientations, STATES=self.states, LANES=_LANES, COLUMNS=_COLUMNS,
            TURNS_DOWN=self.layout.T_dl < self.layout.count, num_warps=1, **places,
        )  # fmt: skip

    def weights(self, first: int, count: int) -> Tensor:
        """Weights of `count` heads of images from number `first` on: (count, cells, padded), node and source."""
        weights = self.gates.new_zeros(count, self.cells, self.padded)
        launch(
            _plstm_weights_kernel, (count * self.blocks,),
            self.gates, weights, self._lines(count), first, self.height, self.width, self.padded, **self._constants(),
        )  # fmt: skip
        return weights

    def of_gates(self, of_weights: Tensor, first: int) -> Tensor:
        """Gradients of the gates of these heads, (count, cells, O, COUNT), from that of the weights."""
        count = len(of_weights)
        partial = of_weights.new_zeros(self.blocks, count, self.cells, self.orientations, self.layout.count)
        kept = of_weights.new_empty(count * self.blocks, 2, self.states, self.cells, _LANES)
        launch(
            _plstm_gates_kernel, (count * self.blocks,),
            self.gates, of_weights, self._lines(count), kept, partial, first, count, self.height, self.width,
            self.padded, **self._constants(),
        )  # fmt: skip
        return partial.sum(0)

    def unpacked(self, gradients: Tensor) -> dict[str, Tensor]:
        """Gradients (B, X, Y, H, O, COUNT) of the gates that are given, by name."""
        parts = {}
        for name, place in self.layout._asdict().items():
            if place < self.layout.count:
                transition = name.startswith("T")
                part = gradients[..., place : place + (self.states**2 if transition else self.states)]
                parts[name] = part.unflatten(-1, (self.states, self.states)) if transition else part
        return parts

"""Walks over a grid for pLSTM: weights with which nodes read each other, and gradients of the gates.

Each lane of a warp is a source, whose state it walks over the grid, row by row: what it reads on its way is a column of
the matrix of weights. A program walks its sources up or down, with a warp for each direction along a row. The vertical
states of a row wait in memory for the next one; only the lane that wrote them reads them, so nothing waits for other
lanes. The backward pass walks every source back along its way. Gradients are summed in each program, and afterwards
over the blocks of sources, always in one order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div
from .tiles import INTERPRETED

_LANES = 32  # sources of a program, in each of its warps
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
def _outer(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Products of all pairs of tiles of two tuples."""
    result = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            result = result + (a[i] * b[j],)
    return result


@triton.jit
def _nothing(SIDES: tl.constexpr, LANES: tl.constexpr, STATES: tl.constexpr):
    result = ()
    for _ in tl.static_range(STATES):
        result = result + (tl.zeros([SIDES, LANES], tl.float32),)
    return result


@triton.jit
def _load_states(place, step, mask, STATES: tl.constexpr):
    """J tiles, `step` numbers apart; zeros where `mask` is not set."""
    result = ()
    for i in tl.static_range(STATES):
        result = result + (tl.load(place + i * step, mask=mask, other=0.0),)
    return result


@triton.jit
def _store_states(place, states, step, mask, STATES: tl.constexpr):
    for i in tl.static_range(STATES):
        tl.store(place + i * step, states[i], mask=mask)


@triton.jit
def _where(condition, states, others, STATES: tl.constexpr):
    result = ()
    for i in tl.static_range(STATES):
        result = result + (tl.where(condition, states[i], others[i]),)
    return result


@triton.jit
def _exchanged(value, DISTANCE: tl.constexpr):
    """What the lane whose number differs in the bit DISTANCE holds."""
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 0x1f, 0xffffffff;", "=f,f", [value], tl.float32, is_pure=False, pack=1
    )


@triton.jit
def _halved(values, lane, DISTANCE: tl.constexpr, COUNT: tl.constexpr):
    """Half as many tiles: of two, each lane goes on with one, to which its partner adds; the bit says which."""
    odd = (lane & DISTANCE) != 0
    result = ()
    for i in tl.static_range(COUNT // 2):
        kept = tl.where(odd, values[2 * i + 1], values[2 * i])
        given = tl.where(odd, values[2 * i], values[2 * i + 1])
        result = result + (kept + _exchanged(given, DISTANCE),)
    return result


@triton.jit
def _lane_sums(values, FIRST: tl.constexpr, COUNT: tl.constexpr, lane):
    """Sums over 32 lanes of eight tiles of a tuple of COUNT, from FIRST on: lane l gets that of tile l % 8.

    Lanes share the sums from the start, which takes 9 exchanges instead of 40.
    """
    nothing = tl.zeros(values[0].shape, tl.float32)
    eight = ()
    for k in tl.static_range(8):
        if FIRST + k < COUNT:
            eight = eight + (values[FIRST + k],)
        else:
            eight = eight + (nothing,)
    if INTERPRETED:
        result = nothing
        for k in tl.static_range(8):
            result = tl.where(lane % 8 == k, tl.sum(eight[k], 1, keep_dims=True), result)
        return result
    else:
        total = _halved(_halved(_halved(eight, lane, 1, 8), lane, 2, 4), lane, 4, 2)[0]
        total += _exchanged(total, 8)
        return total + _exchanged(total, 16)


@triton.jit
def _task(
    first_sequence, height, width, HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, SIDES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Of a program: block of sources, number of its sequence here, image, head, step of its rows, first row, rows."""
    blocks = tl.cdiv(height * width, LANES)
    pid = tl.program_id(0)
    rising = pid % (ORIENTATIONS // SIDES)
    block = pid // (ORIENTATIONS // SIDES) % blocks
    local = (pid // (ORIENTATIONS // SIDES) // blocks).to(tl.int64)
    sequence = local + first_sequence
    last = tl.minimum(block * LANES + LANES, height * width) - 1
    top, bottom = block * LANES // width, last // width
    first_row = tl.where(rising == 1, bottom, top)
    rows = tl.where(rising == 1, bottom + 1, height - top)
    return block, local, sequence // HEADS, sequence % HEADS, 1 - 2 * rising, first_row, rows


@triton.jit
def _column(number, leftward, width):
    """Column of the node that is `number` steps from the start of a row, [SIDES, 1]; the last one beyond."""
    number = tl.minimum(number, width - 1)
    return tl.where(leftward, width - 1 - number, number)


@triton.jit
def _right(
    gate, here, vertical, horizontal, nothing, STATES: tl.constexpr, S_D: tl.constexpr, T_DU: tl.constexpr,
    T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    """What leaves a node to the next column."""
    result = _scaled(here, gate + S_D, nothing, STATES)
    result = _moved(horizontal, gate + T_DU, result, STATES, False)
    if TURNS_DOWN:
        result = _moved(vertical, gate + T_DL, result, STATES, False)
    return result


@triton.jit
def _walk(
    gates,  # (cells, heads, orientations, COUNT) of this image
    weights,  # (cells, padded) of this sequence, or None: what is read is added
    kept,  # (J, cells, SIDES, LANES) of this program, or None: vertical states that enter every node
    starts,  # (J, height, parts, SIDES, LANES), or None: horizontal states that enter every part of a row
    line,  # (J, width, SIDES, LANES) of this program: vertical states that enter the next row
    block, head, step, first_row, rows, height, width, padded,
    HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, SIDES: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
    T_RL: tl.constexpr, T_DU: tl.constexpr, T_RU: tl.constexpr, S_R: tl.constexpr, S_D: tl.constexpr,
    M_L: tl.constexpr, M_U: tl.constexpr, T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    NODE: tl.constexpr = HEADS * ORIENTATIONS * COUNT
    TILE: tl.constexpr = SIDES * LANES
    side = tl.arange(0, SIDES)[:, None]
    leftward = side == 1
    source = (block * LANES + tl.arange(0, LANES))[None, :]
    tile = side * LANES + tl.arange(0, LANES)[None, :]
    gates += (head * ORIENTATIONS + (1 - step) // 2 + 2 * side) * COUNT
    nothing = _nothing(SIDES, LANES, STATES)
    for number in range(0, width):
        _store_states(line + number * TILE + tile, nothing, width * TILE, tile >= 0, STATES)
    for turn in range(0, rows):
        row = first_row + step * turn
        horizontal = nothing
        for start in range(0, width, COLUMNS):
            entering = ()
            for c in tl.static_range(COLUMNS):
                place = line + tl.minimum(start + c, width - 1) * TILE + tile
                entering = entering + (_load_states(place, width * TILE, tile >= 0, STATES),)
            if starts is not None:
                parts = tl.cdiv(width, COLUMNS)
                place = starts + (row * parts + start // COLUMNS) * TILE + tile
                _store_states(place, horizontal, height * parts * TILE, tile >= 0, STATES)
            leaving = ()
            reading = ()
            for c in tl.static_range(COLUMNS):
                node = row * width + _column(start + c, leftward, width)
                gate = gates + node.to(tl.int64) * NODE
                here = tl.where(source == node, 1.0, 0.0)
                vertical = entering[c]
                if weights is not None:
                    read = tl.zeros([SIDES, LANES], tl.float32)
                    for i in tl.static_range(STATES):
                        read += vertical[i] * tl.load(gate + M_L + i) + horizontal[i] * tl.load(gate + M_U + i)
                    reading = reading + (read,)
                down = _scaled(here, gate + S_R, nothing, STATES)
                down = _moved(vertical, gate + T_RL, down, STATES, False)
                leaving = leaving + (_moved(horizontal, gate + T_RU, down, STATES, False),)
                horizontal = _right(gate, here, vertical, horizontal, nothing, STATES, S_D, T_DU, T_DL, TURNS_DOWN)
            for c in tl.static_range(COLUMNS):
                number = start + c
                column = _column(number, leftward, width)
                node = row * width + column
                inside = tile * 0 + number < width
                _store_states(line + number * TILE + tile, leaving[c], width * TILE, inside, STATES)
                if kept is not None:
                    _store_states(kept + node * TILE + tile, entering[c], height * width * TILE, inside, STATES)
                if weights is not None:
                    across = tl.where(leftward, column <= source % width, column >= source % width)
                    along = (row - source // width) * step >= 0
                    # two orientations at most reach the same node, so the order of the sum does not matter
                    place = weights + node.to(tl.int64) * padded + source
                    tl.atomic_add(place, reading[c], mask=inside & across & along, sem="relaxed")


@triton.jit
def _plstm_weights_kernel(
    gates,  # (B, cells, heads, orientations, COUNT)
    weights,  # (sequences, cells, padded), zeros: of the node that reads, and the source
    lines,  # (programs, J, width, SIDES, LANES)
    first_sequence, height, width, padded,
    HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, SIDES: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
    T_RL: tl.constexpr, T_DU: tl.constexpr, T_RU: tl.constexpr, S_R: tl.constexpr, S_D: tl.constexpr,
    M_L: tl.constexpr, M_U: tl.constexpr, T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    block, local, image, head, step, first_row, rows = _task(
        first_sequence, height, width, HEADS, ORIENTATIONS, SIDES, LANES
    )
    weights += local * height * width * padded
    gates += image * height * width * (HEADS * ORIENTATIONS * COUNT)
    line = lines + tl.program_id(0).to(tl.int64) * (STATES * width * SIDES * LANES)
    _walk(
        gates, weights, None, None, line, block, head, step, first_row, rows, height, width, padded, HEADS,
        ORIENTATIONS, SIDES, COUNT, STATES, LANES, COLUMNS, T_RL, T_DU, T_RU, S_R, S_D, M_L, M_U, T_DL, TURNS_DOWN,
    )  # fmt: skip


@triton.jit
def _plstm_gates_kernel(
    gates,  # (B, cells, heads, orientations, COUNT)
    of_weights,  # (sequences, cells, padded)
    lines,  # (programs, J, width, SIDES, LANES)
    kept,  # (programs, J, cells, SIDES, LANES)
    starts,  # (programs, J, height, parts, SIDES, LANES)
    partial,  # (blocks, sequences, cells, orientations, COUNT), zeros: what each block adds to the gradients
    first_sequence, sequences, height, width, padded,
    HEADS: tl.constexpr, ORIENTATIONS: tl.constexpr, SIDES: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr,
    T_RL: tl.constexpr, T_DU: tl.constexpr, T_RU: tl.constexpr, S_R: tl.constexpr, S_D: tl.constexpr,
    M_L: tl.constexpr, M_U: tl.constexpr, T_DL: tl.constexpr, TURNS_DOWN: tl.constexpr,
):  # fmt: skip
    NODE: tl.constexpr = HEADS * ORIENTATIONS * COUNT
    TILE: tl.constexpr = SIDES * LANES
    block, local, image, head, step, first_row, rows = _task(
        first_sequence, height, width, HEADS, ORIENTATIONS, SIDES, LANES
    )
    cells = height * width
    parts = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    gates += image * cells * NODE
    of_weights += local * cells * padded
    line = lines + program * (STATES * TILE) * width
    kept += program * (STATES * TILE) * cells
    starts += program * (STATES * TILE) * (height * parts)
    partial += (block * sequences + local) * cells * (ORIENTATIONS * COUNT)
    _walk(
        gates, None, kept, starts, line, block, head, step, first_row, rows, height, width, padded, HEADS,
        ORIENTATIONS, SIDES, COUNT, STATES, LANES, COLUMNS, T_RL, T_DU, T_RU, S_R, S_D, M_L, M_U, T_DL, TURNS_DOWN,
    )  # fmt: skip

    # and back, part by part: horizontal states are found again, then gradients of what leaves the nodes are walked
    side = tl.arange(0, SIDES)[:, None]
    leftward = side == 1
    orientation = (1 - step) // 2 + 2 * side
    lane = tl.arange(0, LANES)[None, :]
    source = block * LANES + lane
    tile = side * LANES + lane
    gates += (head * ORIENTATIONS + orientation) * COUNT
    nothing = _nothing(SIDES, LANES, STATES)
    for number in range(0, width):
        _store_states(line + number * TILE + tile, nothing, width * TILE, tile >= 0, STATES)
    for turn in range(0, rows):
        row = first_row + step * (rows - 1 - turn)
        of_right = nothing
        for back in range(0, parts):
            part = parts - 1 - back
            place = starts + (row * parts + part) * TILE + tile
            horizontal = _load_states(place, height * parts * TILE, tile >= 0, STATES)
            entering = ()
            passing = ()
            of_entered = ()
            of_read = ()
            for c in tl.static_range(COLUMNS):
                number = part * COLUMNS + c
                inside = tile * 0 + number < width
                node = row * width + _column(number, leftward, width)
                entering = entering + (_load_states(kept + node * TILE + tile, cells * TILE, inside, STATES),)
                of_entered = of_entered + (_load_states(line + number * TILE + tile, width * TILE, inside, STATES),)
                place = of_weights + node.to(tl.int64) * padded + source
                of_read = of_read + (tl.load(place, mask=inside, other=0.0),)
            for c in tl.static_range(COLUMNS):
                node = row * width + _column(part * COLUMNS + c, leftward, width)
                gate = gates + node.to(tl.int64) * NODE
                here = tl.where(source == node, 1.0, 0.0)
                passing = passing + (horizontal,)
                horizontal = _right(gate, here, entering[c], horizontal, nothing, STATES, S_D, T_DU, T_DL, TURNS_DOWN)
            for turned in tl.static_range(COLUMNS):
                number = part * COLUMNS + COLUMNS - 1 - turned
                present = tile * 0 + number < width
                node = row * width + _column(number, leftward, width)
                gate = gates + node.to(tl.int64) * NODE
                vertical, horizontal = entering[COLUMNS - 1 - turned], passing[COLUMNS - 1 - turned]
                of_down, grad = of_entered[COLUMNS - 1 - turned], of_read[COLUMNS - 1 - turned]
                here = tl.where(source == node, 1.0, 0.0)
                shares = _outer(of_down, vertical, STATES, STATES)  # in the order of the gates
                shares = shares + _outer(of_right, horizontal, STATES, STATES)
                shares = shares + _outer(of_down, horizontal, STATES, STATES)
                shares = shares + _outer(of_down, (here,), STATES, 1) + _outer(of_right, (here,), STATES, 1)
                shares = shares + _outer(vertical, (grad,), STATES, 1) + _outer(horizontal, (grad,), STATES, 1)
                if TURNS_DOWN:
                    shares = shares + _outer(of_right, vertical, STATES, STATES)
                target = partial + (node.to(tl.int64) * ORIENTATIONS + orientation) * COUNT
                for first in tl.static_range(0, COUNT, 8):
                    sums = _lane_sums(shares, first, COUNT, lane)
                    tl.store(target + first + lane, sums, mask=present & (lane < 8) & (first + lane < COUNT))
                of_vertical = _scaled(grad, gate + M_L, nothing, STATES)
                of_vertical = _moved(of_down, gate + T_RL, of_vertical, STATES, True)
                if TURNS_DOWN:
                    of_vertical = _moved(of_right, gate + T_DL, of_vertical, STATES, True)
                of_horizontal = _scaled(grad, gate + M_U, nothing, STATES)
                of_horizontal = _moved(of_down, gate + T_RU, of_horizontal, STATES, True)
                of_horizontal = _moved(of_right, gate + T_DU, of_horizontal, STATES, True)
                of_right = _where(present, of_horizontal, of_right, STATES)
                _store_states(line + number * TILE + tile, of_vertical, width * TILE, present, STATES)


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
        self.sides = (self.orientations + 1) // 2  # directions along a row that a program walks, in a warp each
        self.programs = self.blocks * (self.orientations // self.sides)  # of a head

    def _lines(self, count: int) -> Tensor:
        return self.gates.new_empty(count * self.programs, self.states, self.width, self.sides, _LANES)

    def _constants(self) -> dict[str, Any]:
        places = {name.upper(): place for name, place in self.layout._asdict().items()}
        return dict(
            HEADS=self.heads, ORIENTATIONS=self.orientations, SIDES=self.sides, STATES=self.states, LANES=_LANES,
            COLUMNS=_COLUMNS, TURNS_DOWN=self.layout.T_dl < self.layout.count, num_warps=self.sides, **places,
        )  # fmt: skip

    def weights(self, first: int, count: int) -> Tensor:
        """Weights of `count` heads of images from number `first` on: (count, cells, padded), node and source."""
        weights = self.gates.new_zeros(count, self.cells, self.padded)
        launch(
            _plstm_weights_kernel, (count * self.programs,),
            self.gates, weights, self._lines(count), first, self.height, self.width, self.padded, **self._constants(),
        )  # fmt: skip
        return weights

    def of_gates(self, of_weights: Tensor, first: int) -> Tensor:
        """Gradients of the gates of these heads, (count, cells, O, COUNT), from that of the weights."""
        count = len(of_weights)
        partial = of_weights.new_zeros(self.blocks, count, self.cells, self.orientations, self.layout.count)
        states = (count * self.programs, self.states)
        kept = of_weights.new_empty(*states, self.cells, self.sides, _LANES)
        starts = of_weights.new_empty(*states, self.height, ceil_div(self.width, _COLUMNS), self.sides, _LANES)
        launch(
            _plstm_gates_kernel, (count * self.programs,),
            self.gates, of_weights, self._lines(count), kept, starts, partial, first, count, self.height, self.width,
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

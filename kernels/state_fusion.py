"""Fusion of states with those of neighbouring cells, the read-out, and its gradients.

Three dilated 3 x 3 kernels share their middle, so an output has 25 taps. A program owns a band of rows of one image and
a block of channels, and goes through the band in tiles of POSITIONS cells. Every tap is a load of its own, at an index
that is clamped to the map: most of them are found in the L1 cache, because the rows of a band overlap. The weights stay
in registers.

The gradient of the states is gathered as well. A cell at the edge stands for all cells beyond it, so its gradient is
the sum of theirs: the last kernel computes the gradient of the map with a margin of repeated cells, and adds up what
belongs to one cell before anything is stored. Gradients of parameters are summed per program and then over the
programs, always in one order.

Tuples of taps are ordered by kernel, then as the kernel is stored; the middle is that of the first kernel alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .depthwise_conv import lines
from .launch import launch
from .sizes import ceil_div, power_of_2

_TAPS: tl.constexpr = tl.constexpr(25)
_MARGIN: tl.constexpr = tl.constexpr(5)

_WARPS = 4
_ROWS = 8  # of a band, at most; 10 more are read with them
_CHANNELS = 32  # of a block: 128 bytes of float32


@triton.jit
def _load_taps(kernels, channel, inside, DIM: tl.constexpr):
    """The weights (3, DIM, 3, 3) of these channels, one tile [1, BC] for each tap."""
    taps = ()
    for i in tl.static_range(3):
        for j in tl.static_range(9):
            if i == 0 or j != 4:
                tap = tl.load(kernels + (i * DIM + channel) * 9 + j, mask=inside, other=0.0)
                if j == 4:
                    tap += tl.load(kernels + (DIM + channel) * 9 + j, mask=inside, other=0.0)
                    tap += tl.load(kernels + (2 * DIM + channel) * 9 + j, mask=inside, other=0.0)
                taps = taps + (tap[None, :],)
    return taps


@triton.jit
def _load_neighbours(states, image, row, column, height, width, channel, live, DIM: tl.constexpr):
    """The state that each tap sees from (row, column), 1-D each: tiles [POSITIONS, BC]."""
    tiles = ()
    for i in tl.static_range(3):
        for a in tl.static_range(3):
            line = tl.minimum(tl.maximum(row + (a - 1) * (2 * i + 1), 0), height - 1) * width
            for b in tl.static_range(3):
                if i == 0 or a != 1 or b != 1:
                    cell = line + tl.minimum(tl.maximum(column + (b - 1) * (2 * i + 1), 0), width - 1)
                    offset = ((image + cell) * DIM)[:, None] + channel[None, :]
                    tiles = tiles + (tl.load(states + offset, mask=live, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _load_gradients(
    grad, C, image, row, column, height, width, channel, inside, DIM: tl.constexpr, C_LINE: tl.constexpr
):
    """For each tap, the gradient of the fused state whose tap falls on (row, column); 0 where there is no such cell."""
    tiles = ()
    for i in tl.static_range(3):
        for a in tl.static_range(3):
            above = row - (a - 1) * (2 * i + 1)
            for b in tl.static_range(3):
                if i == 0 or a != 1 or b != 1:
                    left = column - (b - 1) * (2 * i + 1)
                    mask = (above >= 0) & (above < height) & (left >= 0) & (left < width)
                    cell = image + above * width + left
                    offset = (cell * DIM)[:, None] + channel[None, :]
                    value = tl.load(grad + offset, mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
                    tiles = tiles + (value * tl.load(C + cell * C_LINE, mask=mask, other=0.0).to(tl.float32)[:, None],)
    return tiles


@triton.jit
def _state_fusion_forward_kernel(
    states,
    kernels,
    C,
    D,
    x,
    out,
    height,
    width,
    bands,
    rows,
    DIM: tl.constexpr,
    C_LINE: tl.constexpr,
    X_LINE: tl.constexpr,
    POSITIONS: tl.constexpr,
    BC: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    channel = program % BLOCKS * BC + tl.arange(0, BC)
    inside = channel < DIM
    program = program // BLOCKS
    first = program % bands * rows
    image = (program // bands).to(tl.int64) * height * width
    count = tl.minimum(rows, height - first) * width
    taps = _load_taps(kernels, channel, inside, DIM)
    skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, rows * width, POSITIONS):
        number = start + tl.arange(0, POSITIONS)
        owned = number < count
        live = owned[:, None] & inside[None, :]
        row = first + number // width
        tiles = _load_neighbours(states, image, row, number % width, height, width, channel, live, DIM)
        fused = tl.zeros([POSITIONS, BC], tl.float32)
        for t in tl.static_range(_TAPS):
            fused += tiles[t] * taps[t]
        here = image + first * width + number
        read_out = tl.load(C + here * C_LINE, mask=owned, other=0.0).to(tl.float32)[:, None]
        value = tl.load(x + (here * X_LINE)[:, None] + channel[None, :], mask=live, other=0.0).to(tl.float32)
        y = fused * read_out + value * skip
        tl.store(out + (here * DIM)[:, None] + channel[None, :], y, mask=live)


@triton.jit
def _state_fusion_inputs_kernel(
    grad,
    states,
    kernels,
    C,
    D,
    x,
    grad_c,
    grad_x,
    partial,
    height,
    width,
    bands,
    rows,
    cells,
    programs,
    DIM: tl.constexpr,
    C_LINE: tl.constexpr,
    X_LINE: tl.constexpr,
    POSITIONS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of everything but the states.

    `grad_c` is (blocks of channels, cells): every block leaves its part of the sum over channels. `partial` is
    (1 + taps, programs, DIM): what every program adds to the gradients of D and of the taps.
    """
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    block = program % BLOCKS
    channel = block * BC + tl.arange(0, BC)
    inside = channel < DIM
    program = program // BLOCKS
    first = program % bands * rows
    image = (program // bands).to(tl.int64) * height * width
    count = tl.minimum(rows, height - first) * width
    taps = _load_taps(kernels, channel, inside, DIM)
    skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    nothing = tl.zeros([POSITIONS, BC], tl.float32)
    sums = ()
    for _ in tl.static_range(_TAPS):
        sums = sums + (nothing,)
    grad_skip = nothing
    for start in range(0, rows * width, POSITIONS):
        number = start + tl.arange(0, POSITIONS)
        owned = number < count
        live = owned[:, None] & inside[None, :]
        row = first + number // width
        tiles = _load_neighbours(states, image, row, number % width, height, width, channel, live, DIM)
        here = image + first * width + number
        of_y = tl.load(grad + (here * DIM)[:, None] + channel[None, :], mask=live, other=0.0).to(tl.float32)
        value = tl.load(x + (here * X_LINE)[:, None] + channel[None, :], mask=live, other=0.0).to(tl.float32)
        of_fused = of_y * tl.load(C + here * C_LINE, mask=owned, other=0.0).to(tl.float32)[:, None]
        fused = nothing
        added = ()
        for t in tl.static_range(_TAPS):
            fused += tiles[t] * taps[t]
            added = added + (sums[t] + of_fused * tiles[t],)
        sums = added
        grad_skip += of_y * value
        of_x = (of_y * skip).to(grad_x.dtype.element_ty)
        tl.store(grad_x + (here * DIM)[:, None] + channel[None, :], of_x, mask=live)
        tl.store(grad_c + block.to(tl.int64) * cells + here, tl.sum(of_y * fused, axis=1), mask=owned)
    target = partial + program.to(tl.int64) * DIM + channel
    step = tl.cast(programs, tl.int64) * DIM
    tl.store(target, tl.sum(grad_skip, axis=0), mask=inside)
    for t in tl.static_range(_TAPS):
        tl.store(target + (t + 1) * step, tl.sum(sums[t], axis=0), mask=inside)


@triton.jit
def _state_fusion_states_kernel(
    grad,
    kernels,
    C,
    out,
    height,
    width,
    bands,
    rows,
    DIM: tl.constexpr,
    C_LINE: tl.constexpr,
    POSITIONS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the states. Positions of a tile are columns of the map with its margin."""
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    channel = program % BLOCKS * BC + tl.arange(0, BC)
    inside = channel < DIM
    program = program // BLOCKS
    first = program % bands * rows
    image = (program // bands).to(tl.int64) * height * width
    taps = _load_taps(kernels, channel, inside, DIM)
    nothing = tl.zeros([POSITIONS, BC], tl.float32)
    for row in range(first, tl.minimum(first + rows, height)):
        # rows of the margin repeat the first or the last row
        low = row - tl.where(row == 0, _MARGIN, 0)
        high = row + tl.where(row == height - 1, _MARGIN, 0)
        target = out + (image + row * width) * DIM + channel
        leftmost = nothing
        rightmost = nothing
        for start in range(0, width + 2 * _MARGIN, POSITIONS):
            column = start - _MARGIN + tl.arange(0, POSITIONS)
            total = nothing
            for padded in range(low, high + 1):
                above = padded + tl.zeros([POSITIONS], tl.int32)
                tiles = _load_gradients(grad, C, image, above, column, height, width, channel, inside, DIM, C_LINE)
                for t in tl.static_range(_TAPS):
                    total += tiles[t] * taps[t]
            leftmost += tl.where((column <= 0)[:, None], total, 0.0)
            rightmost += tl.where(((column > 0) & (column >= width - 1))[:, None], total, 0.0)
            between = (column > 0) & (column < width - 1)
            place = target[None, :] + column.to(tl.int64)[:, None] * DIM
            tl.store(place, total.to(out.dtype.element_ty), mask=between[:, None] & inside[None, :])
        left = tl.sum(leftmost, axis=0)
        right = tl.sum(rightmost, axis=0)
        left += tl.where(width == 1, right, 0.0)
        # In a map of one column, the same lane writes the same cell again
        tl.store(target + (width - 1) * DIM, right.to(out.dtype.element_ty), mask=inside)
        tl.store(target, left.to(out.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """How a (B, H, W, D) map is cut, see the arguments of the kernels of these names."""

    bands: int
    rows: int
    block: int
    blocks: int

    @classmethod
    def choose(cls, shape: torch.Size) -> "_Plan":
        _, height, _, dim = shape
        rows = ceil_div(height, ceil_div(height, _ROWS))
        # A power of two that divides D wastes no lane; blocks below 16 channels waste memory transactions instead
        block = min(_CHANNELS, dim & -dim)
        if block < 16:
            block = min(_CHANNELS, power_of_2(dim))
        return cls(ceil_div(height, rows), rows, block, ceil_div(dim, block))

    def arguments(self, shape: torch.Size) -> tuple[int, ...]:
        return shape[1], shape[2], self.bands, self.rows

    def constants(self, shape: torch.Size, adjoining: int) -> dict[str, int]:
        """`adjoining` is the number of channels that a lane holds."""
        positions = 32 * _WARPS * adjoining // self.block
        return dict(DIM=shape[3], POSITIONS=positions, BC=self.block, num_warps=_WARPS, num_stages=1)


def forward(states: Tensor, kernels: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """states: (B, H, W, D), kernels: (3, D, 3, 3), C: (B, H, W, 1), D: (D), x: like states. Returns (B, H, W, D)."""
    out = torch.empty(states.shape, dtype=torch.float32, device=states.device)
    if not out.numel():
        return out
    (C, c_line), (x, x_line) = lines(C), lines(x)
    plan = _Plan.choose(states.shape)
    launch(
        _state_fusion_forward_kernel,
        (states.shape[0] * plan.bands * plan.blocks,),
        states.contiguous(),
        kernels.contiguous(),
        C,
        D.contiguous(),
        x,
        out,
        *plan.arguments(states.shape),
        C_LINE=c_line,
        X_LINE=x_line,
        **plan.constants(states.shape, adjoining=4),
    )
    return out


def backward(grad: Tensor, states: Tensor, kernels: Tensor, C: Tensor, D: Tensor, x: Tensor) -> dict[str, Tensor]:
    """grad: (B, H, W, D). Returns the gradients of all inputs."""
    grads = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in (("states", states), ("x", x))}
    if not grad.numel():
        return grads | {name: torch.zeros_like(t) for name, t in (("kernels", kernels), ("C", C), ("D", D))}
    grad, states, kernels = grad.contiguous(), states.contiguous(), kernels.contiguous()
    (C, c_line), (x, x_line) = lines(C), lines(x)
    shape, plan = states.shape, _Plan.choose(states.shape)
    programs, cells = shape[0] * plan.bands, shape[0] * shape[1] * shape[2]
    of_c = torch.empty((plan.blocks, cells), dtype=torch.float32, device=states.device)
    partial = torch.empty((_TAPS.value + 1, programs, shape[3]), dtype=torch.float32, device=states.device)
    launch(
        _state_fusion_inputs_kernel,
        (programs * plan.blocks,),
        grad,
        states,
        kernels,
        C,
        D.contiguous(),
        x,
        of_c,
        grads["x"],
        partial,
        *plan.arguments(shape),
        cells,
        programs,
        C_LINE=c_line,
        X_LINE=x_line,
        **plan.constants(shape, adjoining=2),
    )
    launch(
        _state_fusion_states_kernel,
        (programs * plan.blocks,),
        grad,
        kernels,
        C,
        grads["states"],
        *plan.arguments(shape),
        C_LINE=c_line,
        **plan.constants(shape, adjoining=2),
    )
    of_skip, first, *others = partial.sum(1).split([1, 9, 4, 4, 4, 4])
    middle = first[4:5]  # of all kernels
    taps = torch.cat([first, others[0], middle, others[1], others[2], middle, others[3]])  # (27, D)
    grads["kernels"] = taps.view(3, 9, -1).transpose(1, 2).reshape(kernels.shape)
    grads["C"] = of_c.sum(0).view(C.shape)
    grads["D"] = of_skip.view(D.shape)
    return grads

"""DCNv4: weighted samples of a channel-last map at places that the input chooses, and the gradients.

A program owns a tile of output cells, one group and a block of its channels. Places and weights of the cells' points
are loaded once per tile; the four cells around a point are loaded channel by channel. The gradient of places and
weights has the same form, with a sum over the channels of the group.

The gradient of the map is a gather, not a scatter: atomic additions would come in another order on every run, and 36
of them for every output value are no faster. Points are sorted by the cell above and to the left of them, by a stable
sort of 9 keys for each output cell and group, not of 36. The points that reach a cell then stand in two stretches of
the sorted list, those of the row above it and those of its own row, and each counts with
``(1 - abs(px - x)) * (1 - abs(py - y))``. A program walks through the stretches of a tile of cells, always in one
order; it takes as long as the cell with the most points, of which there are 36 where they are spread evenly. The sort
is what needs memory, so images are worked on a few at a time.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div, power_of_2
from .tiles import rounded

_WARPS = 4
_VALUES = 4  # of a lane
_CHANNELS = 64  # of a block, at most
_UNROLLED: tl.constexpr = tl.constexpr(9)  # points at once: those of the usual kernel
_SORTED = 1 << 24  # points that are sorted at once: about 40 bytes each


@triton.jit
def _place(
    numbers, p, column, row, mask, scale,
    POINTS: tl.constexpr, KERNEL: tl.constexpr, SKIPPED: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """x, y and weight of point p of the output cells (row, column), whose numbers of a group begin at `numbers`."""
    HALF: tl.constexpr = DILATION * (KERNEL - 1) // 2
    dx = tl.load(numbers + 2 * p, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(numbers + 2 * p + 1, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(numbers + 2 * POINTS + p, mask=mask, other=0.0).to(tl.float32)
    tap = p + tl.where(p >= SKIPPED, 1, 0)  # with the middle of the kernel
    x = (HALF - PADDING + column * STRIDE).to(tl.float32) - HALF * scale
    y = (HALF - PADDING + row * STRIDE).to(tl.float32) - HALF * scale
    return x + (tap // KERNEL * DILATION + dx) * scale, y + (tap % KERNEL * DILATION + dy) * scale, weight


@triton.jit
def _corners(x, y, mask, height, width):
    """The cell above and to the left of (x, y) and the distances from it, 0 for points that count nothing."""
    inside = mask & (x > -1) & (x < width) & (y > -1) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return inside, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@triton.jit
def _cell(start, row, column, inside, height, width, channel, live, LINE: tl.constexpr):
    """Channels of the cells (row, column) of the maps that begin at `start`, 0 outside: [CELLS, BC]."""
    mask = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = start + (row.to(tl.int64) * width + column) * LINE
    return tl.load(source[:, None] + channel[None, :], mask=mask[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _dcnv4_forward_kernel(
    value, numbers, out, height, width, rows, columns, cells, scale,
    GROUPS: tl.constexpr, DIM: tl.constexpr, LINE: tl.constexpr, NUMBERS: tl.constexpr, POINTS: tl.constexpr,
    KERNEL: tl.constexpr, SKIPPED: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    CELLS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """DIM channels of a group, LINE of all; `cells` of all outputs, each with NUMBERS numbers."""
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    channel = program % BLOCKS * BC + tl.arange(0, BC)
    live = channel < DIM
    group = program // BLOCKS % GROUPS
    cell = program // (BLOCKS * GROUPS) * CELLS + tl.arange(0, CELLS)
    owned = cell < cells
    row = cell // columns % rows
    column = cell % columns
    image = (cell // (columns * rows)).to(tl.int64)
    start = value + image * height * width * LINE + group * DIM
    source = numbers + cell.to(tl.int64) * NUMBERS + group * 3 * POINTS
    total = tl.zeros([CELLS, BC], tl.float32)
    for p in tl.range(0, POINTS, loop_unroll_factor=POINTS if POINTS < _UNROLLED else _UNROLLED):
        x, y, weight = _place(
            source, p, column, row, owned, scale, POINTS, KERNEL, SKIPPED, STRIDE, PADDING, DILATION
        )
        inside, top, left, down, right = _corners(x, y, owned, height, width)
        a = _cell(start, top, left, inside, height, width, channel, live, LINE)
        b = _cell(start, top, left + 1, inside, height, width, channel, live, LINE)
        c = _cell(start, top + 1, left, inside, height, width, channel, live, LINE)
        d = _cell(start, top + 1, left + 1, inside, height, width, channel, live, LINE)
        weight = tl.where(inside, weight, 0.0)
        above = weight * (1.0 - down)
        below = weight * down
        total += a * (above * (1.0 - right))[:, None] + b * (above * right)[:, None]
        total += c * (below * (1.0 - right))[:, None] + d * (below * right)[:, None]
    target = out + (cell.to(tl.int64) * LINE + group * DIM)[:, None] + channel[None, :]
    tl.store(target, rounded(total, out.dtype.element_ty), mask=owned[:, None] & live[None, :])


@triton.jit
def _dcnv4_numbers_kernel(
    grad, value, numbers, grad_numbers, keys, height, width, rows, columns, cells, lists, scale,
    GROUPS: tl.constexpr, DIM: tl.constexpr, LINE: tl.constexpr, NUMBERS: tl.constexpr, POINTS: tl.constexpr,
    KERNEL: tl.constexpr, SKIPPED: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    CELLS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of places and weights, and the list, of `lists` and one for points outside, that a point belongs to.

    `keys` is (cells, GROUPS, POINTS); lists are (images, GROUPS, height + 1, width + 1).
    """
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    group = program % GROUPS
    cell = program // GROUPS * CELLS + tl.arange(0, CELLS)
    owned = cell < cells
    row = cell // columns % rows
    column = cell % columns
    image = cell // (columns * rows)
    start = value + image.to(tl.int64) * height * width * LINE + group * DIM
    place = cell.to(tl.int64) * NUMBERS + group * 3 * POINTS
    first_list = (image * GROUPS + group) * (height + 1)
    first_key = keys + (cell.to(tl.int64) * GROUPS + group) * POINTS
    kind: tl.constexpr = grad_numbers.dtype.element_ty
    first_grad = grad + cell.to(tl.int64) * LINE + group * DIM
    nothing = tl.zeros([CELLS, BC], tl.float32)
    for p in tl.range(0, POINTS, loop_unroll_factor=POINTS if POINTS < _UNROLLED else _UNROLLED):
        x, y, weight = _place(
            numbers + place, p, column, row, owned, scale, POINTS, KERNEL, SKIPPED, STRIDE, PADDING, DILATION
        )
        inside, top, left, down, right = _corners(x, y, owned, height, width)
        of_x = nothing
        of_y = nothing
        of_weight = nothing
        for block in range(0, BLOCKS):
            channel = block * BC + tl.arange(0, BC)
            live = channel < DIM
            mask = owned[:, None] & live[None, :]
            incoming = tl.load(first_grad[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            a = _cell(start, top, left, inside, height, width, channel, live, LINE)
            b = _cell(start, top, left + 1, inside, height, width, channel, live, LINE)
            c = _cell(start, top + 1, left, inside, height, width, channel, live, LINE)
            d = _cell(start, top + 1, left + 1, inside, height, width, channel, live, LINE)
            above = b - a
            below = d - c
            of_x += incoming * (above + (below - above) * down[:, None])
            above = a + above * right[:, None]
            below = c + below * right[:, None]
            of_y += incoming * (below - above)
            of_weight += incoming * (above + (below - above) * down[:, None])
        weight = tl.where(inside, weight * scale, 0.0)
        target = grad_numbers + place
        tl.store(target + 2 * p, rounded(tl.sum(of_x, axis=1) * weight, kind), mask=owned)
        tl.store(target + 2 * p + 1, rounded(tl.sum(of_y, axis=1) * weight, kind), mask=owned)
        tl.store(target + 2 * POINTS + p, rounded(tl.sum(of_weight, axis=1), kind), mask=owned)
        key = ((first_list + top + 1) * (width + 1)) + left + 1
        tl.store(first_key + p, tl.where(inside, key, lists), mask=owned)


@triton.jit
def _dcnv4_value_kernel(
    grad, numbers, order, starts, grad_value, height, width, rows, columns, cells, scale,
    GROUPS: tl.constexpr, DIM: tl.constexpr, LINE: tl.constexpr, NUMBERS: tl.constexpr, POINTS: tl.constexpr,
    KERNEL: tl.constexpr, SKIPPED: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    CELLS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`cells` of the map here; `order` has the numbers of the points, list by list, which begin at `starts`."""
    BLOCKS: tl.constexpr = (DIM + BC - 1) // BC
    program = tl.program_id(0)
    channel = program % BLOCKS * BC + tl.arange(0, BC)
    live = channel < DIM
    group = program // BLOCKS % GROUPS
    cell = program // (BLOCKS * GROUPS) * CELLS + tl.arange(0, CELLS)
    owned = cell < cells
    row = cell // width % height
    column = cell % width
    image = cell // (width * height)
    # lists of the cells up-left and up, then of those left and here: neighbours in memory
    upper = starts + ((image * GROUPS + group) * (height + 1) + row) * (width + 1) + column
    lower = upper + (width + 1)
    first = tl.load(upper, mask=owned, other=0)
    above = tl.load(upper + 2, mask=owned, other=0) - first
    second = tl.load(lower, mask=owned, other=0)
    count = above + tl.load(lower + 2, mask=owned, other=0) - second
    total = tl.zeros([CELLS, BC], tl.float32)
    for step in range(0, tl.max(count, axis=0)):
        mask = step < count
        point = tl.load(order + tl.where(step < above, first + step, second + step - above), mask=mask, other=0)
        output = point // (POINTS * GROUPS)  # int64, and so is what follows
        within = (output - image.to(tl.int64) * rows * columns).to(tl.int32)
        x, y, weight = _place(
            numbers + output * NUMBERS + group * 3 * POINTS, (point % POINTS).to(tl.int32),
            within % columns, within // columns, mask, scale, POINTS, KERNEL, SKIPPED, STRIDE, PADDING, DILATION,
        )  # fmt: skip
        weight *= (1.0 - tl.abs(x - column)) * (1.0 - tl.abs(y - row))
        source = grad + (output * LINE + group * DIM)[:, None] + channel[None, :]
        incoming = tl.load(source, mask=mask[:, None] & live[None, :], other=0.0).to(tl.float32)
        total += tl.where(mask, weight, 0.0)[:, None] * incoming
    target = grad_value + (cell.to(tl.int64) * LINE + group * DIM)[:, None] + channel[None, :]
    tl.store(target, rounded(total, grad_value.dtype.element_ty), mask=owned[:, None] & live[None, :])


class _Call(NamedTuple):
    """Sizes and options of one call; `groups` and what follows are those of the operator's schema."""

    value: torch.Size
    outputs: torch.Size
    groups: int
    kernel_size: int
    stride: int
    padding: int
    dilation: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        return self.kernel_size**2 - self.remove_center

    @property
    def block(self) -> int:
        """Channels of a block."""
        return min(_CHANNELS, power_of_2(self.value[3] // self.groups))

    @property
    def tile(self) -> int:
        """Cells of a tile."""
        return 32 * _WARPS * _VALUES // self.block

    def constants(self) -> dict[str, int]:
        taps = self.kernel_size**2
        return dict(
            GROUPS=self.groups, DIM=self.value[3] // self.groups, LINE=self.value[3], NUMBERS=self.outputs[3],
            POINTS=self.points, KERNEL=self.kernel_size, SKIPPED=taps // 2 if self.remove_center else taps,
            STRIDE=self.stride, PADDING=self.padding, DILATION=self.dilation, CELLS=self.tile, BC=self.block,
            num_warps=_WARPS,
        )  # fmt: skip

    def programs(self, cells: int, split: bool = True) -> tuple[int]:
        """Grid for that many cells; `split` says that blocks of channels have programs of their own."""
        blocks = ceil_div(self.value[3] // self.groups, self.block) if split else 1
        return (ceil_div(cells, self.tile) * self.groups * blocks,)

    def check(self) -> None:
        """Cells, programs, and points and lists of one image are counted in int32."""
        images, height, width, _ = self.value
        rows, columns = self.outputs[1:3]
        cells = images * max(height * width, rows * columns)
        of_image = self.groups * max((height + 1) * (width + 1), rows * columns * self.points)
        if max(cells + self.tile, *self.programs(cells), 2 * of_image) >= 1 << 31:
            raise ValueError(f"dcnv4: value of shape {tuple(self.value)} has too many positions for one launch")


def forward(value: Tensor, offset_mask: Tensor, *options: Any) -> Tensor:
    """value: (B, H, W, D), offset_mask: (B, H', W', M). Returns (B, H', W', D) in the dtype of `value`."""
    call = _Call(value.shape, offset_mask.shape, *options)
    out = torch.empty((*call.outputs[:3], call.value[3]), dtype=value.dtype, device=value.device)
    cells = call.outputs[:3].numel()
    if cells:
        call.check()
        launch(
            _dcnv4_forward_kernel, call.programs(cells),
            value.contiguous(), offset_mask.contiguous(), out, *call.value[1:3], *call.outputs[1:3], cells,
            call.offset_scale, **call.constants(),
        )  # fmt: skip
    return out


def backward(grad: Tensor, value: Tensor, offset_mask: Tensor, *options: Any) -> dict[str, Tensor]:
    """grad: (B, H', W', D). Returns the gradients of `value` and `offset_mask`, each in its dtype."""
    call = _Call(value.shape, offset_mask.shape, *options)
    grads = {
        "value": torch.empty(value.shape, dtype=value.dtype, device=value.device),
        "offset_mask": torch.zeros(offset_mask.shape, dtype=offset_mask.dtype, device=value.device),
    }
    images, height, width, _ = call.value
    if not images:
        return grads
    call.check()
    grad, value, offset_mask = grad.contiguous(), value.contiguous(), offset_mask.contiguous()
    of_image = call.outputs[1:3].numel() * call.groups * call.points
    lists_of_image = (height + 1) * (width + 1) * call.groups
    together = max(1, min(_SORTED // of_image, (1 << 30) // lists_of_image))
    sizes = (height, width, *call.outputs[1:3])
    for first in range(0, images, together):
        part = slice(first, first + together)
        count = min(together, images - first)
        lists = count * lists_of_image
        cells = count * call.outputs[1:3].numel()
        keys = torch.empty(count * of_image, dtype=torch.int32, device=value.device)
        launch(
            _dcnv4_numbers_kernel, call.programs(cells, split=False),
            grad[part], value[part], offset_mask[part], grads["offset_mask"][part], keys, *sizes, cells, lists,
            call.offset_scale, **call.constants(),
        )  # fmt: skip
        keys, order = keys.sort(stable=True)
        numbers = torch.arange(lists + 1, dtype=torch.int32, device=value.device)
        starts = torch.searchsorted(keys, numbers, out_int32=True)
        cells = count * height * width
        launch(
            _dcnv4_value_kernel, call.programs(cells),
            grad[part], offset_mask[part], order, starts, grads["value"][part], *sizes, cells,
            call.offset_scale, **call.constants(),
        )  # fmt: skip
    return grads

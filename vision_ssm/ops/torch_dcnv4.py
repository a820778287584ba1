"""DCNv4 in plain PyTorch: four weighted rows of a table for every point, added up by `embedding_bag`.

The gradient of the map is gathered as well, not scattered: points are sorted by the cell above and to the left of them,
which gives every such cell a list of points, in one order. Each list is summed four times, with the shares of the four
cells around its points, and the sums are added up moved by one row or column.

Images, or bands of rows of a large one, are worked on one after the other, which bounds the memory of the tables.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import work_dtype

_ENTRIES = 1 << 20  # corners of points at once: about 50 MB of indices, shares and gradients
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) of the cells around a point


class _Options(NamedTuple):
    """The options of the operator, in the order of its schema."""

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

    def taps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and rows of the points in the kernel, (P) each, in the dtype of `like`."""
        number = torch.arange(self.points, device=like.device)
        if self.remove_center:
            number += number >= self.kernel_size**2 // 2
        return (number // self.kernel_size).to(like.dtype), (number % self.kernel_size).to(like.dtype)


class _Points(NamedTuple):
    """Points of some output cells. Tensors are (n, h, W', G, P), with a last axis for the corners (..., 4).

    `row` and `column` are those of the cell above and to the left, `shares` of the corners for the point, and `entries`
    the rows of the table of cells, of which the last stands for all cells outside.
    """

    inside: Tensor
    weight: Tensor
    row: Tensor
    column: Tensor
    down: Tensor  # distances to `row` and `column`
    right: Tensor
    shares: Tensor
    entries: Tensor

    @classmethod
    def locate(cls, numbers: Tensor, first: int, size: torch.Size, options: _Options) -> "_Points":
        """numbers: (n, h, W', M) for output rows from `first` on, in the work dtype; size: of `value`, (n, H, W, D)."""
        images, height, width, _ = size
        count, groups, scale = options.points, options.groups, options.offset_scale
        numbers = numbers[..., : 3 * count * groups].unflatten(-1, (groups, 3 * count))
        half = options.dilation * (options.kernel_size - 1) // 2
        tap_columns, tap_rows = options.taps(numbers)

        def coordinates(cells: Tensor, taps: Tensor, offsets: Tensor) -> Tensor:
            start = half - options.padding + cells * options.stride - half * scale
            return start + (taps * options.dilation + offsets) * scale

        cell = torch.arange(first, first + numbers.shape[1], device=numbers.device, dtype=numbers.dtype)
        y = coordinates(cell.view(-1, 1, 1, 1), tap_rows, numbers[..., 1 : 2 * count : 2])
        cell = torch.arange(numbers.shape[2], device=numbers.device, dtype=numbers.dtype)
        x = coordinates(cell.view(-1, 1, 1), tap_columns, numbers[..., : 2 * count : 2])
        inside = (y > -1) & (y < height) & (x > -1) & (x < width)
        y, x, weight = (torch.where(inside, tensor, 0) for tensor in (y, x, numbers[..., 2 * count :]))
        top, left = y.floor(), x.floor()
        down, right = y - top, x - left
        row, column = top.long(), left.long()
        image = torch.arange(images, device=numbers.device).view(-1, 1, 1, 1, 1)
        group = torch.arange(groups, device=numbers.device).view(-1, 1)
        shares, entries = [], []
        for a, b in _CORNERS:
            shares.append((down if a else 1 - down) * (right if b else 1 - right))
            i, j = row + a, column + b
            within = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
            entry = ((image * height + i) * width + j) * groups + group
            entries.append(torch.where(within, entry, images * height * width * groups))
        return cls(inside, weight, row, column, down, right, torch.stack(shares, -1), torch.stack(entries, -1))


def _chunks(value: Tensor, offset_mask: Tensor, options: _Options) -> Iterator[tuple[slice, slice]]:
    """Images, and rows of their outputs, that are worked on at once."""
    images, rows, columns, _ = offset_mask.shape
    of_row = columns * options.groups * options.points * len(_CORNERS)
    together = max(1, _ENTRIES // (of_row * rows))
    band = rows if of_row * rows <= _ENTRIES else max(1, _ENTRIES // of_row)
    for image in range(0, images, together):
        for row in range(0, rows, band):
            yield slice(image, image + together), slice(row, row + band)


def _table(value: Tensor, groups: int) -> Tensor:
    """(n, H, W, D) -> (n * H * W * G + 1, D / G) in the work dtype, a row of zeros behind the others."""
    rows = value.to(work_dtype(value)).reshape(-1, value.shape[3] // groups)
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def forward(value: Tensor, offset_mask: Tensor, *options: Any) -> Tensor:
    """value: (B, H, W, D), offset_mask: (B, H', W', M). Returns (B, H', W', D) in the dtype of `value`."""
    given, dim = _Options(*options), value.shape[3]
    out = value.new_empty(*offset_mask.shape[:3], dim)
    for images, rows in _chunks(value, offset_mask, given):
        part, numbers = value[images], offset_mask[images, rows].to(work_dtype(value))
        points = _Points.locate(numbers, rows.start, part.shape, given)
        weights = points.weight.unsqueeze(-1) * points.shares
        sums = F.embedding_bag(
            points.entries.flatten(-2).flatten(0, -2),  # (n * h * W' * G, 4 P)
            _table(part, given.groups),
            per_sample_weights=weights.flatten(-2).flatten(0, -2),
            mode="sum",
        )
        out[images, rows] = sums.view(*numbers.shape[:3], dim).to(out.dtype)
    return out


def _of_numbers(grad: Tensor, value: Tensor, points: _Points, options: _Options) -> Tensor:
    """grad: (n, h, W', D). Gradient of the numbers of all groups, (n, h, W', 3 P G)."""
    rows = grad.reshape(-1, grad.shape[3] // options.groups)  # (n * h * W' * G, d)
    corners = options.points * len(_CORNERS)
    bags = torch.arange(rows.shape[0], device=grad.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows,
        _table(value, options.groups),
        points.entries.flatten(),
        bags * corners,
        bags.repeat_interleave(corners),
        0,  # the mode "sum"
    )
    a, b, c, d = products.view(points.entries.shape).unbind(-1)  # of grad with the four cells around each point
    along_x = points.weight * torch.lerp(b - a, d - c, points.down) * options.offset_scale
    along_y = points.weight * torch.lerp(c - a, d - b, points.right) * options.offset_scale
    of_weight = torch.lerp(torch.lerp(a, b, points.right), torch.lerp(c, d, points.right), points.down)
    of_offsets = torch.stack([along_x, along_y], dim=-1).flatten(-2)  # (n, h, W', G, 2 P)
    return torch.cat([of_offsets, of_weight], dim=-1).flatten(-2)


def _of_value(grad: Tensor, size: torch.Size, points: _Points, options: _Options) -> Tensor:
    """grad: (n, h, W', D). Gradient of the map, (n, H, W, D), from these output cells."""
    images, height, width, dim = size
    groups, device = options.groups, grad.device
    image = torch.arange(images, device=device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=device).view(-1, 1)
    cell = ((image * (height + 1) + points.row + 1) * (width + 1) + points.column + 1) * groups + group
    lists = images * (height + 1) * (width + 1) * groups
    cell, order = torch.where(points.inside, cell, lists).flatten().sort(stable=True)
    starts = torch.searchsorted(cell, torch.arange(lists + 1, device=device))  # the last list: points outside
    rows, source = grad.reshape(-1, dim // groups), order // options.points
    total = grad.new_zeros(size)
    for corner, (a, b) in enumerate(_CORNERS):
        weights = (points.weight * points.shares[..., corner]).flatten()[order]
        sums = F.embedding_bag(source, rows, starts, per_sample_weights=weights, mode="sum")[:-1]
        sums = sums.view(images, height + 1, width + 1, dim)  # by the cell above and to the left
        total += sums[:, 1 - a : height + 1 - a, 1 - b : width + 1 - b]
    return total


def backward(grad: Tensor, value: Tensor, offset_mask: Tensor, *options: Any) -> dict[str, Tensor]:
    """grad: (B, H', W', D). Returns the gradients of `value` and `offset_mask`."""
    given, work = _Options(*options), work_dtype(value)
    of_value = torch.zeros_like(value, dtype=work)
    of_numbers = torch.zeros_like(offset_mask, dtype=work)
    for images, rows in _chunks(value, offset_mask, given):
        part, numbers, incoming = value[images], offset_mask[images, rows].to(work), grad[images, rows].to(work)
        points = _Points.locate(numbers, rows.start, part.shape, given)
        found = _of_numbers(incoming, part, points, given)
        of_numbers[images, rows, :, : found.shape[3]] = found
        of_value[images] += _of_value(incoming, part.shape, points, given)
    return {"value": of_value, "offset_mask": of_numbers}

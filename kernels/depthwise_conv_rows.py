"""Depthwise convolution with kernels of many taps, and the gradient of its weights.

The walk of `depthwise_conv` is unrolled by the square of the kernel's width, which takes a compiler half a minute at
9 x 9. A program here owns a few columns of outputs in each of `STRIPS` rows of maps, and a block of channels. It passes
over the rows of the kernel in a loop: one row of inputs is loaded, and added to the outputs that it touches. A program
of the weights' gradient owns one row of the kernel and walks along rows of maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, slope
from .launch import launch
from .sizes import ceil_div, channel_block

_COLUMNS = 8  # of outputs in flight
_WARPS = 4
_PARTS = 256  # of the sum over images and rows, at most


@triton.jit
def _load_row(source, row, height, column, width, live, DISTANCE: tl.constexpr, COUNT: tl.constexpr):
    """`COUNT` adjacent columns of one row of each map, from `column` on, in float32; 0 outside of the maps."""
    tiles = ()
    inside = live & (row >= 0) & (row < height)
    for j in tl.static_range(COUNT):
        mask = inside & (column + j >= 0) & (column + j < width)
        tiles = tiles + (tl.load(source + j * DISTANCE, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _depthwise_conv_rows_kernel(
    x, weight, bias, grad, out, height, width, strips, segments,
    C: tl.constexpr, LINE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr, BC: tl.constexpr, ACTIVATION: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """`out` receives the activated convolution; if its gradient `grad` is given, that of the pre-activation."""
    PH: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BC + tl.arange(0, BC)
    program = program // BLOCKS
    left = (program % segments) * COLUMNS
    strip = (program // segments) * STRIPS + tl.arange(0, STRIPS)[:, None]
    inside = channel < C
    live = (strip < strips) & inside[None, :]
    strip = tl.minimum(strip, strips - 1)
    top = strip % height
    column = tl.zeros([1, 1], tl.int32) + left  # a tile, for masks: the interpreter mistakes scalar booleans
    line = tl.cast(width, tl.int64)
    pixel = strip * line + left
    source = x + (pixel - PH * line - PW) * LINE + channel[None, :]
    start = tl.zeros([STRIPS, BC], tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = ()
    for _ in tl.static_range(COLUMNS):
        sums = sums + (start,)
    for i in range(0, KH):
        tiles = _load_row(source, top + (i - PH), height, column - PW, width, live, LINE, COLUMNS + KW - 1)
        source += line * LINE
        first = weight + channel * (KH * KW) + ((KH - 1 - i) * KW if FLIP else i * KW)
        for k in tl.static_range(KW):
            tap = tl.load(first + (KW - 1 - k if FLIP else k), mask=inside, other=0.0).to(tl.float32)[None, :]
            touched = ()
            for c in tl.static_range(COLUMNS):
                touched = touched + (sums[c] + tiles[c + k] * tap,)
            sums = touched
    target = pixel * C + channel[None, :]
    for c in tl.static_range(COLUMNS):
        mask = live & (column + c < width)
        if grad is None:
            value = activate(sums[c], ACTIVATION)
        else:
            value = tl.load(grad + target + c * C, mask=mask, other=0.0).to(tl.float32) * slope(sums[c], ACTIVATION)
        tl.store(out + target + c * C, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _depthwise_conv_weights_kernel(
    x, grad, partial, height, width, strips, parts,
    C: tl.constexpr, LINE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Row p of `partial` holds part p of the gradient of the weights, (C, KH * KW), and of the bias, (C)."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BC + tl.arange(0, BC)
    i = program // BLOCKS % KH
    part = program // (BLOCKS * KH)
    inside = channel < C
    line = tl.cast(width, tl.int64)
    nothing = tl.zeros([STRIPS, BC], tl.float32)
    grad_taps = ()
    for _ in tl.static_range(KW):
        grad_taps = grad_taps + (nothing,)
    grad_bias = nothing
    for first in range(part * STRIPS, strips, parts * STRIPS):
        strip = first + tl.arange(0, STRIPS)[:, None]
        live = (strip < strips) & inside[None, :]
        top = strip % height
        source = x + ((strip + (i - KH // 2)) * line - KW // 2) * LINE + channel[None, :]
        source_grad = grad + strip * line * C + channel[None, :]
        for left in range(0, width, COLUMNS):
            column = tl.zeros([1, 1], tl.int32) + left
            tiles = _load_row(
                source, top + (i - KH // 2), height, column - KW // 2, width, live, LINE, COLUMNS + KW - 1
            )
            grads = _load_row(source_grad, top, height, column, width, live, C, COLUMNS)
            source += COLUMNS * LINE
            source_grad += COLUMNS * C
            added = ()
            for k in tl.static_range(KW):
                total = grad_taps[k]
                for c in tl.static_range(COLUMNS):
                    total += grads[c] * tiles[c + k]
                added = added + (total,)
            grad_taps = added
            for c in tl.static_range(COLUMNS):
                grad_bias += grads[c]
    result = partial + part.to(tl.int64) * (C * (KH * KW + 1))
    for k in tl.static_range(KW):
        tl.store(result + channel * (KH * KW) + i * KW + k, tl.sum(grad_taps[k], axis=0), mask=inside)
    if i == 0:
        tl.store(result + C * KH * KW + channel, tl.sum(grad_bias, axis=0), mask=inside)


def _constants(x: Tensor, line: int, weight: Tensor) -> dict[str, int]:
    block = channel_block(x.shape[3])
    return dict(
        C=x.shape[3], LINE=line, KH=weight.shape[2], KW=weight.shape[3], COLUMNS=_COLUMNS,
        STRIPS=32 * _WARPS // block, BC=block, num_warps=_WARPS,
    )  # fmt: skip


def convolve(
    x: Tensor, line: int, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor, *,
    flip: bool = False, grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes to `out` the activated convolution of x, or, given its gradient, that of what is activated; returns it.

    Args:
        x: (B, H, W, C), positions `line` apart in memory, not empty.
        weight: (C, 1, KH, KW), contiguous, as `bias` (C), `out` and `grad` (B, H, W, C) are.
        flip: turn the kernel by half a turn.
    """
    images, height, width, channels = x.shape
    constants = _constants(x, line, weight)
    segments = ceil_div(width, _COLUMNS)
    programs = ceil_div(images * height, constants["STRIPS"]) * segments * ceil_div(channels, constants["BC"])
    launch(
        _depthwise_conv_rows_kernel, (programs,),
        x, weight, bias, grad, out, height, width, images * height, segments,
        ACTIVATION=activation, FLIP=flip, **constants,
    )  # fmt: skip
    return out


def weight_parts(x: Tensor, line: int, weight: Tensor, grad: Tensor) -> Tensor:
    """Parts of the gradients of weights and bias of a convolution without activation.

    Args:
        x: (B, H, W, C), positions `line` apart in memory.
        weight: (C, 1, KH, KW), for its shape.
        grad: (B, H, W, C), contiguous.

    Returns:
        (parts, C * KH * KW + C) float32, to be summed.
    """
    images, height, width, channels = x.shape
    constants = _constants(x, line, weight)
    strips = images * height
    parts = min(_PARTS, ceil_div(strips, constants["STRIPS"]))
    total = channels * (weight.shape[2] * weight.shape[3] + 1)
    partial = torch.empty((parts, total), dtype=torch.float32, device=x.device)
    launch(
        _depthwise_conv_weights_kernel, (parts * weight.shape[2] * ceil_div(channels, constants["BC"]),),
        x, grad, partial, height, width, strips, parts, **constants,
    )  # fmt: skip
    return partial

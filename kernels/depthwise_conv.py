"""Depthwise convolution of channel-last maps, with bias and activation, and its gradients.

A program owns a strip of `ROWS` output rows for each of `STRIPS` images or row bands, and a block of channels. It walks
over the columns of the map: one column of input rows is loaded, turned to float32 once, and added to the outputs of
the columns that it touches, so every value is read from memory about once and all sums live in registers. The walk is
unrolled by the width of the kernel, which gives every column in flight a fixed register and spares moving them.

The gradients are one walk of the same kind. It recomputes the pre-activation and its gradient, for a margin around the
strip too, so that the gradient of x comes out of the same pass; nothing but the inputs is ever kept. Kernels of more
taps, which would not fit into the registers, write the gradient of the pre-activation instead and convolve it with the
flipped kernel; the largest take the kernels of `depthwise_conv_rows`. Weight and bias gradients are summed per program
and then over the programs, always in one order.

In the comments: t is a step of the walk, k a column and i a row of the convolution kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import depthwise_conv_rows as by_rows
from .activation import activate, slope
from .launch import launch
from .sizes import ceil_div, channel_block

_FUSED_TAPS = 9  # larger kernels do not fit into the registers together with the gradient of x
_WALKED_TAPS = 25  # larger kernels take minutes to compile, and go by rows
_WARPS = 4
_PROGRAMS = 512  # aimed at where a map is wide enough to be cut: about four for every processor of a large GPU


@triton.jit
def _load_columns(
    source,
    line,
    top,
    height,
    column,
    low,
    width,
    live,
    DISTANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Raw tiles, `COUNT` rows of `COLUMNS` columns each, 0 above and below the map and outside of [low, width).

    Row 0 is row `top` of the map. Only the first TOP rows, and those behind the ROWS that follow, can lie outside of
    it, and the others too unless EVEN.
    """
    tiles = ()
    for r in tl.static_range(COUNT):
        for j in tl.static_range(COLUMNS):
            mask = live & (column + j >= low) & (column + j < width)
            if r < TOP:
                mask = mask & (top + r >= 0)
            if r >= TOP + ROWS or not EVEN:
                mask = mask & (top + r < height)
            # Columns are constants behind one address of each row
            tiles = tiles + (tl.load(source + r * (line * DISTANCE) + j * DISTANCE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _load_taps(weight, channel, inside, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """The weights (C, TAPS) of these channels, one tile [1, BC] for each tap."""
    taps = ()
    for i in tl.static_range(TAPS):
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - i if FLIP else i), mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _depthwise_conv_forward_kernel(
    x,
    weight,
    bias,
    out,
    height,
    width,
    strips,
    bands,
    segments,
    segment,
    C: tl.constexpr,
    LINE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    BC: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_STRIPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLIP: tl.constexpr,
):
    PH: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    COUNT: tl.constexpr = ROWS + KH - 1
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BC + tl.arange(0, BC)
    program = program // BLOCKS
    left = (program % segments) * segment
    strip = (program // segments) * STRIPS + tl.arange(0, STRIPS)[:, None]
    inside = channel < C
    taps = _load_taps(weight, channel, inside, KH * KW, FLIP)
    start = tl.zeros([STRIPS, BC], tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]

    unit = tl.zeros([1, 1], tl.int32)  # makes tiles of scalars, for masks: the interpreter mistakes scalar booleans
    live = channel[None, :] < C if C % BC else unit == 0
    owned = live if EVEN_STRIPS else (strip < strips) & live
    strip = tl.minimum(strip, strips - 1)  # strips that are not there repeat the last one and store nothing
    top = (strip % bands) * ROWS
    pixel = ((strip // bands).to(tl.int64) * height + top) * width + left
    line = tl.cast(width, tl.int64)
    source = x + (pixel - PH * line - PW) * LINE + channel[None, :]
    target = out + (pixel - (KW - 1)) * C + channel[None, :]
    end = tl.minimum(segment, width - left)

    sums = ()
    for _ in tl.static_range(KW * ROWS):
        sums = sums + (start,)
    for t in range(0, segment + KW - 1, KW):
        column = unit + (left - PW + t)
        loaded = _load_columns(
            source, line, top - PH, height, column, 0, width, live, LINE, KW, PH, ROWS, COUNT, EVEN_ROWS
        )
        source += KW * LINE
        for j in tl.static_range(KW):
            rows = ()
            for r in tl.static_range(COUNT):
                rows = rows + (loaded[r * KW + j].to(tl.float32),)
            # Output column t - k receives tap k, and lives in slot (t - k) % KW: slot j begins, slot j + 1 is complete
            touched = ()
            for slot in tl.static_range(KW):
                for r in tl.static_range(ROWS):
                    total = start if slot == j else sums[slot * ROWS + r]
                    for i in tl.static_range(KH):
                        total += rows[r + i] * taps[i * KW + (j - slot + KW) % KW]
                    touched = touched + (total,)
            sums = touched
            column = unit + (t + j - (KW - 1))
            store = owned & (column >= 0) & (column < end)
            for r in tl.static_range(ROWS):
                value = activate(sums[(j + 1) % KW * ROWS + r], ACTIVATION)
                mask = store if EVEN_ROWS else store & (top + r < height)
                tl.store(target + (r * line + j) * C, value.to(out.dtype.element_ty), mask=mask)
        target += KW * C


@triton.jit
def _depthwise_conv_backward_kernel(
    grad,
    x,
    weight,
    bias,
    out,
    partial,
    height,
    width,
    strips,
    bands,
    segments,
    segment,
    C: tl.constexpr,
    LINE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    BC: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_STRIPS: tl.constexpr,
    WHOLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FUSED: tl.constexpr,
):
    """`out` receives the gradient of x if FUSED, else that of the pre-activation, unless it is None.

    Row p of `partial` holds what program p adds to the gradient of the weights, (C, KH * KW), and of the bias, (C).
    WHOLE says that segments are whole lines of the map.
    """
    PH: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    MH: tl.constexpr = PH if FUSED else 0  # margin in which the gradient of the pre-activation is needed
    MW: tl.constexpr = PW if FUSED else 0
    TAPS: tl.constexpr = KH * KW
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    INNER: tl.constexpr = ROWS + 2 * MH  # rows of grad
    COUNT: tl.constexpr = INNER + KH - 1  # rows of x
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BC + tl.arange(0, BC)
    program = program // BLOCKS
    left = (program % segments) * segment
    strip = (program // segments) * STRIPS + tl.arange(0, STRIPS)[:, None]
    inside = channel < C
    taps = _load_taps(weight, channel, inside, TAPS, False)
    nothing = tl.zeros([STRIPS, BC], tl.float32)
    start = nothing
    if bias is not None:
        start += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]

    unit = tl.zeros([1, 1], tl.int32)  # makes tiles of scalars, for masks: the interpreter mistakes scalar booleans
    live = channel[None, :] < C if C % BC else unit == 0
    owned = live if EVEN_STRIPS else (strip < strips) & live
    strip = tl.minimum(strip, strips - 1)  # strips that are not there repeat the last one with gradients of 0
    top = (strip % bands) * ROWS
    pixel = ((strip // bands).to(tl.int64) * height + top) * width + left
    line = tl.cast(width, tl.int64)
    source = x + (pixel - (MH + PH) * line - MW - PW) * LINE + channel[None, :]
    source_grad = grad + (pixel - MH * line - MW - 2 * PW) * C + channel[None, :]
    target = out
    if out is not None:
        target = out + (pixel - 2 * PW - 2 * MW) * C + channel[None, :]
    end = tl.minimum(segment, width - left)

    low = tl.maximum(left - MW, 0)  # first column of grad

    window = ()  # KW columns of x; that of step t is in slot t % KW
    for _ in tl.static_range(KW * COUNT):
        window = window + (nothing,)
    sums = ()  # KW columns of the gradient of x
    if FUSED:
        for _ in tl.static_range(KW * ROWS):
            sums = sums + (nothing,)
    grad_taps = ()
    for _ in tl.static_range(TAPS):
        grad_taps = grad_taps + (nothing,)
    grad_bias = nothing
    for t in range(0, segment + 2 * PW + 2 * MW, KW):
        column = unit + (left - MW - PW + t)
        loaded = _load_columns(
            source, line, top - MH - PH, height, column, 0, width, live, LINE, KW, MH + PH, ROWS, COUNT, EVEN_ROWS
        )
        # The gradient is PW columns behind: those of x are then complete
        column -= PW
        loaded_grad = _load_columns(
            source_grad, line, top - MH, height, column, low, width, owned, C, KW, MH, ROWS, INNER, EVEN_ROWS
        )
        source += KW * LINE
        source_grad += KW * C
        for j in tl.static_range(KW):
            moved = ()
            for slot in tl.static_range(KW):
                for r in tl.static_range(COUNT):
                    moved = moved + (loaded[r * KW + j].to(tl.float32) if slot == j else window[slot * COUNT + r],)
            window = moved

            before = ()  # gradient of the pre-activation, whose column k of x is in slot (j + 1 + k) % KW
            for r in tl.static_range(INNER):
                value = loaded_grad[r * KW + j].to(tl.float32)
                if ACTIVATION != "none":
                    total = start
                    for i in tl.static_range(KH):
                        for k in tl.static_range(KW):
                            total += window[(j + 1 + k) % KW * COUNT + r + i] * taps[i * KW + k]
                    value *= slope(total, ACTIVATION)
                before = before + (value,)

            column = unit + (t + j - (KW - 1) - MW)
            own = ()
            for r in tl.static_range(ROWS):
                value = before[MH + r]
                if not WHOLE:
                    value = tl.where((column >= 0) & (column < segment), value, 0.0)
                own = own + (value,)
                grad_bias += value
            added = ()
            for i in tl.static_range(KH):
                for k in tl.static_range(KW):
                    total = grad_taps[i * KW + k]
                    for r in tl.static_range(ROWS):
                        total += own[r] * window[(j + 1 + k) % KW * COUNT + MH + r + i]
                    added = added + (total,)
            grad_taps = added

            if FUSED:
                # Column t - 2 (KW - 1) + k of the gradient of x receives tap k and lives in slot (t + 2 + k) % KW
                touched = ()
                for slot in tl.static_range(KW):
                    for r in tl.static_range(ROWS):
                        total = nothing if slot == (j + 1) % KW else sums[slot * ROWS + r]
                        for i in tl.static_range(KH):
                            total += before[r + 2 * PH - i] * taps[i * KW + (slot - j - 2 + 2 * KW) % KW]
                        touched = touched + (total,)
                sums = touched
            if out is not None:
                column = unit + (t + j - (KW - 1) - 2 * MW)
                store = owned & (column >= 0) & (column < end)
                for r in tl.static_range(ROWS):
                    value = sums[(j + 2) % KW * ROWS + r] if FUSED else before[r]
                    mask = store if EVEN_ROWS else store & (top + r < height)
                    tl.store(target + (r * line + j) * C, value.to(out.dtype.element_ty), mask=mask)
        if out is not None:
            target += KW * C

    result = partial + program.to(tl.int64) * (C * (TAPS + 1))
    for i in tl.static_range(TAPS):
        tl.store(result + channel * TAPS + i, tl.sum(grad_taps[i], axis=0), mask=inside)
    tl.store(result + C * TAPS + channel, tl.sum(grad_bias, axis=0), mask=inside)


@triton.jit
def _depthwise_conv_sum_kernel(
    partial, grad_weight, grad_bias, count, WEIGHTS, TOTAL, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of `count` rows: the first WEIGHTS of TOTAL go to `grad_weight`, the others to `grad_bias` unless None."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    source = partial + row.to(tl.int64) * TOTAL + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        total += tl.load(source, mask=(first + row < count) & (column < TOTAL)[None, :], other=0.0)
        source += tl.cast(TOTAL, tl.int64) * ROWS
    total = tl.sum(total, axis=0)
    tl.store(grad_weight + column, total.to(grad_weight.dtype.element_ty), mask=column < WEIGHTS)
    if grad_bias is not None:
        mask = (column >= WEIGHTS) & (column < TOTAL)
        tl.store(grad_bias + column - WEIGHTS, total.to(grad_bias.dtype.element_ty), mask=mask)


class _Plan(NamedTuple):
    """How a (B, H, W, C) map is cut, see the arguments of the kernels of these names."""

    rows: int
    strips: int  # in a program
    channels: int
    bands: int
    segments: int
    segment: int

    @classmethod
    def choose(cls, shape: torch.Size, weight: Tensor, halo: int, sums: int) -> "_Plan":
        """`halo` is the number of rows read beyond a strip, `sums` bounds the sums that a lane holds per channel."""
        images, height, width, channels = shape
        _, _, kernel_height, kernel_width = weight.shape
        rows = [count for count in (7, 4, 2, 1) if count * kernel_width <= max(sums, kernel_width)]
        height_of_strip = min(rows, key=lambda count: (ceil_div(height, count) * (count + halo), -count))
        block = channel_block(channels)
        if images * height * width * ceil_div(channels, block) >= 1 << 31:  # programs and strips are int32
            raise ValueError(f"depthwise_conv: x of shape {tuple(shape)} has too many positions for one launch")
        adjacent = 2 if kernel_height * kernel_width <= 25 else 1  # channels in a lane
        strips = 32 * _WARPS * adjacent // block
        bands = ceil_div(height, height_of_strip)
        programs = ceil_div(images * bands, strips) * ceil_div(channels, block)
        segments = max(1, min(_PROGRAMS // programs, width // 14))
        segment = ceil_div(width, segments)
        return cls(height_of_strip, strips, block, bands, ceil_div(width, segment), segment)

    def programs(self, shape: torch.Size) -> int:
        """Programs of one channel block."""
        return ceil_div(shape[0] * self.bands, self.strips) * self.segments

    def arguments(self, shape: torch.Size) -> tuple[int, ...]:
        images, height, width, _ = shape
        return height, width, images * self.bands, self.bands, self.segments, self.segment

    def constants(self, shape: torch.Size, weight: Tensor) -> dict[str, int | bool]:
        images, height, _, channels = shape
        return dict(
            C=channels,
            KH=weight.shape[2],
            KW=weight.shape[3],
            ROWS=self.rows,
            STRIPS=self.strips,
            BC=self.channels,
            EVEN_ROWS=height % self.rows == 0,
            EVEN_STRIPS=images * self.bands % self.strips == 0,
            num_warps=_WARPS,
            num_stages=1,
        )


def lines(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the distance of its positions in memory; copied unless these are equally spaced and channels adjoin."""
    images, height, width, channels = x.shape
    line = x.stride(2)
    if x.stride() != (height * width * line, width * line, line, 1):
        x, line = x.contiguous(), channels
    return x, line


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, flip: bool) -> Tensor:
    """`weight` and `bias` are contiguous; `flip` turns the kernel by half a turn."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, line = lines(x)
    plan = _Plan.choose(x.shape, weight, halo=weight.shape[2] - 1, sums=21)  # refuses maps that are too large
    if weight[0].numel() > _WALKED_TAPS:
        return by_rows.convolve(x, line, weight, bias, activation, out, flip=flip)
    grid = (plan.programs(x.shape) * ceil_div(x.shape[3], plan.channels),)
    launch(
        _depthwise_conv_forward_kernel,
        grid,
        x,
        weight,
        bias,
        out,
        *plan.arguments(x.shape),
        LINE=line,
        ACTIVATION=activation,
        FLIP=flip,
        **plan.constants(x.shape, weight),
    )
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x: (B, H, W, C), weight: (C, 1, KH, KW), bias: (C). Returns a tensor like x."""
    return _convolve(x, weight.contiguous(), None if bias is None else bias.contiguous(), activation, flip=False)


def _walk_back(
    grad: Tensor, x: Tensor, line: int, weight: Tensor, bias: Tensor | None, activation: str, fused: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradient of x if `fused`, else that of the pre-activation, None where that is `grad`; parts of the others."""
    channels, _, kernel_height, kernel_width = weight.shape
    halo, sums = (2 * (kernel_height - 1), 21) if fused else (kernel_height - 1, 14)
    plan = _Plan.choose(x.shape, weight, halo, sums)
    programs = plan.programs(x.shape)
    total = channels * (kernel_height * kernel_width + 1)
    partial = torch.empty((programs, total), dtype=torch.float32, device=x.device)
    out = None
    if fused or activation != "none":
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _depthwise_conv_backward_kernel,
        (programs * ceil_div(channels, plan.channels),),
        grad,
        x,
        weight,
        bias,
        out,
        partial,
        *plan.arguments(x.shape),
        LINE=line,
        WHOLE=plan.segments == 1,
        ACTIVATION=activation,
        FUSED=fused,
        **plan.constants(x.shape, weight),
    )
    return out, partial


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> dict[str, Tensor]:
    """grad: (B, H, W, C). Returns the gradients of x, weight and, if it is given, bias, each in its dtype."""
    weight, grad = weight.contiguous(), grad.contiguous()
    bias = None if bias is None else bias.contiguous()
    grads = {"weight": torch.empty_like(weight)} | ({} if bias is None else {"bias": torch.empty_like(bias)})
    if not x.numel():
        return {name: value.zero_() for name, value in grads.items()} | {"x": torch.empty_like(x)}
    x, line = lines(x)
    taps = weight[0].numel()
    if taps > _WALKED_TAPS:
        before = grad
        if activation != "none":
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            before = by_rows.convolve(x, line, weight, bias, activation, out, grad=grad)
        partial = by_rows.weight_parts(x, line, weight, before)
        grads["x"] = _convolve(before, weight, None, "none", flip=True)
    else:
        fused = taps <= _FUSED_TAPS
        out, partial = _walk_back(grad, x, line, weight, bias, activation, fused)
        grads["x"] = out if fused else _convolve(grad if out is None else out, weight, None, "none", flip=True)
    programs, total = partial.shape
    launch(
        _depthwise_conv_sum_kernel,
        (ceil_div(total, 32),),
        partial,
        grads["weight"],
        grads.get("bias"),
        programs,
        weight.numel(),
        total,
        ROWS=128,
        COLUMNS=32,
        num_warps=8,
    )
    return grads

"""Pieces of kernels: rows of a tile, softplus, precise products.

Kernels here hand out one warp per 32 or more channels. A tile [CHANNELS, STEPS] then keeps all its steps inside of each
lane, and taking it apart into rows, or putting rows together, costs no instruction.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # whose products of bfloat16 are wrong
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def task_of(padded, span, ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """What a program of a scan along routes works on.

    Block of channels, route, image, line (route and segment), number of the stretch, its first step, and that behind
    its last.
    """
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    stretches = tl.cdiv(padded, span)
    pid = tl.program_id(0)
    stretch = pid // blocks % stretches
    walk = pid // (blocks * stretches)
    line = (walk % (ROUTES * SEGMENTS)).to(tl.int64)
    image = (walk // (ROUTES * SEGMENTS)).to(tl.int64)
    start = stretch * span
    return pid % blocks, line // SEGMENTS, image, line, stretch, start, tl.minimum(start + span, padded)


@triton.jit
def entering_row(rows, number, d, mask, DIM: tl.constexpr):
    """Row `number` of `rows`, channels `d`; zeros where nothing enters."""
    if rows is None:
        return tl.zeros(d.shape, tl.float32)
    else:
        return tl.load(rows + number * DIM + d, mask=mask, other=0.0)


@triton.jit
def entry(table, WIDE: tl.constexpr):
    """One number of an index table, in the type that offsets are computed in: 64 bits if WIDE."""
    i = tl.load(table)
    return i.to(tl.int64) if WIDE else i.to(tl.uint32)


@triton.jit
def entries(table, WIDE: tl.constexpr, TILE: tl.constexpr):
    """TILE numbers of an index table, [TILE], as `entry` gives them."""
    return entry(table + tl.arange(0, TILE), WIDE)


@triton.jit
def of_step(rows, j: tl.constexpr, CHANNELS: tl.constexpr):
    """Number `j` of `rows`, [TILE], for every channel, [CHANNELS].

    A lane hands its number to all others; loading it once per step costs addresses, and registers for all steps.
    """
    return tl.gather(rows, tl.full([CHANNELS], j, tl.int32), 0)


@triton.jit
def rows_of(tile, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """[CHANNELS, STEPS] -> tuple of STEPS rows [CHANNELS]."""
    if STEPS == 1:
        return (tl.reshape(tile, [CHANNELS]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [CHANNELS, STEPS // 2, 2]))
        evens = rows_of(even, STEPS // 2, CHANNELS)
        odds = rows_of(odd, STEPS // 2, CHANNELS)
        rows = ()
        for j in tl.static_range(STEPS // 2):
            rows = rows + (evens[j], odds[j])
        return rows


@triton.jit
def tile_of(rows, FIRST: tl.constexpr, STRIDE: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """STEPS rows [CHANNELS] of a tuple, FIRST, FIRST + STRIDE and so on -> [CHANNELS, STEPS]."""
    if STEPS == 1:
        return tl.reshape(rows[FIRST], [CHANNELS, 1])
    else:
        even = tile_of(rows, FIRST, 2 * STRIDE, STEPS // 2, CHANNELS)
        odd = tile_of(rows, FIRST + STRIDE, 2 * STRIDE, STEPS // 2, CHANNELS)
        return tl.reshape(tl.join(even, odd), [CHANNELS, STEPS])


@triton.jit
def operand_of(rows, dtype: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """STEPS rows [CHANNELS] of float32 as a tile [CHANNELS, STEPS] of `dtype`, for a matrix product.

    The compiler cannot see through the inline code. It would otherwise take numbers that were put together for numbers
    of half their width, and carry them through shared memory one by one.
    """
    tile = tile_of(rows, 0, 1, STEPS, CHANNELS)
    if INTERPRETED:
        return tile.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [tile], tl.bfloat16, is_pure=False, pack=2
        )
    else:
        return pinned(tile)


@triton.jit
def softplus_log2(v, EXACT: tl.constexpr):
    """softplus(v / log2(e)) * log2(e): softplus of an argument in units of log2, in units of log2.

    ``max(v, 0) + log2(1 + 2**-abs(v))``, the logarithm as ``e * polynomial(e)``: precise for small step sizes too, and
    cheaper than the special function. Relative error 8e-6, or 2e-7 if EXACT.
    """
    e = tl.exp2(-tl.abs(v))
    if EXACT:
        p = 0.00754918126 * e - 0.0425670636
        p = p * e + 0.112856206
        p = p * e - 0.197118991
        p = p * e + 0.275641429
        p = p * e - 0.358408479
        p = p * e + 0.480692959
        p = p * e - 0.721340208
        p = p * e + 1.442695
    else:
        p = -0.0344359033 * e + 0.146032903
        p = p * e - 0.303036242
        p = p * e + 0.469174094
        p = p * e - 0.720426172
        p = p * e + 1.44268292
    return tl.maximum(v, 0.0) + p * e


@triton.jit
def softplus_slope(v, s):
    """Derivative of softplus, from its argument `v` and its value `s`, both in units of log2.

    ``1 / (1 + 2**-v)`` is ``2**(v - s)``, which keeps its digits where it is small, as ``1 - 2**-s`` would not.
    """
    return tl.exp2(v - s)


@triton.jit
def softplus_slope_from(s):
    """Derivative of softplus from its value `s` alone, in units of log2; to 1e-5 of it."""
    small = s * LN_2  # of which ``1 - exp(-small)`` would leave few digits
    return tl.where(s < 0.03, small * (1.0 - small * (0.5 - small * 0.16666667)), 1.0 - tl.exp2(-s))


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` in float32; float32 operands keep their precision to about 1e-6."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc=acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc=acc)


@triton.jit
def sum_products(a, b, acc, EXACT: tl.constexpr):
    """``a @ b + acc`` for sums of gradients; 10 bits of float32 operands suffice unless EXACT."""
    if EXACT or INTERPRETED or a.dtype != tl.float32:
        return dot(a, b, acc)
    else:
        return tl.dot(a, b, acc=acc, input_precision="tf32")


@triton.jit
def precise_dot(a, b, acc):
    """`dot` with `a` in float32, whatever the type of `b`: a half-precision `a` is split into two terms."""
    if b.dtype == tl.float32:
        return dot(a, b, acc)
    else:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        return dot(high, b, dot(low, b, acc))


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines of `pointers`, of any shape; nothing waits for them."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def pinned(x):
    """`x` of float32, computed in one place.

    The compiler cannot see through the inline code: it would otherwise compute `x` again in whatever layout it is used
    in, by all lanes that share a number, instead of moving the numbers there.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` of float32 in `dtype`, rounded to nearest; the interpreter's own cast to bfloat16 would cut it off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def matrix_rows(base, number, length, stride, column, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Rows `number` and columns `column` of a matrix of `length` rows and WIDTH columns, in `dtype`; zeros outside."""
    mask = (number < length)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(base + number.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    if values.dtype == dtype:
        return values
    else:
        return rounded(values.to(tl.float32), dtype)

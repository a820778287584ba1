"""SSD (Mamba-2): matrix products inside chunks, states handed from chunk to chunk inside of one program.

A program walks the chunks of one head of one image, with the state [N, P], or a block of its P columns, in registers;
memory holds no state and no matrix of decays. Where images and heads make few programs, sequences are cut into
stretches: a first pass finds what every stretch adds to what enters it, and so what enters the next.

The backward pass keeps nothing but the inputs. It finds the states that enter the chunks again and then walks the
chunks from the last to the first, with the gradient of the state in registers. Gradients of B and C, which heads share,
are written per head and added up afterwards.

Products take bfloat16 operands where all inputs are bfloat16, and 10 bits of them for float16, whose range states may
leave; float32 keeps its precision. Decays between two steps come from a sum over the steps between them alone: as a
difference of sums from the start, small ones would be lost behind a large one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .carry import hand_on
from .launch import launch
from .sizes import ceil_div, power_of_2
from .tiles import LN_2, LOG2_E, matrix_rows, rounded, softplus_log2, softplus_slope, sum_products

_FEW_PROGRAMS = 264  # below this many, sequences are cut into stretches
_SMALLEST = 16  # side of a matrix product
_WARPS = 4  # measured: more hold less work each and wait for each other


@triton.jit
def _task(stretches, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Block of channels, head, stretch and image of a program, and the number of its head of its image."""
    pid = tl.program_id(0)
    head = pid // BLOCKS % HEADS
    image = (pid // (BLOCKS * HEADS * stretches)).to(tl.int64)
    return pid % BLOCKS, head, pid // (BLOCKS * HEADS) % stretches, image, image * HEADS + head


@triton.jit
def _steps(dt, t, shift, end, stride, SOFTPLUS: tl.constexpr):
    """Arguments of the step sizes at `t` and step sizes, in units of log2; 0 from `end` on, where states stay."""
    inside = t < end
    v = tl.load(dt + t.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32) * LOG2_E + shift
    step = v
    if SOFTPLUS:
        step = softplus_log2(v, True)
    return v, tl.where(inside, step, 0.0)


@triton.jit
def _decay_out(dt, t, rate, shift, end, stride, SOFTPLUS: tl.constexpr):
    """Decay from every step of the chunk that ends before `end` to the chunk's end."""
    _, following = _steps(dt, t + 1, shift, end, stride, SOFTPLUS)
    return tl.exp2(tl.cumsum(following * rate, 0, reverse=True))


@triton.jit
def _state_tile(n, p, STATES: tl.constexpr, WIDTH: tl.constexpr):
    """Places of a tile [N, P] in a state (P, N), and which of them exist."""
    return p[None, :] * STATES + n[:, None], (n < STATES)[:, None] & (p < WIDTH)[None, :]


@triton.jit
def _load_state(states, number, n, p, STATES: tl.constexpr, WIDTH: tl.constexpr):
    """State number `number`, [N, P]; zeros where there are none."""
    place, mask = _state_tile(n, p, STATES, WIDTH)
    if states is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(states + number * (WIDTH * STATES) + place, mask=mask, other=0.0)


@triton.jit
def _ssd_states_kernel(
    values,  # (B, L, heads, P): x, or the gradient of y if TURNED
    dt,  # (B, L, heads)
    A,  # (heads)
    matrix,  # (B, L, groups, N): B, or C if TURNED
    dt_bias,  # (heads) or None
    entering,  # (B, heads, stretches, P, N) or None
    kept,  # (B, heads, chunks, P, N) or None: what enters every chunk
    leaving,  # (B, heads, stretches, P, N) or None: what leaves the stretch
    totals,  # (B, heads, stretches, P): sum of the exponents of the stretch, in units of log2; with `leaving`
    stride_vb, stride_vl, stride_vh, stride_tb, stride_tl, stride_mb, stride_ml, stride_mg, length, span, stretches,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """What a stretch does to the state that enters it, or if TURNED to the gradient of the state that leaves it."""
    dtype: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    block, head, stretch, image, sequence = _task(stretches, HEADS, (WIDTH + COLUMNS - 1) // COLUMNS)
    p, n = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    values += image * stride_vb + head * stride_vh
    dt += image * stride_tb + head
    matrix += image * stride_mb + head // GROUP * stride_mg
    rate = tl.load(A + head)
    shift = 0.0
    if dt_bias is not None:
        shift = tl.load(dt_bias + head) * LOG2_E
    place, mask = _state_tile(n, p, STATES, WIDTH)
    number = sequence * stretches + stretch
    state = _load_state(entering, number, n, p, STATES, WIDTH)
    start = stretch * span
    chunks = tl.cdiv(tl.minimum(start + span, length) - start, STEPS)
    whole = 0.0
    for turn in range(0, chunks):
        chunk = chunks - 1 - turn if TURNED else turn
        first = start + chunk * STEPS
        t = first + tl.arange(0, STEPS)
        end = tl.minimum(first + STEPS, length)
        if kept is not None:
            at = sequence * tl.cdiv(length, STEPS) + first // STEPS
            tl.store(kept + at * (WIDTH * STATES) + place, rounded(state, kept.dtype.element_ty), mask=mask)
        step = _steps(dt, t, shift, end, stride_tl, SOFTPLUS)[1]
        total = tl.sum(step * rate, 0)
        if TURNED:
            weight = tl.exp2(tl.cumsum(step * rate, 0))
        else:
            weight = step * LN_2 * _decay_out(dt, t, rate, shift, end, stride_tl, SOFTPLUS)
        rows = matrix_rows(matrix, t, length, stride_ml, n, STATES, tl.float32) * weight[:, None]
        drive = matrix_rows(values, t, length, stride_vl, p, WIDTH, dtype)
        state = sum_products(tl.trans(rounded(rows, dtype)), drive, state * tl.exp2(total), EXACT)
        whole += total
    if leaving is not None:
        tl.store(leaving + number * (WIDTH * STATES) + place, state, mask=mask)
        tl.store(totals + number * WIDTH + p, tl.zeros([COLUMNS], tl.float32) + whole, mask=p < WIDTH)


@triton.jit
def _ssd_forward_kernel(
    x,  # (B, L, heads, P)
    dt,  # (B, L, heads)
    A,  # (heads)
    B,  # (B, L, groups, N)
    C,  # (B, L, groups, N)
    D,  # (heads, P) or None
    dt_bias,  # (heads) or None
    entering,  # (B, heads, stretches, P, N) or None
    y,  # (B, L, heads, P)
    final,  # (B, heads, P, N)
    stride_xb, stride_xl, stride_xh, stride_tb, stride_tl, stride_bb, stride_bl, stride_bg,
    stride_cb, stride_cl, stride_cg, length, span, stretches,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    block, head, stretch, image, sequence = _task(stretches, HEADS, (WIDTH + COLUMNS - 1) // COLUMNS)
    p, n = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    x += image * stride_xb + head * stride_xh
    dt += image * stride_tb + head
    B += image * stride_bb + head // GROUP * stride_bg
    C += image * stride_cb + head // GROUP * stride_cg
    y += (image * length * HEADS + head) * WIDTH
    rate = tl.load(A + head)
    shift = 0.0
    if dt_bias is not None:
        shift = tl.load(dt_bias + head) * LOG2_E
    state = _load_state(entering, sequence * stretches + stretch, n, p, STATES, WIDTH)
    i = tl.arange(0, STEPS)
    for first in range(stretch * span, tl.minimum(stretch * span + span, length), STEPS):
        t = first + i
        end = tl.minimum(first + STEPS, length)
        step = _steps(dt, t, shift, end, stride_tl, SOFTPLUS)[1]
        following = _steps(dt, t + 1, shift, end, stride_tl, SOFTPLUS)[1] * rate
        b = matrix_rows(B, t, length, stride_bl, n, STATES, dtype)
        c = matrix_rows(C, t, length, stride_cl, n, STATES, dtype)
        value = matrix_rows(x, t, length, stride_xl, p, WIDTH, dtype)

        # [i, j]: what step i takes of step j, exponents summed from j + 1 to i
        between = tl.cumsum(tl.where(i[None, :] < i[:, None], following[None, :], 0.0), 1, reverse=True)
        decay = tl.where(i[None, :] <= i[:, None], tl.exp2(between), 0.0)
        scores = sum_products(c, tl.trans(b), tl.zeros([STEPS, STEPS], tl.float32), EXACT)
        mixing = rounded(scores * decay * (step * LN_2)[None, :], dtype)
        out = sum_products(c, rounded(state, dtype), tl.zeros([STEPS, COLUMNS], tl.float32), EXACT)
        out = sum_products(mixing, value, out * tl.exp2(tl.cumsum(step * rate, 0))[:, None], EXACT)
        if D is not None:
            skip = tl.load(D + head * WIDTH + p, mask=p < WIDTH, other=0.0).to(tl.float32)
            out += value.to(tl.float32) * skip[None, :]
        mask = (t < length)[:, None] & (p < WIDTH)[None, :]
        tl.store(y + t.to(tl.int64)[:, None] * (HEADS * WIDTH) + p[None, :], out, mask=mask)

        weight = step * LN_2 * tl.exp2(tl.cumsum(following, 0, reverse=True))
        rows = rounded(b.to(tl.float32) * weight[:, None], dtype)
        state = sum_products(tl.trans(rows), value, state * tl.exp2(tl.sum(step * rate, 0)), EXACT)
    if stretch == stretches - 1:
        place, mask = _state_tile(n, p, STATES, WIDTH)
        tl.store(final + sequence * (WIDTH * STATES) + place, state, mask=mask)


@triton.jit
def _ssd_backward_kernel(
    grad_y,  # (B, L, heads, P)
    x,  # (B, L, heads, P)
    dt,  # (B, L, heads)
    A,  # (heads)
    B,  # (B, L, groups, N)
    C,  # (B, L, groups, N)
    D,  # (heads, P) or None
    dt_bias,  # (heads) or None
    kept,  # (B, heads, chunks, P, N), states that enter the chunks
    entering,  # (B, heads, stretches, P, N) or None: gradients of the states that leave the stretches
    grad_x,  # (B, L, heads, P)
    grad_dt,  # (blocks, B, L, heads)
    grad_B,  # (blocks, B, L, heads, N)
    grad_C,  # (blocks, B, L, heads, N)
    grad_A,  # (blocks, B, stretches, heads)
    grad_D,  # (B, stretches, heads, P) or None
    grad_initial,  # (B, heads, P, N) or None
    stride_gb, stride_gl, stride_gh, stride_xb, stride_xl, stride_xh, stride_tb, stride_tl,
    stride_bb, stride_bl, stride_bg, stride_cb, stride_cl, stride_cg, length, span, stretches, images,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    block, head, stretch, image, sequence = _task(stretches, HEADS, (WIDTH + COLUMNS - 1) // COLUMNS)
    p, n = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    grad_y += image * stride_gb + head * stride_gh
    x += image * stride_xb + head * stride_xh
    dt += image * stride_tb + head
    B += image * stride_bb + head // GROUP * stride_bg
    C += image * stride_cb + head // GROUP * stride_cg
    grad_x += (image * length * HEADS + head) * WIDTH
    part = (block * images + image) * length * HEADS + head  # of the gradients per head, in steps
    grad_dt += part
    grad_B += part * STATES
    grad_C += part * STATES
    rate = tl.load(A + head)
    shift = 0.0
    if dt_bias is not None:
        shift = tl.load(dt_bias + head) * LOG2_E
    skip = tl.zeros([COLUMNS], tl.float32)
    if D is not None:
        skip += tl.load(D + head * WIDTH + p, mask=p < WIDTH, other=0.0).to(tl.float32)
    place, state_mask = _state_tile(n, p, STATES, WIDTH)
    adjoint = _load_state(entering, sequence * stretches + stretch, n, p, STATES, WIDTH)
    of_rate = 0.0
    of_skip = tl.zeros([COLUMNS], tl.float32)
    i = tl.arange(0, STEPS)
    start = stretch * span
    chunks = tl.cdiv(tl.minimum(start + span, length) - start, STEPS)
    for turn in tl.range(0, chunks, num_stages=1):  # loads ahead would take registers that there are not
        first = start + (chunks - 1 - turn) * STEPS
        t = first + i
        end = tl.minimum(first + STEPS, length)
        v, step = _steps(dt, t, shift, end, stride_tl, SOFTPLUS)
        exponent = step * rate
        delta = step * LN_2
        b = matrix_rows(B, t, length, stride_bl, n, STATES, dtype)
        c = matrix_rows(C, t, length, stride_cl, n, STATES, dtype)
        value = matrix_rows(x, t, length, stride_xl, p, WIDTH, dtype)
        wide_grad = matrix_rows(grad_y, t, length, stride_gl, p, WIDTH, tl.float32)
        grad = rounded(wide_grad, dtype)
        of_skip += tl.sum(wide_grad * value.to(tl.float32), 0)

        # Inside the chunk, [j, i]: what step i takes of step j, exponents summed from j + 1 to i.
        between = tl.cumsum(tl.where(i[None, :] > i[:, None], exponent[None, :], 0.0), 1)
        decay = tl.where(i[None, :] >= i[:, None], tl.exp2(between), 0.0)
        pairs = decay * sum_products(value, tl.trans(grad), tl.zeros([STEPS, STEPS], tl.float32), EXACT)
        scores = sum_products(b, tl.trans(c), tl.zeros([STEPS, STEPS], tl.float32), EXACT)
        weights = scores * pairs
        shared = rounded(pairs * delta[:, None], dtype)
        mixing = rounded(scores * decay * delta[:, None], dtype)
        of_step = tl.sum(weights, 1)
        # the decay of a step lies between all j before it and all i from it on
        later = tl.cumsum(weights * delta[:, None], 1, reverse=True)  # [j, t]: sum over i from t on
        of_decay = tl.sum(tl.where(i[:, None] < i[None, :], later, 0.0), 0)

        # Across chunks: the state that enters decays up to a step, what a step adds decays from there to the end.
        mask = t < length
        row = t.to(tl.int64) * HEADS
        decay_out = _decay_out(dt, t, rate, shift, end, stride_tl, SOFTPLUS)
        narrow = rounded(adjoint, dtype)
        of_drive = sum_products(b, narrow, tl.zeros([STEPS, COLUMNS], tl.float32), EXACT)
        across = decay_out * tl.sum(of_drive * value.to(tl.float32), 1)  # [j]
        of_step += across
        of_decay += tl.sum(tl.where(i[:, None] < i[None, :], (delta * across)[:, None], 0.0), 0)
        of_drive = of_drive * (delta * decay_out)[:, None] + wide_grad * skip[None, :]
        of_drive = sum_products(mixing, grad, of_drive, EXACT)
        tl.store(
            grad_x + row[:, None] * WIDTH + p[None, :], rounded(of_drive, grad_x.dtype.element_ty),
            mask=mask[:, None] & (p < WIDTH)[None, :],
        )  # fmt: skip

        matrix_place, matrix_mask = row[:, None] * STATES + n[None, :], mask[:, None] & (n < STATES)[None, :]
        of_b = sum_products(value, tl.trans(narrow), tl.zeros([STEPS, ROWS], tl.float32), EXACT)
        of_b = sum_products(shared, c, of_b * (delta * decay_out)[:, None], EXACT)
        tl.store(grad_B + matrix_place, of_b, mask=matrix_mask)

        decay_in = tl.exp2(tl.cumsum(exponent, 0))
        total = tl.exp2(tl.sum(exponent, 0))
        at = sequence * tl.cdiv(length, STEPS) + first // STEPS
        state = tl.load(kept + at * (WIDTH * STATES) + place, mask=state_mask, other=0.0)
        of_decay += total * tl.sum(tl.sum(state.to(tl.float32) * adjoint, 1), 0)
        of_c = sum_products(grad, tl.trans(state), tl.zeros([STEPS, ROWS], tl.float32), EXACT) * decay_in[:, None]
        of_decay += tl.cumsum(tl.sum(of_c * c.to(tl.float32), 1), 0, reverse=True)
        tl.store(grad_C + matrix_place, sum_products(tl.trans(shared), b, of_c, EXACT), mask=matrix_mask)

        of_step += of_decay * rate
        of_rate += tl.sum(of_decay * delta, 0)
        if SOFTPLUS:
            of_step *= softplus_slope(v, step)
        tl.store(grad_dt + row, of_step, mask=mask)

        rows = rounded(c.to(tl.float32) * decay_in[:, None], dtype)
        adjoint = sum_products(tl.trans(rows), grad, adjoint * total, EXACT)
    tl.store(grad_A + ((block * images + image) * stretches + stretch) * HEADS + head, of_rate)
    if grad_D is not None:
        tl.store(grad_D + ((image * stretches + stretch) * HEADS + head) * WIDTH + p, of_skip, mask=p < WIDTH)
    if grad_initial is not None:
        if stretch == 0:
            tl.store(grad_initial + sequence * (WIDTH * STATES) + place, adjoint, mask=state_mask)


class _Cut(NamedTuple):
    """Constants of the kernels: steps of a chunk, rows (all of N) and columns (of P) of a state's tile."""

    steps: int
    rows: int
    columns: int


def _cut(length: int, width: int, states: int, half: bool, exact: bool, backward: bool) -> _Cut:
    rows = max(_SMALLEST, power_of_2(states))
    # more steps and columns do not fit into registers and shared memory
    widest = 32 if exact else 64
    columns = min(widest, max(_SMALLEST, power_of_2(width)), max(_SMALLEST, 128 * widest // rows))
    steps = 32 if half or not (exact or backward) else 16
    return _Cut(min(steps, max(_SMALLEST, power_of_2(length))), rows, columns)


class _Call:
    """What both passes need to know of their inputs."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        dt_softplus: bool,
        backward: bool,
    ):
        self.x, self.dt, self.B, self.C = (_rows_together(tensor) for tensor in (x, dt, B, C))
        self.batch, self.length, self.heads, self.width = x.shape
        self.states = B.shape[3]
        self.A = A.float().contiguous()
        self.D = None if D is None else D.expand(-1, self.width).contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.float().contiguous()
        self.initial = None if initial_states is None else initial_states.float().contiguous()
        dtypes = {tensor.dtype for tensor in (x, B, C)}
        half, exact = dtypes == {torch.bfloat16}, torch.float32 in dtypes
        cut = _cut(self.length, self.width, self.states, half, exact, backward)
        self.blocks, self.chunks = ceil_div(self.width, cut.columns), ceil_div(self.length, cut.steps)
        self.sequences = self.batch * self.heads
        stretches = 1
        if 0 < self.sequences * self.blocks < _FEW_PROGRAMS:
            stretches = min(self.chunks, ceil_div(2 * _FEW_PROGRAMS, self.sequences * self.blocks))
        span = ceil_div(self.chunks, stretches)
        self.stretches, self.span = ceil_div(self.chunks, span), span * cut.steps
        self.grid = (self.sequences * self.stretches * self.blocks,)
        self.state_dtype = torch.bfloat16 if half else torch.float32
        self.constants = dict(
            HEADS=self.heads, GROUP=self.heads // B.shape[2], WIDTH=self.width, STATES=self.states, STEPS=cut.steps,
            COLUMNS=cut.columns, ROWS=cut.rows, SOFTPLUS=dt_softplus, EXACT=exact, HALF=half,
        )  # fmt: skip

    def entering(self, values: Tensor, matrix: Tensor, outer: Tensor | None, turned: bool) -> Tensor | None:
        """What enters every stretch, (B, heads, stretches, P, N): states, or if `turned` their gradients.

        `outer`, (B, heads, P, N), enters the first one, or if `turned` the last.
        """
        if self.stretches == 1:
            return outer
        leaving = self.x.new_empty(self.sequences, self.stretches, self.width, self.states, dtype=torch.float32)
        totals = self.x.new_empty(self.sequences, self.stretches, self.width, dtype=torch.float32)
        self.walk(values, matrix, None, None, leaving, totals, turned)
        return hand_on(leaving, totals, torch.ones_like(leaving[0, :1]), outer, turned=turned)

    def walk(
        self,
        values: Tensor,
        matrix: Tensor,
        entering: Tensor | None,
        kept: Tensor | None,
        leaving: Tensor | None,
        totals: Tensor | None,
        turned: bool,
    ) -> None:
        """Launch `_ssd_states_kernel`."""
        launch(
            _ssd_states_kernel, self.grid,
            values, self.dt, self.A, matrix, self.dt_bias, entering, kept, leaving, totals,
            *values.stride()[:3], *self.dt.stride()[:2], *matrix.stride()[:3], self.length, self.span, self.stretches,
            **self.constants, TURNED=turned, num_warps=_WARPS,
        )  # fmt: skip


def _rows_together(tensor: Tensor) -> Tensor:
    """`tensor` with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns y, (B, L, heads, P), and the final states, (B, heads, P, N), in float32. `chunk_size` is not used."""
    call = _Call(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, backward=False)
    y = x.new_empty(x.shape, dtype=torch.float32)
    final = x.new_empty(call.batch, call.heads, call.width, call.states, dtype=torch.float32)
    if call.sequences:
        entering = call.entering(call.x, call.B, call.initial, turned=False)
        launch(
            _ssd_forward_kernel, call.grid,
            call.x, call.dt, call.A, call.B, call.C, call.D, call.dt_bias, entering, y, final,
            *call.x.stride()[:3], *call.dt.stride()[:2], *call.B.stride()[:3], *call.C.stride()[:3],
            call.length, call.span, call.stretches, **call.constants, num_warps=_WARPS,
        )  # fmt: skip
    return y, final


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> dict[str, Tensor]:
    """Gradients by name; that of `x` in its dtype, the others in float32."""
    call = _Call(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, backward=True)
    batch, length, heads, width, states = *x.shape, call.states
    grad_y = _rows_together(grad_y) if grad_y.numel() else x.new_zeros(x.shape, dtype=torch.float32)
    new = x.new_empty if call.sequences else x.new_zeros
    wide = dict(dtype=torch.float32)
    grad_x = new(x.shape)
    grad_dt = new(call.blocks, batch, length, heads, **wide)
    grad_B, grad_C = (new(call.blocks, batch, length, heads, states, **wide) for _ in "BC")
    grad_A = new(call.blocks * batch * call.stretches, heads, **wide)
    grad_D = None if D is None else new(batch * call.stretches, heads, width, **wide)
    grad_initial = None if initial_states is None else new(batch, heads, width, states, **wide)
    if call.sequences:
        kept = x.new_empty(call.sequences, call.chunks, width, states, dtype=call.state_dtype)
        entering = call.entering(call.x, call.B, call.initial, turned=False)
        call.walk(call.x, call.B, entering, kept, None, None, turned=False)
        outer = grad_final.float().contiguous() if grad_final.numel() else None
        launch(
            _ssd_backward_kernel, call.grid,
            grad_y, call.x, call.dt, call.A, call.B, call.C, call.D, call.dt_bias, kept,
            call.entering(grad_y, call.C, outer, turned=True),
            grad_x, grad_dt, grad_B, grad_C, grad_A, grad_D, grad_initial,
            *grad_y.stride()[:3], *call.x.stride()[:3], *call.dt.stride()[:2], *call.B.stride()[:3],
            *call.C.stride()[:3], length, call.span, call.stretches, batch,
            **call.constants, num_warps=_WARPS,
        )  # fmt: skip
    grad_dt = _sum_blocks(grad_dt)
    grads = {"x": grad_x, "dt": grad_dt, "A": grad_A.sum(0)}
    groups = B.shape[2]
    for name, grad in (("B", grad_B), ("C", grad_C)):
        grads[name] = _sum_blocks(grad).unflatten(2, (groups, -1)).sum(3)  # (B, L, groups, N)
    if grad_D is not None:
        grads["D"] = grad_D.sum(0).sum_to_size(D.shape)
    if dt_bias is not None:
        grads["dt_bias"] = grad_dt.sum((0, 1))
    if grad_initial is not None:
        grads["initial_states"] = grad_initial
    return grads


def _sum_blocks(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)

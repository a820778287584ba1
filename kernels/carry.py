"""Hands states on from one stretch of a sequence to the next, where stretches are scanned at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div

_BLOCK = 128


@triton.jit
def _carry_kernel(
    carry, totals, rates, outer, entering, stretches, size,
    ROUTES: tl.constexpr, SEGMENTS: tl.constexpr, DIM: tl.constexpr, STATES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    walk = i // (DIM * STATES)
    place = i % (DIM * STATES)
    channel = place % DIM if CHANNELS_LAST else place // STATES
    rate = tl.load(rates + walk // SEGMENTS % ROUTES * (DIM * STATES) + place, mask=inside, other=0.0)
    h = tl.zeros([BLOCK], tl.float32)
    if outer is not None:
        h += tl.load(outer + i, mask=inside, other=0.0)
    for turn in range(0, stretches):
        stretch = stretches - 1 - turn if TURNED else turn
        at = walk * stretches + stretch
        tl.store(entering + at * (DIM * STATES) + place, h, mask=inside)
        total = tl.load(totals + at * DIM + channel, mask=inside, other=0.0)
        h = tl.exp2(total * rate) * h + tl.load(carry + at * (DIM * STATES) + place, mask=inside, other=0.0)


def hand_on(
    carry: Tensor,
    totals: Tensor,
    rates: Tensor,
    outer: Tensor | None = None,
    *,
    channels_last: bool = False,
    routes: int = 1,
    segments: int = 1,
    turned: bool = False,
) -> Tensor:
    """What enters every stretch of every sequence.

    Args:
        carry: (sequences, stretches, dim, N) float32, what a stretch adds to what enters it. A sequence is one of
            `segments` of one of `routes` of an image.
        totals: (sequences, stretches, dim) float32, the sum of a stretch's step sizes in units of log2.
        rates: (routes, dim, N), decay rates.
        outer: (sequences, dim, N), what enters a sequence; None: zeros.
        channels_last: `carry`, `rates` and `outer` end in (N, dim) instead of (dim, N).
        turned: sequences run from their last stretch to their first.

    Returns:
        A tensor like `carry`.
    """
    sequences, stretches, *inner = carry.shape
    dim = totals.shape[2]
    entering = torch.empty_like(carry)
    size = sequences * inner[0] * inner[1]
    launch(
        _carry_kernel, (ceil_div(size, _BLOCK),),
        carry, totals, rates, outer, entering, stretches, size,
        ROUTES=routes, SEGMENTS=segments, DIM=dim, STATES=inner[0] if channels_last else inner[1],
        CHANNELS_LAST=channels_last, BLOCK=_BLOCK, TURNED=turned, num_warps=4,
    )  # fmt: skip
    return entering

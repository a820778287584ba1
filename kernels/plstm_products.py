"""Products of weights, scores and values for pLSTM: attention without softmax, and its gradients.

Products take bfloat16 operands where all inputs are bfloat16, and 10 bits of them for float16; float32 keeps its
precision.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import ceil_div, power_of_2
from .tiles import matrix_rows, rounded, sum_products

_BLOCK = 64  # nodes on a side of a matrix product
_CHANNELS = 64  # of a matrix product, at most
_SMALLEST = 16  # side of a matrix product
_WARPS = 4


@triton.jit
def _scores(
    a, b, i, j, length, stride_a, stride_b, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Products of the rows `i` of `a` with the rows `j` of `b`, [BLOCK, BLOCK]."""
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.static_range(0, WIDTH, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        left = matrix_rows(a, i, length, stride_a, channel, WIDTH, dtype)
        right = matrix_rows(b, j, length, stride_b, channel, WIDTH, dtype)
        scores = sum_products(left, tl.trans(right), scores, EXACT)
    return scores


@triton.jit
def _plstm_products_kernel(
    a,  # (B, cells, heads, WIDTH)
    b,  # (B, cells, heads, WIDTH)
    z,  # (B, cells, heads, OUT_WIDTH)
    weights,  # (sequences, cells, padded)
    direct,  # (B, cells, heads) or None
    out,  # (B, cells, heads, OUT_WIDTH)
    stride_a, head_a, stride_b, head_b, stride_z, head_z, first_sequence, length, padded, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """``out[i] = scale * sum_j(weights[i, j] * (a[i] @ b[j]) * z[j])``, or with ``weights[j, i]`` if TURNED."""
    dtype: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    chunks: tl.constexpr = (OUT_WIDTH + OUT_CHANNELS - 1) // OUT_CHANNELS
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    channel = pid % chunks * OUT_CHANNELS + tl.arange(0, OUT_CHANNELS)
    i = pid // chunks % blocks * BLOCK + tl.arange(0, BLOCK)
    local = (pid // (chunks * blocks)).to(tl.int64)
    image = (local + first_sequence) // HEADS
    head = (local + first_sequence) % HEADS
    a += image * length * stride_a + head * head_a
    b += image * length * stride_b + head * head_b
    z += image * length * stride_z + head * head_z
    weights += local * length * padded
    own = tl.zeros([BLOCK], tl.float32)
    if direct is not None:
        own += tl.load(direct + (image * length + i) * HEADS + head, mask=i < length, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK, OUT_CHANNELS], tl.float32)
    for start in range(0, length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        scores = _scores(a, b, i, j, length, stride_a, stride_b, WIDTH, CHANNELS, BLOCK, EXACT, dtype)
        if TURNED:
            place = j.to(tl.int64)[None, :] * padded + i[:, None]
        else:
            place = i.to(tl.int64)[:, None] * padded + j[None, :]
        weight = tl.load(weights + place, mask=(i < length)[:, None] & (j < length)[None, :], other=0.0)
        weight += tl.where(i[:, None] == j[None, :], own[:, None], 0.0)
        mixing = rounded(scores * weight * scale, dtype)
        total = sum_products(mixing, matrix_rows(z, j, length, stride_z, channel, OUT_WIDTH, dtype), total, EXACT)
    target = out + ((image * length + i) * HEADS + head)[:, None] * OUT_WIDTH + channel[None, :]
    total = rounded(total, out.dtype.element_ty)
    tl.store(target, total, mask=(i < length)[:, None] & (channel < OUT_WIDTH)[None, :])


@triton.jit
def _plstm_of_weights_kernel(
    query,  # (B, cells, heads, WIDTH)
    key,  # (B, cells, heads, WIDTH)
    grad,  # (B, cells, heads, OUT_WIDTH)
    value,  # (B, cells, heads, OUT_WIDTH)
    of_weights,  # (sequences, cells, padded)
    of_direct,  # (B, cells, heads) or None
    stride_q, head_q, stride_k, head_k, stride_g, head_g, stride_v, head_v, first_sequence, length, padded, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``of_weights[i, j] = scale * (query[i] @ key[j]) * (grad[i] @ value[j])``; its diagonal goes to `of_direct`."""
    dtype: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    j = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    i = pid // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    local = (pid // (blocks * blocks)).to(tl.int64)
    image = (local + first_sequence) // HEADS
    head = (local + first_sequence) % HEADS
    query += image * length * stride_q + head * head_q
    key += image * length * stride_k + head * head_k
    grad += image * length * stride_g + head * head_g
    value += image * length * stride_v + head * head_v
    scores = _scores(query, key, i, j, length, stride_q, stride_k, WIDTH, CHANNELS, BLOCK, EXACT, dtype)
    found = _scores(grad, value, i, j, length, stride_g, stride_v, OUT_WIDTH, OUT_CHANNELS, BLOCK, EXACT, dtype)
    found *= scores * scale
    target = of_weights + (local * length + i)[:, None] * padded + j[None, :]
    # columns up to `padded` are read by lanes that are no source: zeros, since there is no such key
    tl.store(target, found, mask=(i < length)[:, None] & (j < padded)[None, :])
    if of_direct is not None:
        if pid % blocks == pid // blocks % blocks:
            diagonal = tl.sum(tl.where(i[:, None] == j[None, :], found, 0.0), 1)
            tl.store(of_direct + (image * length + i) * HEADS + head, diagonal, mask=i < length)


def _by_node(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A (B, X, Y, H, C) tensor and the distances of its nodes and heads; copied unless nodes are equally spaced."""
    _, height, width, heads, channels = tensor.shape
    node, head = tensor.stride(2), tensor.stride(3)
    if tensor.stride() != (height * width * node, width * node, node, head, 1):
        tensor, node, head = tensor.contiguous(), heads * channels, channels
    return tensor, node, head


class Products:
    """Queries, keys and values of a map, and the products of weights with them.

    Args:
        Q, K: (B, X, Y, H, DK).
        V: (B, X, Y, H, DV).
        direct: (B, X, Y, H), contiguous, added to the weight with which a node reads itself; or None.
    """

    def __init__(self, Q: Tensor, K: Tensor, V: Tensor, direct: Tensor | None):
        self.Q, self.K, self.V, self.direct = Q, K, V, direct
        self.heads = Q.shape[3]
        self.cells = Q.shape[1] * Q.shape[2]
        self.scale = Q.shape[4] ** -0.5
        self.half = all(tensor.dtype == torch.bfloat16 for tensor in (Q, K, V))
        self.exact = torch.float32 in (Q.dtype, K.dtype, V.dtype)

    def _constants(self, width: int, out_width: int) -> dict[str, Any]:
        channels, out_channels = (min(_CHANNELS, max(_SMALLEST, power_of_2(size))) for size in (width, out_width))
        return dict(
            HEADS=self.heads, WIDTH=width, OUT_WIDTH=out_width, CHANNELS=channels, OUT_CHANNELS=out_channels,
            BLOCK=_BLOCK, EXACT=self.exact, HALF=self.half, num_warps=_WARPS,
        )  # fmt: skip

    def _product(
        self, a: Tensor, b: Tensor, z: Tensor, weights: Tensor, out: Tensor, first: int, *, turned: bool = False
    ) -> None:
        """See `_plstm_products_kernel`."""
        constants = self._constants(a.shape[4], z.shape[4])
        chunks = ceil_div(z.shape[4], constants["OUT_CHANNELS"])
        (a, *of_a), (b, *of_b), (z, *of_z) = _by_node(a), _by_node(b), _by_node(z)
        launch(
            _plstm_products_kernel, (len(weights) * ceil_div(self.cells, _BLOCK) * chunks,),
            a, b, z, weights, self.direct, out, *of_a, *of_b, *of_z, first, self.cells, weights.shape[2], self.scale,
            TURNED=turned, **constants,
        )  # fmt: skip

    def forward(self, weights: Tensor, out: Tensor, first: int) -> None:
        """Write what the heads of images from number `first` on read to `out`, (B, X, Y, H, DV)."""
        self._product(self.Q, self.K, self.V, weights, out, first)

    def backward(self, grad: Tensor, weights: Tensor, gradients: dict[str, Tensor], first: int) -> Tensor:
        """Write gradients of Q, K, V and D to `gradients`. Returns that of the weights."""
        Q, K, V = self.Q, self.K, self.V
        self._product(grad, V, K, weights, gradients["Q"], first)
        self._product(V, grad, Q, weights, gradients["K"], first, turned=True)
        self._product(K, Q, grad, weights, gradients["V"], first, turned=True)
        of_weights = torch.empty_like(weights)
        given = [_by_node(tensor) for tensor in (Q, K, grad, V)]
        launch(
            _plstm_of_weights_kernel, (len(weights) * ceil_div(self.cells, _BLOCK) ** 2,),
            *(tensor for tensor, *_ in given), of_weights, gradients.get("D"),
            *(stride for _, *strides in given for stride in strides), first, self.cells, weights.shape[2], self.scale,
            **self._constants(Q.shape[4], V.shape[4]),
        )  # fmt: skip
        return of_weights

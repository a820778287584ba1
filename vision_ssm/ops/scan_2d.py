"""The selective scan of a map along several routes, merged: the core of VMamba (arXiv 2401.10166) and its kin.

The projections of a state-space model along a route are pointwise, so they commute with the route: they are given at
the positions of the map, and only the operator walks the routes. No copy of the map per route is ever needed.
"""

from typing import Any

from torch import Tensor

from . import chunked_scan_2d, flops
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_table, check_tensors
from .chunked import work_dtype
from .reference import scan_2d_reference
from .registration import register_operator, wants_gradient

_OP = "scan_2d"


def _fake(x: Tensor, *inputs: Any) -> Tensor:
    read, norm_weight, merge = inputs[5], inputs[9], inputs[14]
    shape = chunked_scan_2d.output_shape(x, read, merge)
    return x.new_empty(shape, dtype=work_dtype(x) if norm_weight is None else x.dtype)


_scan = register_operator(
    _OP,
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor read, Tensor? write, Tensor? dt_weight, "
    "Tensor? dt_bias, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool delta_softplus, int? segment, "
    "bool merge, bool save",
    ("y",),
    chunked_scan_2d,
    _fake,
    flops.scan_2d_shapes,
    saved=("total", "statistics", "states"),
)


def scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    read: Tensor,
    write: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    delta_softplus: bool = True,
    segment: int | None = None,
    merge: bool = True,
) -> Tensor:
    """Selective scan of L positions along K routes of T steps; the outputs of all routes are added.

    Route k sees position ``i = read[k, t]`` at step t. With ``d = delta[i, k]`` (times ``dt_weight[k]`` if given) plus
    ``dt_bias[k]``, through softplus if `delta_softplus`, it runs
    ``h[t] = exp(d * A[k]) * h[t-1] + d * B[i, k] * x[i]`` from 0 and adds ``<C[i, k], h[t]> + D[k] * x[i]`` to the
    output at position ``write[k, t]``. The sum over routes may be normalised over the channels. All of it is computed
    in float32 (float64 for float64 `x`), whatever autocast says; but the GPU's kernels round the output of every route
    to the dtype of `x` before the sum. States that grow (`A` positive) overflow earlier than in a plain loop.

    Args:
        x: (B, L, D), channels last, any floating dtype; or (B, L, K, D), where route k scans a map of its own (a
            group of channels, say).
        delta: (B, L, K, R), step sizes of rank R, expanded by `dt_weight`; without that (B, L, K, D).
        A: (K, D, N), negative for decaying states.
        B: (B, L, K, N).
        C: (B, L, K, N).
        D: (K, D), skip connection.
        read: (K, T) int32 or int64, positions in [0, L). A route may cover part of the map, and one position twice.
        write: (K, T), where outputs go; None: where inputs come from. Positions that no route writes to are 0.
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        norm_weight, norm_bias, norm_eps: apply this layer norm to the result; weight and bias (D).
        delta_softplus: apply softplus to the step sizes.
        segment: the state starts again from 0 every `segment` steps; must divide T.
        merge: add the outputs of all routes; False keeps them apart.

    Returns:
        (B, L, D), or (B, L, K, D) if not `merge`, in float32 (float64 for float64 `x`); in the dtype of `x` if
        normalised.

    Raises:
        TypeError: a tensor is complex or not floating-point, or a table not of integers.
        ValueError: a shape, device or `segment` does not fit; VISION_SSM_BACKEND names no backend.
        IndexError: a table holds a position outside of [0, L).
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    parameters = dict(D=D, dt_weight=dt_weight, dt_bias=dt_bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_tensors(_OP, dict(x=x, delta=delta, A=A, B=B, C=C), parameters)
    check_table(_OP, "read", read, x)
    if x.dim() == 4:
        check_dimensions(_OP, "x", x, "(B, L, K, D)")
        check_shape(_OP, "x", x, (*x.shape[:2], read.shape[0], x.shape[3]), "(B, L, K routes of read, D)")
    else:
        check_dimensions(_OP, "x", x, "(B, L, D)")
    check_dimensions(_OP, "delta", delta, "(B, L, K, R)")
    check_dimensions(_OP, "A", A, "(K, D, N)")
    batch, length, dim = x.shape[0], x.shape[1], x.shape[-1]
    (routes, steps), states = read.shape, A.shape[2]
    if write is not None:
        check_table(_OP, "write", write, x)
        check_shape(_OP, "write", write, (routes, steps), "(K, T) like read")
    check_shape(_OP, "A", A, (routes, dim, states), "(K, D, N)")
    check_shape(_OP, "B", B, (batch, length, routes, states), "(B, L, K, N)")
    check_shape(_OP, "C", C, (batch, length, routes, states), "(B, L, K, N)")
    check_shape(_OP, "D", D, (routes, dim), "(K, D)")
    check_shape(_OP, "dt_bias", dt_bias, (routes, dim), "(K, D)")
    check_shape(_OP, "norm_weight", norm_weight, (dim,), "(D)")
    check_shape(_OP, "norm_bias", norm_bias, (dim,), "(D)")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{_OP}: norm_bias is given without norm_weight, which turns the norm on")
    if dt_weight is None:
        check_shape(_OP, "delta", delta, (batch, length, routes, dim), "(B, L, K, D), as there is no dt_weight,")
    else:
        rank = delta.shape[3]
        check_shape(_OP, "delta", delta, (batch, length, routes, rank), "(B, L, K, R)")
        check_shape(_OP, "dt_weight", dt_weight, (routes, dim, rank), "(K, D, R)")
    if segment is not None and (segment < 1 or steps % segment):
        raise ValueError(f"{_OP}: segment must divide the {steps} steps of a route, got {segment}")

    if demanded_backend() == "reference":
        return scan_2d_reference(
            x,
            delta,
            A,
            B,
            C,
            D,
            read=read,
            write=write,
            dt_weight=dt_weight,
            dt_bias=dt_bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            delta_softplus=delta_softplus,
            segment=segment,
            merge=merge,
        )
    tensors = (x, delta, A, B, C, D, read, write, dt_weight, dt_bias, norm_weight, norm_bias)
    return _scan(*tensors, norm_eps, delta_softplus, segment, merge, wants_gradient(*tensors))[0]

"""The selective scan of a map along several routes, merged: the core of VMamba (arXiv 2401.10166) and its kin.

The projections of a state-space model along a route are pointwise, so they commute with the route: they are given at
the positions of the map, and only the operator walks the routes. No copy of the map per route is ever needed.
"""

from torch import Tensor

from . import chunked_scan_2d, flops
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_table, check_tensors
from .chunked import work_dtype
from .reference import scan_2d_reference
from .registration import register_operator

_OP = "scan_2d"


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=work_dtype(x))


_scan = register_operator(
    _OP,
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor read, Tensor? write, Tensor? dt_weight, "
    "Tensor? dt_bias, bool delta_softplus, int? segment",
    ("y",),
    chunked_scan_2d,
    _fake,
    flops.scan_2d_shapes,
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
    delta_softplus: bool = True,
    segment: int | None = None,
) -> Tensor:
    """Selective scan of L positions along K routes of T steps; the outputs of all routes are added.

    Route k sees position ``i = read[k, t]`` at step t. With ``d = delta[i, k]`` (times ``dt_weight[k]`` if given) plus
    ``dt_bias[k]``, through softplus if `delta_softplus`, it runs
    ``h[t] = exp(d * A[k]) * h[t-1] + d * B[i, k] * x[i]`` from 0 and adds ``<C[i, k], h[t]> + D[k] * x[i]`` to the
    output at position ``write[k, t]``. All of it is computed in float32 (float64 for float64 `x`), whatever autocast
    says.

    Args:
        x: (B, L, D), channels last, any floating dtype.
        delta: (B, L, K, R), step sizes of rank R, expanded by `dt_weight`; without that (B, L, K, D).
        A: (K, D, N), negative for decaying states.
        B: (B, L, K, N).
        C: (B, L, K, N).
        D: (K, D), skip connection.
        read: (K, T) int32 or int64, positions in [0, L). A route may cover part of the map, and one position twice.
        write: (K, T), where outputs go; None: where inputs come from. Positions that no route writes to are 0.
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        delta_softplus: apply softplus to the step sizes.
        segment: the state starts again from 0 every `segment` steps; must divide T.

    Returns:
        (B, L, D) in float32 (float64 for float64 `x`).

    Raises:
        TypeError: a tensor is complex or not floating-point, or a table not of integers.
        ValueError: a shape, device or `segment` does not fit; VISION_SSM_BACKEND names no backend.
        IndexError: a table holds a position outside of [0, L).
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(x=x, delta=delta, A=A, B=B, C=C), dict(D=D, dt_weight=dt_weight, dt_bias=dt_bias))
    check_table(_OP, "read", read, x)
    check_dimensions(_OP, "x", x, "(B, L, D)")
    check_dimensions(_OP, "delta", delta, "(B, L, K, R)")
    check_dimensions(_OP, "A", A, "(K, D, N)")
    batch, length, dim = x.shape
    (routes, steps), states = read.shape, A.shape[2]
    if write is not None:
        check_table(_OP, "write", write, x)
        check_shape(_OP, "write", write, (routes, steps), "(K, T) like read")
    check_shape(_OP, "A", A, (routes, dim, states), "(K, D, N)")
    check_shape(_OP, "B", B, (batch, length, routes, states), "(B, L, K, N)")
    check_shape(_OP, "C", C, (batch, length, routes, states), "(B, L, K, N)")
    check_shape(_OP, "D", D, (routes, dim), "(K, D)")
    check_shape(_OP, "dt_bias", dt_bias, (routes, dim), "(K, D)")
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
            delta_softplus=delta_softplus,
            segment=segment,
        )
    return _scan(x, delta, A, B, C, D, read, write, dt_weight, dt_bias, delta_softplus, segment)

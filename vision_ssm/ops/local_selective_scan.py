"""The locally bi-directional scan of LBMamba (arXiv 2506.15976): a selective scan that looks ahead inside windows."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import composed_local_scan, flops
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .reference import local_selective_scan_reference
from .registration import register_operator

_OP = "local_selective_scan"


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=work_dtype(x))


_scan = register_operator(
    _OP,
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_weight, Tensor? dt_bias, "
    "bool delta_softplus, int window, bool reverse",
    ("y",),
    composed_local_scan,
    _fake,
    flops.local_selective_scan_shapes,
)


def default_window(length: int) -> int:
    """Window of the published kernels for a sequence of `length` steps: 4, from 129 steps on 8, from 257 on 16."""
    if length <= 128:
        return 4
    return 8 if length <= 256 else 16


def local_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    delta_softplus: bool = True,
    window: int | None = None,
    reverse: bool = False,
) -> Tensor:
    """`local_selective_scan` of channel-last sequences, with the arguments of `scan_2d`.

    Args:
        x: (B, L, K, D): K groups of D channels, each with parameters of its own.
        delta, A, B, C, D, dt_weight, dt_bias, delta_softplus: see `scan_2d`.
        window: steps M of a window; None: `default_window`.
        reverse: walk the sequence from its end, where the first window then begins.

    Returns:
        (B, L, K, D), float32 (float64 for float64 `x`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit, or `window` is not a positive whole number.
    """
    parameters = dict(D=D, dt_weight=dt_weight, dt_bias=dt_bias)
    check_tensors(_OP, dict(x=x, delta=delta, A=A, B=B, C=C), parameters)
    check_dimensions(_OP, "x", x, "(B, L, K, D)")
    check_dimensions(_OP, "delta", delta, "(B, L, K, R)")
    check_dimensions(_OP, "A", A, "(K, D, N)")
    batch, length, groups, dim = x.shape
    states, rank = A.shape[2], delta.shape[3]
    check_shape(_OP, "A", A, (groups, dim, states), "(K, D, N)")
    for name, matrix in (("B", B), ("C", C)):
        check_shape(_OP, name, matrix, (batch, length, groups, states), "(B, L, K, N)")
    check_shape(_OP, "D", D, (groups, dim), "(K, D)")
    check_shape(_OP, "dt_bias", dt_bias, (groups, dim), "(K, D)")
    check_shape(_OP, "dt_weight", dt_weight, (groups, dim, rank), "(K, D, R)")
    expected = dim if dt_weight is None else rank
    check_shape(_OP, "delta", delta, (batch, length, groups, expected), "(B, L, K, D), or R of dt_weight for D,")
    window = default_window(length) if window is None else window
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"{_OP}: window must be a positive whole number, got {window!r}")
    return _scan(x, delta, A, B, C, D, dt_weight, dt_bias, delta_softplus, window, reverse)


def local_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    window: int | None = None,
) -> Tensor:
    """Selective scan in which every step also sees the steps behind it in its window (LBMamba, arXiv 2506.15976).

    With ``d = delta + delta_bias``, through softplus if `delta_softplus`, every channel runs
    ``h[t] = exp(d[t] * A) * h[t-1] + d[t] * B[t] * u[t]`` from 0 and, backwards in windows of M steps counted from step
    0, ``q[t] = exp(d[t] * A) * (q[t+1] + d[t+1] * B[t+1] * u[t+1])`` from 0 at the last step of the window. It gives
    ``y[t] = <C[t], h[t] + q[t]> + D * u[t]``, times ``silu(z[t])``. All of it is computed in float32 (float64 for
    float64 `u`), whatever autocast says.

    Args:
        u: (batch, dim, L), any floating dtype.
        delta: (batch, dim, L), step sizes.
        A: (dim, N), negative for decaying states.
        B: (batch, G, N, L), shared by the dim / G channels of a group; or (batch, N, L), shared by all channels.
        C: like B, with as many groups.
        D: (dim), skip connection.
        z: (batch, dim, L), gate.
        delta_bias: (dim).
        delta_softplus: apply softplus to the step sizes.
        window: steps M of a window; None takes that of the published kernels, which depends on L (see
            `default_window`): fix it to run trained weights at another length.

    Returns:
        (batch, dim, L) in the dtype of `u`.

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape, device or `window` does not fit; VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(u=u, delta=delta, A=A, B=B, C=C), dict(D=D, z=z, delta_bias=delta_bias))
    check_dimensions(_OP, "u", u, "(batch, dim, L)")
    check_dimensions(_OP, "A", A, "(dim, N)")
    (batch, dim, length), states = u.shape, A.shape[1]
    check_shape(_OP, "delta", delta, (batch, dim, length), "(batch, dim, L) like u")
    check_shape(_OP, "A", A, (dim, states), "(dim, N)")
    if B.dim() == C.dim() == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    check_dimensions(_OP, "B", B, "(batch, G, N, L)")
    groups = B.shape[1]
    if dim % groups:
        raise ValueError(f"{_OP}: B has {groups} groups, which do not divide the {dim} channels of u")
    for name, matrix in (("B", B), ("C", C)):
        check_shape(_OP, name, matrix, (batch, groups, states, length), "(batch, G, N, L)")
    check_shape(_OP, "D", D, (dim,), "(dim)")
    check_shape(_OP, "z", z, (batch, dim, length), "(batch, dim, L) like u")
    check_shape(_OP, "delta_bias", delta_bias, (dim,), "(dim)")

    if demanded_backend() == "reference":
        window = default_window(length) if window is None else window
        return local_selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, window)

    def by_step(values: Tensor) -> Tensor:
        return values.unflatten(1, (groups, -1)).permute(0, 3, 1, 2)  # (batch, dim, L) -> (batch, L, G, dim / G)

    def by_group(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.unflatten(0, (groups, -1))  # (dim, ...) -> (G, dim / G, ...)

    y = local_scan(
        by_step(u),
        by_step(delta),
        by_group(A),
        B.permute(0, 3, 1, 2),  # (batch, L, G, N)
        C.permute(0, 3, 1, 2),
        by_group(D),
        dt_bias=by_group(delta_bias),
        delta_softplus=delta_softplus,
        window=window,
    )
    y = y.flatten(2).mT  # (batch, dim, L)
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(u.dtype)

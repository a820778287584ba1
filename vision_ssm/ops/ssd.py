"""SSD, the state-space dual of Mamba-2 (arXiv 2405.21060): one scalar decay per head, computed by matrix products."""

import torch.nn.functional as F
from torch import Tensor

from . import chunked_ssd, flops
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .reference import ssd_reference
from .registration import register_operator

_OP = "ssd"


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    work = work_dtype(x)
    return x.new_empty(x.shape, dtype=work), x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=work)


_ssd = register_operator(
    _OP,
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, "
    "bool dt_softplus, int chunk_size",
    ("y", "final_states"),
    chunked_ssd,
    _fake,
    flops.ssd_shapes,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 scan of heads of width P with N states per channel.

    With ``d = dt + dt_bias``, through softplus if `dt_softplus`, every head runs
    ``S[t] = exp(d[t] * A) * S[t-1] + d[t] * outer(x[t], B[t])`` and gives ``y[t] = S[t] @ C[t] + D * x[t]``, times
    ``silu(z[t])``. All of it is computed in float32 (float64 for float64 `x`), whatever autocast says.

    Args:
        x: (B, L, heads, P), any floating dtype and any length.
        dt: (B, L, heads), step sizes.
        A: (heads), negative for decaying states.
        B: (B, L, groups, N); the heads / groups neighbouring heads of a group share it.
        C: (B, L, groups, N).
        D: (heads) or (heads, P), skip connection.
        z: (B, L, heads, P), gate.
        dt_bias: (heads).
        dt_softplus: apply softplus to the step sizes.
        initial_states: (B, heads, P, N), S[0]; None: zeros.
        return_final_states: also return S[L].
        chunk_size: steps that are turned into one matrix product; changes speed and rounding only.

    Returns:
        y, (B, L, heads, P) in the dtype of `x`; with `return_final_states` also S[L], (B, heads, P, N), in float32
        (float64 for float64 `x`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape, device or `chunk_size` does not fit; VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(x=x, dt=dt, A=A, B=B, C=C), dict(D=D, z=z, dt_bias=dt_bias, initial_states=initial_states))
    check_dimensions(_OP, "x", x, "(B, L, heads, P)")
    check_dimensions(_OP, "B", B, "(B, L, groups, N)")
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    check_shape(_OP, "dt", dt, (batch, length, heads), "(B, L, heads)")
    check_shape(_OP, "A", A, (heads,), "(heads)")
    for name, matrix in (("B", B), ("C", C)):
        check_shape(_OP, name, matrix, (batch, length, groups, states), "(B, L, groups, N)")
    if heads % groups:
        raise ValueError(f"{_OP}: B and C have {groups} groups, which do not divide the {heads} heads of x")
    if D is not None and D.dim() == 1:
        check_shape(_OP, "D", D, (heads,), "(heads)")
    else:
        check_shape(_OP, "D", D, (heads, width), "(heads) or (heads, P)")
    check_shape(_OP, "z", z, tuple(x.shape), "(B, L, heads, P) like x")
    check_shape(_OP, "dt_bias", dt_bias, (heads,), "(heads)")
    check_shape(_OP, "initial_states", initial_states, (batch, heads, width, states), "(B, heads, P, N)")
    if chunk_size < 1:
        raise ValueError(f"{_OP}: chunk_size must be at least 1, got {chunk_size}")

    if demanded_backend() == "reference":
        return ssd_reference(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_states=initial_states,
            return_final_states=return_final_states,
            chunk_size=chunk_size,
        )
    if D is not None and D.dim() == 1:
        D = D.unsqueeze(1)
    y, final_states = _ssd(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, chunk_size)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(x.dtype)
    return (y, final_states) if return_final_states else y

"""Non-causal SSD (VSSD, arXiv 2407.18559): every token writes to one state per head, every token reads it."""

from torch import Tensor

from . import flops, torch_noncausal_ssd
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .reference import noncausal_ssd_reference
from .registration import register_operator

_OP = "noncausal_ssd"


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=work_dtype(x))


_noncausal_ssd = register_operator(
    _OP,
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus",
    ("y",),
    torch_noncausal_ssd,
    _fake,
    flops.noncausal_ssd_shapes,
)


def noncausal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """SSD without order: the state of a head is a weighted sum over all tokens.

    With ``d = dt + dt_bias``, through softplus if `dt_softplus`, every head has one state
    ``S = sum over t of -d[t] * A * outer(B[t], x[t])`` and gives ``y[t] = C[t] @ S + D * x[t]``. Nothing decays and
    nothing is divided by the number of tokens, so the result is float32 (float64 for float64 `x`) and so is all
    arithmetic, whatever autocast says: the sum over a large map leaves the range of float16.

    Args:
        x: (B, L, heads, P), any floating dtype.
        dt: (B, L, heads), step sizes.
        A: (heads), negative for positive weights of the tokens.
        B: (B, L, groups, N); head k belongs to group ``k % groups`` (in `ssd` neighbouring heads share a group).
        C: (B, L, groups, N).
        D: (heads) or (heads, P), skip connection.
        dt_bias: (heads).
        dt_softplus: apply softplus to the step sizes.

    Returns:
        (B, L, heads, P).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit; VISION_SSM_BACKEND names no backend.
    """
    check_tensors(_OP, dict(x=x, dt=dt, A=A, B=B, C=C), dict(D=D, dt_bias=dt_bias))
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
    check_shape(_OP, "dt_bias", dt_bias, (heads,), "(heads)")

    if demanded_backend() == "reference":
        return noncausal_ssd_reference(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    if D is not None and D.dim() == 1:
        D = D.unsqueeze(1)
    return _noncausal_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus)

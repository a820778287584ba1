"""The selective scan of Mamba (arXiv 2312.00752) over 1-D sequences, with the signature users know from mamba_ssm."""

from torch import Tensor

from . import chunked_selective_scan, flops
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .reference import selective_scan_reference
from .registration import register_operator, wants_gradient

_OP = "selective_scan"


def _fake(u: Tensor, delta: Tensor, A: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=work_dtype(u))


_scan = register_operator(
    _OP,
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, bool save",
    ("y", "last_state"),
    chunked_selective_scan,
    _fake,
    flops.selective_scan_shapes,
    saved=("ungated", "states"),
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with N states per channel.

    With ``d = delta + delta_bias``, through softplus if `delta_softplus`, every channel runs
    ``h[t] = exp(d[t] * A) * h[t-1] + d[t] * B[t] * u[t]`` from 0 and gives ``y[t] = <C[t], h[t]> + D * u[t]``, times
    ``silu(z[t])``. All of it is computed in float32 (float64 for float64 `u`), whatever autocast says.

    Args:
        u: (batch, dim, L), any floating dtype.
        delta: (batch, dim, L), step sizes.
        A: (dim, N), negative for decaying states.
        B: (batch, G, N, L), shared by the dim / G channels of a group; (batch, N, L), shared by all channels; or
            (dim, N), constant over time (correct, but slow).
        C: like B.
        D: (dim), skip connection.
        z: (batch, dim, L), gate.
        delta_bias: (dim).
        delta_softplus: apply softplus to the step sizes.
        return_last_state: also return h[L].

    Returns:
        y, (batch, dim, L) in the dtype of `u`; with `return_last_state` also h[L], (batch, dim, N), in float32
        (float64 for float64 `u`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit; VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(u=u, delta=delta, A=A, B=B, C=C), dict(D=D, z=z, delta_bias=delta_bias))
    check_dimensions(_OP, "u", u, "(batch, dim, L)")
    check_dimensions(_OP, "A", A, "(dim, N)")
    batch, dim, length = u.shape
    states = A.shape[1]
    check_shape(_OP, "delta", delta, (batch, dim, length), "(batch, dim, L) like u")
    check_shape(_OP, "A", A, (dim, states), "(dim, N)")
    for name, matrix in (("B", B), ("C", C)):
        if matrix.dim() == 2:
            check_shape(_OP, name, matrix, (dim, states), "(dim, N)")
        elif matrix.dim() == 3:
            check_shape(_OP, name, matrix, (batch, states, length), "(batch, N, L)")
        elif matrix.dim() == 4:
            groups = matrix.shape[1]
            check_shape(_OP, name, matrix, (batch, groups, states, length), "(batch, G, N, L)")
            if not groups or dim % groups:
                raise ValueError(f"{_OP}: {name} has {groups} groups, which do not divide the {dim} channels of u")
        else:
            raise ValueError(
                f"{_OP}: {name} must be (dim, N), (batch, N, L) or (batch, G, N, L), got shape {tuple(matrix.shape)}"
            )
    check_shape(_OP, "D", D, (dim,), "(dim)")
    check_shape(_OP, "z", z, (batch, dim, length), "(batch, dim, L) like u")
    check_shape(_OP, "delta_bias", delta_bias, (dim,), "(dim)")

    if demanded_backend() == "reference":
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    groups = _common_groups(_groups(B, dim), _groups(C, dim), dim)
    B, C = (_grouped(matrix, groups, batch, length) for matrix in (B, C))
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    y, last_state, _, _ = _scan(*tensors, delta_softplus, wants_gradient(*tensors))
    return (y, last_state) if return_last_state else y


def _groups(matrix: Tensor, dim: int) -> int:
    return {2: dim, 3: 1}.get(matrix.dim()) or matrix.shape[1]


def _common_groups(first: int, second: int, dim: int) -> int:
    """A number of groups that both numbers divide; no `math.lcm`, so that sizes may be symbolic."""
    if first % second == 0:
        return first
    return second if second % first == 0 else dim


def _grouped(matrix: Tensor, groups: int, batch: int, length: int) -> Tensor:
    """-> (batch, groups, N, L)."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None].expand(batch, -1, -1, length)
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    return matrix.repeat_interleave(groups // matrix.shape[1], dim=1) if groups != matrix.shape[1] else matrix

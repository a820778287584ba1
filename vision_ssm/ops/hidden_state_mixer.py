"""Hidden state mixer (EfficientViM, arXiv 2411.15241): channels are mixed on a few hidden states, not on all tokens."""

from torch import Tensor

from . import flops, torch_hidden_state_mixer
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .reference import hidden_state_mixer_reference
from .registration import register_operator

_OP = "hidden_state_mixer"


def _fake(x: Tensor, dt: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    work = work_dtype(x)
    return x.new_empty(x.shape, dtype=work), x.new_empty(x.shape[0], dt.shape[2], x.shape[2], dtype=work)


_mix = register_operator(
    _OP,
    "Tensor x, Tensor dt, Tensor B, Tensor C, Tensor in_weight, Tensor out_weight, Tensor D, Tensor? A",
    ("y", "hidden"),
    torch_hidden_state_mixer,
    _fake,
    flops.hidden_state_mixer_shapes,
)


def hidden_state_mixer(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    D: Tensor,
    A: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens are gathered into N hidden states, which are gated and projected, and read back by every token.

    With ``a = softmax(dt + A)`` over the tokens, state n gathers ``g[n] = sum over t of a[t, n] * B[t, n] * x[t]``;
    ``v, z = in_weight @ g`` give the hidden state ``h[n] = out_weight @ (v * silu(z) + D * v)``, and token t reads
    ``y[t] = sum over n of C[t, n] * h[n]``. All of it is computed in float32 (float64 for float64 `x`), whatever
    autocast says. Only the inputs are kept for the backward pass.

    Args:
        x: (B, L, dim), any floating dtype.
        dt: (B, L, N), logits of the softmax over the L tokens.
        B: (B, L, N).
        C: (B, L, N).
        in_weight: (2 * inner, dim), projection of a state to values and gates.
        out_weight: (dim, inner), projection back.
        D: (1), skip around the gate.
        A: (N), part of the published formula. It is constant along the softmax and cancels: it changes nothing, and its
            gradient is exactly zero.

    Returns:
        y, (B, L, dim), and the hidden states h, (B, N, dim), both in float32 (float64 for float64 `x`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit; VISION_SSM_BACKEND names no backend.
    """
    required = dict(x=x, dt=dt, B=B, C=C, in_weight=in_weight, out_weight=out_weight, D=D)
    check_tensors(_OP, required, dict(A=A))
    check_dimensions(_OP, "x", x, "(B, L, dim)")
    check_dimensions(_OP, "dt", dt, "(B, L, N)")
    check_dimensions(_OP, "out_weight", out_weight, "(dim, inner)")
    (batch, length, dim), states, inner = x.shape, dt.shape[2], out_weight.shape[1]
    for name, matrix in (("dt", dt), ("B", B), ("C", C)):
        check_shape(_OP, name, matrix, (batch, length, states), "(B, L, N)")
    check_shape(_OP, "in_weight", in_weight, (2 * inner, dim), "(2 * inner, dim)")
    check_shape(_OP, "out_weight", out_weight, (dim, inner), "(dim, inner)")
    check_shape(_OP, "D", D, (1,), "(1)")
    check_shape(_OP, "A", A, (states,), "(N)")

    if demanded_backend() == "reference":
        return hidden_state_mixer_reference(x, dt, B, C, in_weight, out_weight, D, A)
    return _mix(x, dt, B, C, in_weight, out_weight, D, A)

"""Fusion of the states of a scan with those of neighbouring cells, and the read-out: Spatial-Mamba's core.

Source of the mathematics: Xiao et al., "Spatial-Mamba", arXiv 2410.15091.
"""

import math
from typing import Any

from torch import Tensor

from . import torch_state_fusion
from .backend import demanded_backend
from .checks import check_dimensions, check_shape, check_tensors
from .chunked import work_dtype
from .registration import register_operator
from .torch_state_fusion import DILATIONS, state_fusion_reference

_OP = "state_fusion"


def _fake(states: Tensor, *_: object) -> Tensor:
    return states.new_empty(states.shape, dtype=work_dtype(states))


def state_fusion_flops(elements: int) -> int:
    """FLOPs for `elements` outputs: 2 for each of 27 taps, 1 for the skip; the scan's own count has the read-out."""
    return elements * (2 * 9 * len(DILATIONS) + 1)


def _flops(states: tuple[int, ...], *_: Any) -> int:
    return state_fusion_flops(math.prod(states))


_fuse = register_operator(
    _OP,
    "Tensor states, Tensor kernels, Tensor C, Tensor D, Tensor x",
    ("y",),
    torch_state_fusion,
    _fake,
    _flops,
)


def state_fusion(states: Tensor, kernels: Tensor, alpha: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """``C * sum_i(alpha[i] * conv2d(states, kernels[i], dilation=(1, 3, 5)[i])) + D * x``.

    The convolutions are depthwise, of size 3 x 3, and see beyond the edge of the map the cell at the edge. All of it
    is computed in float32 (float64 for float64 `states`), whatever autocast says. Only the inputs are kept for the
    backward pass.

    Args:
        states: (B, H, W, D), channels last: one state per channel, as a scan leaves them.
        kernels: (3, D, 3, 3), one kernel per channel and dilation.
        alpha: (3), the weights of the dilations.
        C: (B, H, W, 1), the read-out of every position.
        D: (D), skip connection.
        x: (B, H, W, D), the input of the scan.

    Returns:
        (B, H, W, D) in float32 (float64 for float64 `states`).

    Raises:
        TypeError: a tensor is complex or not floating-point.
        ValueError: a shape or device does not fit; VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for a backend that cannot run here.
    """
    check_tensors(_OP, dict(states=states, kernels=kernels, alpha=alpha, C=C, D=D, x=x), {})
    check_dimensions(_OP, "states", states, "(B, H, W, D)")
    batch, height, width, dim = states.shape
    check_shape(_OP, "kernels", kernels, (len(DILATIONS), dim, 3, 3), "(3, D, 3, 3)")
    check_shape(_OP, "alpha", alpha, (len(DILATIONS),), "(3)")
    check_shape(_OP, "C", C, (batch, height, width, 1), "(B, H, W, 1)")
    check_shape(_OP, "D", D, (dim,), "(D)")
    check_shape(_OP, "x", x, (batch, height, width, dim), "(B, H, W, D)")

    if demanded_backend() == "reference":
        return state_fusion_reference(states, kernels, alpha, C, D, x)
    work = work_dtype(states)
    weighted = alpha.to(work).view(-1, 1, 1, 1) * kernels.to(work)
    return _fuse(states, weighted, C, D, x)

"""SiLU and GELU inside of kernels, and their derivatives."""

import triton
import triton.language as tl

from .tiles import LOG2_E

_GAUSS: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def normal(value):
    """exp(-value^2 / 2), and the normal distribution function with an absolute error of about 1e-7.

    Abramowitz and Stegun, formula 7.1.26: two thirds of the instructions of the CUDA library, and the exponential is
    what the gradient needs too.
    """
    bell = tl.exp2(value * value * (-0.5 * LOG2_E))
    s = 1.0 / (1.0 + 0.23164189 * tl.abs(value))  # 0.3275911 / sqrt(2)
    tail = ((((1.061405429 * s - 1.453152027) * s + 1.421413741) * s - 0.284496736) * s + 0.254829592) * s
    tail *= 0.5 * bell
    return bell, tl.where(value < 0, tail, 1.0 - tail)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return value / (1.0 + tl.exp2(value * -LOG2_E))
    elif ACTIVATION == "gelu":
        _, below = normal(value)
        return value * below
    else:
        return value


@triton.jit
def slope(value, ACTIVATION: tl.constexpr):
    """Derivative of the activation."""
    if ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp2(value * -LOG2_E))
        return gate * (1.0 + value * (1.0 - gate))
    else:
        bell, below = normal(value)
        return below + value * bell * _GAUSS

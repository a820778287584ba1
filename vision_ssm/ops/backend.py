"""Which implementation of an operator runs, and why not a faster one."""

import functools
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import vision_ssm.kernels as kernels

ENVIRONMENT_VARIABLE = "VISION_SSM_BACKEND"
BACKENDS = ("triton", "chunked", "reference")
# a kernel of ours would not be faster than PyTorch's
MATRIX_PRODUCTS = ("noncausal_ssd", "hidden_state_mixer")
OPERATORS = (
    *("selective_scan", "scan_2d", "ssd", "depthwise_conv", "layer_norm", "state_fusion", "local_selective_scan"),
    *("dcnv4", "plstm2d"),
    *MATRIX_PRODUCTS,
)
COMPOSED = {"local_selective_scan": "scan_2d"}  # operators that call another one, and have its implementations

_warned: set[tuple[str, str]] = set()


class Backend(NamedTuple):
    """`name` is "triton", "chunked" or "reference"; `reason` says why nothing faster runs, "" if there is nothing."""

    name: str
    reason: str


def demanded_backend() -> str | None:
    """The backend that the environment variable VISION_SSM_BACKEND asks for, None if it is unset or empty.

    Raises:
        ValueError: the variable names no backend.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not value:
        return None
    if value not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={value!r} names no backend; choose from {', '.join(BACKENDS)}")
    return value


def select_backend(tensor: Tensor, op: str) -> Backend:
    """The backend that operator `op` takes for inputs like `tensor`, and why no faster one.

    "triton" where a kernel for `op` exists and can run on the tensor's device, else "chunked", which is plain PyTorch
    and runs anywhere. Nothing is faster for `MATRIX_PRODUCTS`; `COMPOSED` operators take what the one they call takes.
    The environment variable VISION_SSM_BACKEND (triton, chunked, reference) overrides the choice. A tensor on a GPU
    that has to take the chunked path is reported by one warning per operator and reason.

    Args:
        tensor: the first input of the operator; its device and dtype count.
        op: one of `OPERATORS`.

    Raises:
        ValueError: unknown `op`, or VISION_SSM_BACKEND names no backend.
        RuntimeError: VISION_SSM_BACKEND asks for triton and that cannot run here; the message says why.
    """
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPERATORS)}")
    op = COMPOSED.get(op, op)
    demanded = demanded_backend()
    if demanded in ("chunked", "reference"):
        return Backend(demanded, f"{ENVIRONMENT_VARIABLE}={demanded} asks for it")
    if op in MATRIX_PRODUCTS:
        return Backend("chunked", "")
    obstacle = _triton_obstacle(tensor, op)
    if obstacle is None:
        return Backend("triton", "")
    if demanded == "triton":
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=triton, but {op} cannot run on Triton: {obstacle}")
    warn_of_slow_path(tensor, op, "chunked PyTorch path", obstacle)
    return Backend("chunked", obstacle)


def warn_of_slow_path(tensor: Tensor, op: str, path: str, reason: str) -> None:
    """Say once per operator and reason that a tensor on a GPU takes a slow path."""
    if tensor.is_cuda and (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op} takes the {path} on {tensor.device}, which is slow: {reason}", stacklevel=3)


def _triton_obstacle(tensor: Tensor, op: str) -> str | None:
    """Why no Triton kernel can serve `op` on tensors like this one; None if one can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not tensor.is_cuda and not (interpreted and tensor.device.type == "cpu"):
        return f"Triton kernels need a CUDA tensor, this one is on {tensor.device}"
    if op not in kernels.MODULES:
        return f"there is no Triton kernel for {op} yet"
    if tensor.dtype == torch.float64:
        return "the Triton kernels compute in float32, this tensor is float64"
    return _machine_obstacle(tensor.device, tensor.dtype == torch.bfloat16)


@functools.cache
def _machine_obstacle(device: torch.device, bfloat16: bool) -> str | None:
    """The part of the answer that is slow to find out and does not change in a process."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton kernels are written for warps of 32 lanes, this is an AMD GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"Triton needs compute capability 7.0, this GPU has {major}.{minor}"
        if bfloat16 and major < 8:
            return f"bfloat16 needs compute capability 8.0, this GPU has {major}.{minor}"
    return None

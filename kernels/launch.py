"""Launches kernels with little work on the host.

Triton looks a kernel up by binding and specialising every argument anew, which takes longer than most kernels here run
for. The same choice is made here from the few properties that Triton specialises on, and the compiled kernel that the
first call returned is launched directly.
"""

from typing import Any

import torch
from torch import Tensor

from .tiles import INTERPRETED

_COMPILED: dict[tuple, Any] = {}


def _kind(argument: Any) -> Any:
    """What Triton specialises an argument on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument.bit_length() // 32
    return type(argument)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Launch ``kernel[grid](*arguments, **constants)``.

    Args:
        kernel: a `triton.jit` function whose constexpr parameters come last.
        grid: programs per axis.
        arguments: tensors, None, numbers: all parameters that are not constexpr, in order. The first is a tensor.
        num_warps: warps per program.
        maxnreg: most registers per lane; None leaves it to the compiler.
        constants: the constexpr parameters.
    """
    options = {} if maxnreg is None else {"maxnreg": maxnreg}
    if INTERPRETED.value:
        kernel[grid](*arguments, num_warps=num_warps, **options, **constants)
        return
    device = arguments[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, num_warps=num_warps, maxnreg=maxnreg, **constants)
        return
    values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
    key = (kernel.fn, device.index, num_warps, maxnreg, *values, *map(_kind, arguments))
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, num_warps=num_warps, **options, **constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch.cuda.current_stream(device).cuda_stream
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values
    )

"""Scratch memory of the chunked operators.

On a CPU, memory fresh from the system costs about as much as the arithmetic on it, and the allocator returns large
blocks to the system as soon as they are free. So scratch is kept per thread between calls, bounded by the block sizes
of the operators. Other devices have caching allocators.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised memory with the dtype and device of `like`, valid until `name` is asked for again."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    buffer = _kept.buffers.get((name, like.dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _kept.buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)


def release_scratch() -> None:
    """Give the scratch memory of this thread back to the system."""
    _kept.buffers.clear()

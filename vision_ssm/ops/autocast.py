"""Autocast of the device that a tensor is on; the device "meta", which has shapes alone, knows none."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """dtype of autocast where `x` is; None if it is off."""
    kind = x.device.type
    return None if x.is_meta or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off where `x` is."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)

"""Checks of what operators and scans are given, made before anything is computed."""

import torch
from torch import Tensor


def check_tensors(op: str, required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """All required tensors, and the others unless None, are real, floating-point and on the device of the first.

    Raises:
        TypeError: an argument is no tensor, or is complex, integer or boolean.
        ValueError: tensors are on different devices.
    """
    first = next(iter(required))
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in (required | given).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex():
            raise TypeError(f"{op}: {name} is complex ({tensor.dtype}); only real state-space models are supported")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating-point, got {tensor.dtype}; convert it with .float()")
        check_device(op, name, tensor, first, required[first])


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` is on the device of `other`; raises ValueError."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} but {other_name} is on {other.device}; move both to one device"
        )


def check_shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor`, if given, has the `expected` shape, whose dimensions `meaning` names; raises ValueError."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {meaning} = {expected}")


def check_dimensions(op: str, name: str, tensor: Tensor, meaning: str) -> None:
    """`tensor` has as many dimensions as `meaning`, such as "(batch, dim, L)", names, none of them empty but the first.

    Raises:
        ValueError: another number of dimensions, or an empty one.
    """
    if tensor.dim() != meaning.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {meaning}, got shape {tuple(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{op}: {name} must be {meaning} without an empty dimension, got shape {tuple(tensor.shape)}")


def check_map(module: torch.nn.Module, x: Tensor, dim: int) -> None:
    """`x` is a map with channels last, (B, H, W, dim), as `module` takes it; raises ValueError."""
    if x.dim() == 4 and x.shape[-1] == dim:
        return
    hint = f"; width {dim} is what it was built for"
    if x.dim() == 4 and x.shape[1] == dim:
        hint = "; move the channels last: x.permute(0, 2, 3, 1)"
    elif x.dim() == 3 and x.shape[-1] == dim:
        hint = "; give tokens as a map: x.unflatten(1, (height, width)), or one map as a batch: x.unsqueeze(0)"
    raise ValueError(f"{type(module).__name__}: x must be (B, H, W, {dim}), got shape {tuple(x.shape)}{hint}")


def check_table(op: str, name: str, table: Tensor, x: Tensor) -> None:
    """`table` is a non-empty (K, T) integer tensor on the device of `x`.

    Raises:
        TypeError: no tensor of int32 or int64.
        ValueError: another shape or device.
    """
    if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor of positions, got {got}")
    if table.dim() != 2 or 0 in table.shape:
        raise ValueError(f"{op}: {name} must be (K routes, T steps) and not empty, got shape {tuple(table.shape)}")
    check_device(op, name, table, "x", x)

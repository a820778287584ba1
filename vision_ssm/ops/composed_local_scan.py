"""The locally bi-directional scan as two scans along routes and a pointwise term, on every device.

With ``a = exp(d * A)`` and ``b = d * B * x`` the selective scan runs ``h[t] = a[t] * h[t-1] + b[t]``. Inside every
window a second recurrence runs the other way, ``g[t] = a[t] * g[t+1] + b[t]``, from 0 behind the window, and the output
reads ``h[t] + g[t] - b[t]``, so that a step's own input counts once. The second recurrence is a scan of its own, along
the windows, each walked from its end.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scan_2d  # noqa: F401  (registers the operator that is called here)
from .chunked import work_dtype

_CACHED_SIZES = 64
_GRADIENTS = ("x", "delta", "A", "B", "C", "D", "dt_weight", "dt_bias")


def make_table(length: int, window: int, reverse: bool, routes: int, device: str) -> Tensor:
    """The positions in order, window by window, each from its end, (K, T).

    The last window is filled with positions behind the last step: `length`. Windows of one step give (K, L), the order.
    """
    order = torch.arange(length, device=device)
    order = order.flip(0) if reverse else order
    empty = torch.full((-length % window,), length, device=device)
    return torch.cat([order, empty]).view(-1, window).flip(1).flatten().expand(routes, -1).contiguous()


@functools.lru_cache(_CACHED_SIZES)
def _table(*key: Any) -> Tensor:
    """Remembered, because what is planned for a table is remembered with it."""
    with torch.inference_mode(False):  # or a later training step could not save it for backward
        return make_table(*key)


def _scans(x: Tensor, *inputs: Any) -> list[tuple[Any, ...]]:
    """Arguments of `scan_2d` for the scan of the whole sequence and, if windows are longer than a step, for theirs."""
    delta, A, B, C, D, dt_weight, dt_bias, delta_softplus, window, reverse = inputs
    length, routes = x.shape[1:3]
    kept = (dt_weight, dt_bias, None, None, 1e-5, delta_softplus)
    order = _table(length, 1, reverse, routes, str(x.device))
    whole = (x, delta, A, B, C, D, order, None, *kept, None, False, False)
    if window == 1:
        return [whole]
    if length % window:  # the cell behind the last step, where nothing enters the state
        x, delta, B, C = (F.pad(value, (0, 0, 0, 0, 0, 1)) for value in (x, delta, B, C))
    ahead = _table(length, window, reverse, routes, str(x.device))
    return [whole, (x, delta, A, B, C, None, ahead, None, *kept, window, False, False)]


def _steps(delta: Tensor, dt_weight: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """Step sizes before softplus, (B, L, K, D)."""
    steps = delta if dt_weight is None else torch.einsum("blkr,kdr->blkd", delta, dt_weight)
    return steps if dt_bias is None else steps + dt_bias


def forward(x: Tensor, *inputs: Any) -> Tensor:
    """Arguments of the operator. Returns the output, (B, L, K, D), in the dtype of the work."""
    whole, *ahead = _scans(x, *inputs)
    y = torch.ops.vision_ssm.scan_2d(*whole)[0]
    if not ahead:
        return y
    y += torch.ops.vision_ssm.scan_2d(*ahead[0])[0][:, : x.shape[1]]
    delta, B, C = (inputs[i].to(work_dtype(x)) for i in (0, 2, 3))
    dt_weight, dt_bias = _widened(x, inputs[5:7])
    steps = _steps(delta, dt_weight, dt_bias)
    steps = F.softplus(steps) if inputs[7] else steps
    return y.addcmul_((B * C).sum(-1, keepdim=True), steps * x.to(y.dtype), value=-1)  # a step's own input


def _widened(x: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(work_dtype(x)) for tensor in tensors]


def backward(grad_y: Tensor, x: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """Gradients of all floating-point inputs that are given, by name."""
    whole, *ahead = _scans(x, *inputs)
    grads = _scan_gradients(grad_y, whole)
    if not ahead:
        return grads
    length, extended = x.shape[1], ahead[0][0].shape[1]
    grad_ahead = grad_y if extended == length else F.pad(grad_y, (0, 0, 0, 0, 0, extended - length))
    for name, grad in _scan_gradients(grad_ahead, ahead[0]).items():
        grads[name] = grads[name] + (grad[:, :length] if name in ("x", "delta", "B", "C") else grad)
    for name, grad in _own_gradients(grad_y, x, *inputs[:8]).items():
        grads[name] = grads[name] - grad
    return grads


def _scan_gradients(grad_y: Tensor, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    nothing = [grad_y.new_empty(0) for _ in range(3)]  # forward kept nothing
    names = [name for name, at in zip(_GRADIENTS, (0, 1, 2, 3, 4, 5, 8, 9)) if arguments[at] is not None]
    return dict(zip(names, torch.ops.vision_ssm.scan_2d_backward(grad_y, *nothing, *arguments), strict=True))


def _own_gradients(grad_y: Tensor, x: Tensor, *inputs: Any) -> dict[str, Tensor]:
    """Gradients of ``<B, C> * steps * x``."""
    delta, B, C = (inputs[i].to(work_dtype(x)) for i in (0, 2, 3))
    dt_weight, dt_bias = _widened(x, inputs[5:7])
    raw, x = _steps(delta, dt_weight, dt_bias), x.to(grad_y.dtype)
    steps = F.softplus(raw) if inputs[7] else raw
    scale = (B * C).sum(-1, keepdim=True)  # (B, L, K, 1)
    of_scale = (grad_y * steps * x).sum(-1, keepdim=True)
    of_steps = grad_y * scale * x
    if inputs[7]:
        of_steps = torch.ops.aten.softplus_backward(of_steps, raw, 1.0, 20.0)
    grads = {"x": grad_y * scale * steps, "B": of_scale * C, "C": of_scale * B, "delta": of_steps}
    if dt_weight is not None:
        grads["delta"] = torch.einsum("blkd,kdr->blkr", of_steps, dt_weight)
        grads["dt_weight"] = torch.einsum("blkd,blkr->kdr", of_steps, delta)
    if dt_bias is not None:
        grads["dt_bias"] = of_steps.sum((0, 1))
    return grads

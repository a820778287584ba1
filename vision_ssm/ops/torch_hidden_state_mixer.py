"""The hidden state mixer as matrix products: its path on every device."""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import work_dtype


class _Steps(NamedTuple):
    attention: Tensor  # softmax of dt over the tokens, (B, L, N)
    writes: Tensor  # attention * B, (B, L, N)
    gathered: Tensor  # (B, N, dim)
    value: Tensor  # (B, N, D)
    gate: Tensor  # (B, N, D)
    mixed: Tensor  # (B, N, D)
    hidden: Tensor  # (B, N, dim)


def _run(x: Tensor, dt: Tensor, B: Tensor, in_weight: Tensor, out_weight: Tensor, D: Tensor) -> _Steps:
    attention = dt.softmax(1)
    writes = attention * B
    gathered = writes.mT @ x
    value, gate = (gathered @ in_weight.t()).chunk(2, dim=-1)
    mixed = value * (gate * gate.sigmoid() + D)
    return _Steps(attention, writes, gathered, value, gate, mixed, mixed @ out_weight.t())


def _widen(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    work = work_dtype(x)
    return [tensor.to(work) for tensor in (x, *tensors)]


def forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, in_weight: Tensor, out_weight: Tensor, D: Tensor, A: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns y and the hidden states; A cancels in the softmax."""
    x, dt, B, C, in_weight, out_weight, D = _widen(x, dt, B, C, in_weight, out_weight, D)
    hidden = _run(x, dt, B, in_weight, out_weight, D).hidden
    return C @ hidden, hidden


def backward(
    grad_y: Tensor,
    grad_hidden: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    D: Tensor,
    A: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by name; everything between inputs and outputs is made again. That of A is exactly zero."""
    skip, decay = D, A
    x, dt, B, C, in_weight, out_weight, D = _widen(x, dt, B, C, in_weight, out_weight, D)
    steps = _run(x, dt, B, in_weight, out_weight, D)
    grad_hidden = grad_hidden.to(x.dtype) if grad_hidden.numel() else torch.zeros_like(steps.hidden)
    gradients = {"C": torch.zeros_like(C)}
    if grad_y.numel():
        grad_y = grad_y.to(x.dtype)
        gradients["C"] = grad_y @ steps.hidden.mT
        grad_hidden = grad_hidden + C.mT @ grad_y
    grad_mixed = grad_hidden @ out_weight  # (B, N, D)
    switch = steps.gate.sigmoid()
    activated = steps.gate * switch
    of_gate = grad_mixed * steps.value
    grad_value = grad_mixed * (activated + D)
    grad_gate = of_gate * (switch + activated * (1 - switch))
    grad_projected = torch.cat([grad_value, grad_gate], dim=-1)  # (B, N, 2D)
    grad_gathered = grad_projected @ in_weight  # (B, N, dim)
    grad_writes = x @ grad_gathered.mT  # (B, L, N)
    grad_attention = grad_writes * B
    shared = (grad_attention * steps.attention).sum(1, keepdim=True)
    gradients |= {
        "x": steps.writes @ grad_gathered,
        "dt": steps.attention * (grad_attention - shared),
        "B": grad_writes * steps.attention,
        "in_weight": grad_projected.flatten(0, 1).t() @ steps.gathered.flatten(0, 1),
        "out_weight": grad_hidden.flatten(0, 1).t() @ steps.mixed.flatten(0, 1),
        "D": of_gate.sum().view(skip.shape),
    }
    return gradients if decay is None else gradients | {"A": torch.zeros_like(decay)}

"""Non-causal SSD as four batched matrix products: its path on every device.

Heads of a group share B and C, so they lie side by side in one product per group: nothing of size (B, L, heads, N, P)
is ever made.
"""

import torch.nn.functional as F
from torch import Tensor

from .chunked import work_dtype


def _steps(x: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Step sizes before and after softplus, (B, L, heads)."""
    raw = dt.to(work_dtype(x))
    if dt_bias is not None:
        raw = raw + dt_bias.to(raw.dtype)
    return raw, F.softplus(raw) if dt_softplus else raw


def _by_group(values: Tensor, groups: int) -> Tensor:
    """(B, L, heads, P) to (B, groups, L, heads / groups * P): head k belongs to group ``k % groups``."""
    batch, length, heads, width = values.shape
    shares = heads // groups
    return values.view(batch, length, shares, groups, width).permute(0, 3, 1, 2, 4).flatten(3)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Inverse of `_by_group`."""
    batch, groups, length, columns = values.shape
    shares = heads // groups
    values = values.view(batch, groups, length, shares, columns // shares).permute(0, 2, 3, 1, 4)
    return values.flatten(2, 3)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Returns y; D is (heads, 1) or (heads, P)."""
    work, heads, groups = work_dtype(x), x.shape[2], B.shape[2]
    value = x.to(work)
    _, step = _steps(x, dt, dt_bias, dt_softplus)
    weighted = value * (-step * A.to(work)).unsqueeze(-1)  # (B, L, heads, P)
    states = B.to(work).permute(0, 2, 3, 1) @ _by_group(weighted, groups)  # (B, G, N, heads / G * P)
    y = _by_head(C.to(work).transpose(1, 2) @ states, heads)  # (B, L, heads, P)
    return y if D is None else y.addcmul_(D.to(work), value)


def backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> dict[str, Tensor]:
    """Gradients by name; the states are made again."""
    work, heads, groups = work_dtype(x), x.shape[2], B.shape[2]
    value, rate, grad_y = x.to(work), A.to(work), grad_y.to(work).contiguous()
    raw, step = _steps(x, dt, dt_bias, dt_softplus)
    weight = (-step * rate).unsqueeze(-1)  # (B, L, heads, 1)
    weighted, grad = _by_group(value * weight, groups), _by_group(grad_y, groups)  # (B, G, L, heads / G * P)
    write, read = B.to(work).transpose(1, 2), C.to(work).transpose(1, 2)  # (B, G, L, N)
    states, grad_states = write.mT @ weighted, read.mT @ grad  # (B, G, N, heads / G * P)
    grad_weighted = _by_head(write @ grad_states, heads)  # (B, L, heads, P)
    grad_weight = (grad_weighted * value).sum(-1)  # (B, L, heads)
    grad_x = grad_weighted * weight
    grad_step = -grad_weight * rate
    gradients = {
        "A": -(grad_weight * step).sum((0, 1)),
        "B": (weighted @ grad_states.mT).transpose(1, 2),
        "C": (grad @ states.mT).transpose(1, 2),
    }
    if dt_softplus:
        grad_step = grad_step * raw.sigmoid()
    if dt_bias is not None:
        gradients["dt_bias"] = grad_step.sum((0, 1))
    if D is not None:
        grad_x = grad_x.addcmul(D.to(work), grad_y)
        gradients["D"] = (grad_y * value).sum((0, 1)).sum_to_size(D.shape)
    return gradients | {"x": grad_x, "dt": grad_step}

"""Reference twins: the definition of every operator as a plain loop over time.

Each function here is what its operator *means*. The twins are short, run on any device, follow the dtype rules of the
operators (float64 in, float64 through; everything else is computed in float32), are differentiated by autograd, and
are slow. Every faster path is correct if and only if it gives these outputs and these gradients.

Sources: Gu and Dao, "Mamba" (arXiv 2312.00752) for the selective scan; Liu et al., "VMamba" (arXiv 2401.10166) for the
scan along several routes of a map; "LBMamba" (arXiv 2506.15976) for the one that looks ahead in windows; Dao and Gu,
"Transformers are SSMs" (arXiv 2405.21060) for SSD; Shi et al., "VSSD" (arXiv 2407.18559) for non-causal SSD; Lee et
al., "EfficientViM" (arXiv 2411.15241) for the hidden state mixer; Xiong et al., "DCNv4" (arXiv 2401.06197) for the
deformable convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "dcnv4_reference",
    "hidden_state_mixer_reference",
    "local_selective_scan_reference",
    "noncausal_ssd_reference",
    "scan_2d_reference",
    "selective_scan_reference",
    "ssd_reference",
]


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of (batch, dim, L) sequences; see :func:`vision_ssm.ops.selective_scan` for the arguments."""
    batch, dim, length = u.shape
    work = _work_dtype(u)
    x, delta, A = u.to(work), delta.to(work), A.to(work)
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def per_channel(matrix: Tensor) -> Tensor:  # -> (batch, dim, N, L)
        matrix = matrix.to(work)
        if matrix.dim() == 2:
            return matrix[None, :, :, None].expand(batch, dim, -1, length)
        if matrix.dim() == 3:
            matrix = matrix[:, None]
        return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)

    B, C = per_channel(B), per_channel(C)
    state = x.new_zeros(batch, dim, A.shape[1])
    steps = []
    for step, value, b, c in zip(delta.unbind(-1), x.unbind(-1), B.unbind(-1), C.unbind(-1)):
        state = torch.exp(step[..., None] * A) * state + (step * value)[..., None] * b
        steps.append((state * c).sum(-1))
    y = torch.stack(steps, dim=-1)
    if D is not None:
        y = y + D.to(work)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def local_selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    window: int = 8,
) -> Tensor:
    """Scan that looks ahead in windows; see :func:`vision_ssm.ops.local_selective_scan`. B and C (batch, G, N, L)."""
    batch, dim, length = u.shape
    work = _work_dtype(u)
    x, delta, A = u.to(work), delta.to(work), A.to(work)
    if delta_bias is not None:
        delta = delta + delta_bias.to(work)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (matrix.to(work).repeat_interleave(dim // matrix.shape[1], dim=1) for matrix in (B, C))  # (batch, dim, N, L)
    steps = []
    for t in reversed(range(length)):
        if t == length - 1 or (t + 1) % window == 0:
            seen = x.new_zeros(batch, dim, A.shape[1])
        ahead = torch.exp(delta[..., t, None] * A) * seen
        steps.append((ahead * C[..., t]).sum(-1))
        seen = ahead + (delta[..., t] * x[..., t])[..., None] * B[..., t]
    y = selective_scan_reference(x, delta, A, B, C, D) + torch.stack(steps[::-1], dim=-1)
    return (y if z is None else y * F.silu(z.to(work))).to(u.dtype)


def scan_2d_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    read: Tensor,
    write: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    delta_softplus: bool = True,
    segment: int | None = None,
    merge: bool = True,
) -> Tensor:
    """Scan of a map along K routes, merged; see :func:`vision_ssm.ops.scan_2d` for the arguments."""
    routes, steps = read.shape
    work, given = _work_dtype(x), x.dtype
    x, delta, A, B, C = (tensor.to(work) for tensor in (x, delta, A, B, C))
    if x.dim() == 3:
        x = x.unsqueeze(2).expand(-1, -1, routes, -1)
    batch, length, _, dim = x.shape
    if dt_weight is not None:
        delta = torch.einsum("blkr,kdr->blkd", delta, dt_weight.to(work))
    if dt_bias is not None:
        delta = delta + dt_bias.to(work)
    if delta_softplus:
        delta = F.softplus(delta)
    read = read.long()
    write = read if write is None else write.long()
    outs = []
    for k in range(routes):
        walked = tuple(tensor[:, read[k], k] for tensor in (x, delta, B, C))  # (batch, steps, ...)
        ys = []
        for t, (value, step, b, c) in enumerate(zip(*(tensor.unbind(1) for tensor in walked))):
            if t % (segment or steps) == 0:
                state = x.new_zeros(batch, dim, A.shape[2])
            state = torch.exp(step[..., None] * A[k]) * state + (step * value)[..., None] * b[:, None]
            y = (state * c[:, None]).sum(-1)
            ys.append(y if D is None else y + D[k].to(work) * value)
        outs.append(x.new_zeros(batch, length, dim).index_add(1, write[k], torch.stack(ys, dim=1)))
    out = sum(outs) if merge else torch.stack(outs, dim=2)
    if norm_weight is None:
        return out
    bias = None if norm_bias is None else norm_bias.to(work)
    return F.layer_norm(out, (dim,), norm_weight.to(work), bias, norm_eps).to(given)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 recurrence, one scalar decay per head; see :func:`vision_ssm.ops.ssd`. `chunk_size` changes nothing."""
    batch, _, heads, width = x.shape
    work = _work_dtype(x)
    value, dt, A = x.to(work), dt.to(work), A.to(work)
    B, C = (matrix.to(work).repeat_interleave(heads // matrix.shape[2], dim=2) for matrix in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = F.softplus(dt)
    if initial_states is None:
        state = value.new_zeros(batch, heads, width, B.shape[3])
    else:
        state = initial_states.to(work)
    steps = []
    for step, v, b, c in zip(dt.unbind(1), value.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(step * A)[..., None, None]
        state = decay * state + (step[..., None] * v)[..., None] * b[:, :, None]
        steps.append((state * c[:, :, None]).sum(-1))
    y = torch.stack(steps, dim=1)
    if D is not None:
        D = D.to(work)
        y = y + (D[:, None] if D.dim() == 1 else D) * value
    if z is not None:
        y = y * F.silu(z.to(work))
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y


def noncausal_ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One state per head, written by all tokens, then read by all; see :func:`vision_ssm.ops.noncausal_ssd`."""
    batch, _, heads, width = x.shape
    work = _work_dtype(x)
    value, dt, A = x.to(work), dt.to(work), A.to(work)
    group = torch.arange(heads, device=x.device) % B.shape[2]  # of every head
    B, C = (matrix.to(work)[:, :, group] for matrix in (B, C))  # (batch, L, heads, N)
    if dt_bias is not None:
        dt = dt + dt_bias.to(work)
    if dt_softplus:
        dt = F.softplus(dt)
    state = value.new_zeros(batch, heads, B.shape[3], width)
    for step, v, b in zip(dt.unbind(1), value.unbind(1), B.unbind(1)):
        state = state - (step * A)[..., None, None] * b[..., None] * v[:, :, None]
    y = torch.stack([(c[..., None] * state).sum(2) for c in C.unbind(1)], dim=1)
    if D is not None:
        D = D.to(work)
        y = y + (D[:, None] if D.dim() == 1 else D) * value
    return y


def hidden_state_mixer_reference(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    D: Tensor,
    A: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, then state by state; see :func:`vision_ssm.ops.hidden_state_mixer`."""
    work = _work_dtype(x)
    x, dt, B, C, in_weight, out_weight, D = (
        tensor.to(work) for tensor in (x, dt, B, C, in_weight, out_weight, D)
    )
    if A is not None:
        dt = dt + A.to(work)
    share = torch.softmax(dt, dim=1)
    gathered = x.new_zeros(x.shape[0], dt.shape[2], x.shape[2])
    for v, a, b in zip(x.unbind(1), share.unbind(1), B.unbind(1)):
        gathered = gathered + (a * b)[..., None] * v[:, None]
    states = []
    for state in gathered.unbind(1):
        value, gate = F.linear(state, in_weight).chunk(2, dim=-1)
        states.append(F.linear(value * F.silu(gate) + D * value, out_weight))
    hidden = torch.stack(states, dim=1)
    y = torch.stack([(c[..., None] * hidden).sum(1) for c in C.unbind(1)], dim=1)
    return y, hidden


def dcnv4_reference(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Point by point, corner by corner; see :func:`vision_ssm.ops.dcnv4` for the arguments."""
    batch, height, width, dim = value.shape
    work, device = _work_dtype(value), value.device
    maps = value.to(work).unflatten(-1, (groups, dim // groups))
    numbers = offset_mask.to(work)
    rows, columns = (stride * torch.arange(side, device=device, dtype=work) for side in offset_mask.shape[1:3])
    taps = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
    if remove_center:
        taps.remove((kernel_size // 2, kernel_size // 2))
    count, half = len(taps), dilation * (kernel_size - 1) // 2
    images = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    y = maps.new_zeros(*offset_mask.shape[:3], groups, dim // groups)
    for p, (i, j) in enumerate(taps):
        dx, dy, weight = (  # (B, H', W', G) each
            numbers[..., first : 3 * count * groups : 3 * count] for first in (2 * p, 2 * p + 1, 2 * count + p)
        )
        px = (half - padding + columns).view(-1, 1) - half * offset_scale + (i * dilation + dx) * offset_scale
        py = (half - padding + rows).view(-1, 1, 1) - half * offset_scale + (j * dilation + dy) * offset_scale
        inside = (py > -1) & (py < height) & (px > -1) & (px < width)
        px, py = torch.where(inside, px, 0), torch.where(inside, py, 0)
        top, left = py.detach().floor(), px.detach().floor()
        for row, share_of_row in ((top, top + 1 - py), (top + 1, py - top)):
            for column, share_of_column in ((left, left + 1 - px), (left + 1, px - left)):
                within = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                cell = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
                found = maps[images, *cell, torch.arange(groups, device=device)]  # (B, H', W', G, D / G)
                y = y + torch.where(within, weight * share_of_row * share_of_column, 0)[..., None] * found
    return y.flatten(-2).to(value.dtype)

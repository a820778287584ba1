"""State fusion in plain PyTorch: the twin that defines it, and what runs anywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import work_dtype

DILATIONS = (1, 3, 5)
_MARGIN = max(DILATIONS)


def state_fusion_reference(states: Tensor, kernels: Tensor, alpha: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """The twin: a sum of moved maps; see :func:`vision_ssm.ops.state_fusion.state_fusion` for the arguments."""
    work = work_dtype(states)
    states, kernels, alpha, C, D, x = (tensor.to(work) for tensor in (states, kernels, alpha, C, D, x))
    rows, columns = (torch.arange(side, device=states.device) for side in states.shape[1:3])
    fused = torch.zeros_like(states)
    for weight, kernel, dilation in zip(alpha, kernels, DILATIONS):
        for i in range(3):
            for j in range(3):
                row = (rows + (i - 1) * dilation).clamp(0, len(rows) - 1)
                column = (columns + (j - 1) * dilation).clamp(0, len(columns) - 1)
                fused = fused + weight * kernel[:, i, j] * states[:, row][:, :, column]
    return fused * C + D * x


def _cropped(padded: Tensor, dilation: int) -> Tensor:
    """The part of a (B, D, H + 10, W + 10) map that a kernel of this dilation sees."""
    cut = _MARGIN - dilation
    return padded[:, :, cut : padded.shape[2] - cut, cut : padded.shape[3] - cut]


def _pad(states: Tensor) -> Tensor:
    """(B, H, W, D) -> (B, D, H + 10, W + 10) in channels_last memory, edges repeated."""
    return F.pad(states.permute(0, 3, 1, 2), (_MARGIN,) * 4, mode="replicate")


def _fuse(padded: Tensor, kernels: Tensor) -> Tensor:
    """(B, H, W, D)"""
    parts = [
        F.conv2d(_cropped(padded, dilation), kernel.unsqueeze(1), dilation=dilation, groups=kernel.shape[0])
        for kernel, dilation in zip(kernels, DILATIONS)
    ]
    return sum(parts[1:], parts[0]).permute(0, 2, 3, 1)


def _fold(padded: Tensor, axis: int) -> Tensor:
    """Adjoint of repeating the edges along one axis: what lies outside is added to the edge that it repeats."""
    size = padded.shape[axis] - 2 * _MARGIN
    inner = padded.narrow(axis, _MARGIN, size).clone()
    inner.select(axis, 0).add_(padded.narrow(axis, 0, _MARGIN).sum(axis))
    inner.select(axis, size - 1).add_(padded.narrow(axis, _MARGIN + size, _MARGIN).sum(axis))
    return inner


def forward(states: Tensor, kernels: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """states: (B, H, W, D), kernels: (3, D, 3, 3), C: (B, H, W, 1), D: (D), x: like states. Returns (B, H, W, D)."""
    work = work_dtype(states)
    fused = _fuse(_pad(states.to(work)), kernels.to(work))
    return torch.addcmul(fused * C.to(work), D.to(work), x.to(work))


def backward(grad: Tensor, states: Tensor, kernels: Tensor, C: Tensor, D: Tensor, x: Tensor) -> dict[str, Tensor]:
    """grad: (B, H, W, D). Returns the gradients of all inputs."""
    work = work_dtype(states)
    grad, kernels = grad.to(work), kernels.to(work)
    padded = _pad(states.to(work))
    grads = {
        "C": (grad * _fuse(padded, kernels)).sum(-1, keepdim=True),
        "D": (grad * x.to(work)).sum((0, 1, 2)),
        "x": grad * D.to(work),
    }
    of_fused = (grad * C.to(work)).permute(0, 3, 1, 2)  # (B, D, H, W)
    of_padded, of_kernels = torch.zeros_like(padded), []
    for kernel, dilation in zip(kernels, DILATIONS):
        of_map, of_kernel, _ = torch.ops.aten.convolution_backward(
            of_fused,
            _cropped(padded, dilation),
            kernel.unsqueeze(1),
            None,
            [1, 1],
            [0, 0],
            [dilation, dilation],
            False,
            [0, 0],
            kernel.shape[0],
            [True, True, False],
        )
        _cropped(of_padded, dilation).add_(of_map)
        of_kernels.append(of_kernel.squeeze(1))
    grads["states"] = _fold(_fold(of_padded, 2), 3).permute(0, 2, 3, 1)
    grads["kernels"] = torch.stack(of_kernels)
    return grads

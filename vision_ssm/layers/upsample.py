"""Enlarging of channel-last maps between the levels of a decoder."""

import torch
from torch import nn
from torch.nn import functional as F

from .conv import DepthwiseConv2d
from .norm import get_norm


def depth_to_space(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Every cell's channels as a square of `scale` x `scale` cells, the cell's number within it before the channel.

    Args:
        x: (B, H, W, scale * scale * C); channel ``(row * scale + column) * C + c`` goes to channel ``c`` of the cell at
            ``row``, ``column`` of the square. PyTorch's ``pixel_shuffle`` has the two the other way round.
        scale: side of the squares.

    Returns:
        (B, scale * H, scale * W, C).
    """
    batch, height, width, dim = x.shape
    squares = x.view(batch, height, width, scale, scale, dim // scale**2).transpose(2, 3)  # (B, H, scale, W, scale, C)
    return squares.reshape(batch, height * scale, width * scale, dim // scale**2)


class TransposedConv2d(nn.ConvTranspose2d):
    """Transposed convolution of a channel-last map: every cell becomes a square of `scale` x `scale` cells."""

    def __init__(self, dim: int, out_dim: int, scale: int = 2):
        super().__init__(dim, out_dim, scale, stride=scale)

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, scale * H, scale * W, out_dim)."""
        return super().forward(x.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class PatchExpanding(nn.Module):
    """The counterpart of patch merging: project, spread over `scale` x `scale` cells, normalise.

    Cao et al., "Swin-Unet", arXiv 2105.05537. Parameters: ``expand`` and ``norm``.
    """

    def __init__(self, dim: int, out_dim: int, scale: int = 2):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * out_dim, bias=False)
        self.norm = get_norm("layer", out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, scale * H, scale * W, out_dim)."""
        return self.norm(depth_to_space(self.expand(x), self.scale))


class LargeKernelExpanding(nn.Module):
    """`PatchExpanding` that looks around: batch norm, ReLU and a depthwise 3x3 convolution before the spreading.

    Large-kernel patch expanding of MSVM-UNet (arXiv 2408.13735): a 3x3 convolution at the coarse resolution sees as far
    as one of ``3 * scale`` at the fine one. Parameters: ``expand``, ``expand_norm``, ``conv`` and ``norm``.
    """

    def __init__(self, dim: int, out_dim: int, scale: int = 2):
        super().__init__()
        self.scale = scale
        inner = scale * scale * out_dim
        self.expand = nn.Linear(dim, inner)
        self.expand_norm = get_norm("batch", inner)
        self.conv = DepthwiseConv2d(inner, 3)
        self.norm = get_norm("layer", out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, scale * H, scale * W, out_dim)."""
        x = self.conv(F.relu(self.expand_norm(self.expand(x))))
        return self.norm(depth_to_space(x, self.scale))

"""Halving of channel-last maps between stages."""

import torch
from torch import nn
from torch.nn import functional as F

from .conv import ChannelLastConv2d
from .norm import get_norm


class PatchMerging(nn.Module):
    """Concatenate each 2x2 neighbourhood, normalise, project (Swin's patch merging).

    Odd sizes are padded with one row or column of zeros at the bottom or right: sizes are halved and rounded up.
    """

    def __init__(self, dim: int, out_dim: int, norm: str = "layer"):
        super().__init__()
        self.norm = get_norm(norm, 4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, ceil(H/2), ceil(W/2), out_dim)."""
        bottom, right = x.shape[1] % 2, x.shape[2] % 2
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))  # (B, H/2, W/2, 4*dim) -> out_dim


class ConvDownsample(nn.Module):
    """A convolution with stride 2, then a norm.

    Kernel 3 has padding 1 and rounds sizes up. Kernel 2 sees each pixel once: an odd size is padded with zeros at the
    bottom or right, or loses its last row or column when `remainder` is ``"drop"``, as in the originals.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 3, norm: str = "layer", remainder: str = "pad"):
        super().__init__()
        if kernel_size not in (2, 3):
            raise ValueError(f"kernel_size is 2 or 3, got {kernel_size!r}")
        self.pad = kernel_size == 2 and remainder == "pad"
        self.conv = ChannelLastConv2d(dim, out_dim, kernel_size, stride=2, padding=kernel_size // 3)
        self.norm = get_norm(norm, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, ceil(H/2), ceil(W/2), out_dim)."""
        if self.pad and (x.shape[1] % 2 or x.shape[2] % 2):
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.norm(self.conv(x).contiguous())


class InvertedDownsample(nn.Module):
    """Widening 1x1 convolution, strided depthwise 3x3, both with ReLU, then a 1x1 convolution with batch norm.

    The inner width is 4 * `out_dim`. Downsampling of VSSD and Spatial-Mamba. Parameters: ``expand``, ``depthwise``,
    ``project``, ``norm``.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        wide = 4 * out_dim
        self.expand = nn.Conv2d(dim, wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide)
        self.project = nn.Conv2d(wide, out_dim, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, ceil(H/2), ceil(W/2), out_dim)."""
        x = F.relu(self.depthwise(F.relu(self.expand(x.permute(0, 3, 1, 2)))))
        return self.norm(self.project(x)).permute(0, 2, 3, 1).contiguous()  # (B, H/2, W/2, out_dim)


class Halve(nn.MaxPool2d):
    """Half the size: the maxima of 2 x 2 squares of a (B, H, W, C) map, which may reach over its edge if `ceil`."""

    def __init__(self, ceil: bool = False):
        super().__init__(2, stride=2, ceil_mode=ceil)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C). Returns (B, H', W', C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

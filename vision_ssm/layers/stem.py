"""From an image (B, C, H, W) to the first channel-last map."""

import torch
from timm.layers import ConvNormAct
from torch import nn
from torch.nn import functional as F

from .conv import channels_last
from .norm import add_norm, get_norm


class PatchStem(nn.Module):
    """Patches: a convolution of kernel `patch_size`, then a norm.

    Patches lie side by side, or overlap where `stride` is smaller. A size that they do not fill is padded with zeros at
    the bottom and right, so that no pixel is lost; `remainder="drop"` cuts the rest off instead, as most originals do.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm: str = "layer",
        remainder: str = "pad",
        stride: int | None = None,
    ):
        super().__init__()
        if remainder not in ("pad", "drop"):
            raise ValueError(f"remainder is 'pad' or 'drop', got {remainder!r}")
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        self.remainder = remainder
        self.conv = nn.Conv2d(in_chans, dim, patch_size, stride=self.stride)
        self.norm = get_norm(norm, dim)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Cells of the map of an image of `size` (height, width)."""
        rounding = self.stride - 1 if self.remainder == "pad" else 0
        height, width = ((side - self.patch_size + rounding) // self.stride + 1 for side in size)
        return height, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, H', W', dim)."""
        if self.remainder == "pad":
            size = (x.shape[2], x.shape[3])
            bottom, right = (  # not as a remainder, which the compiler cannot lower for symbolic sizes
                (cells - 1) * self.stride + self.patch_size - side for cells, side in zip(self.grid_size(size), size)
            )
            if bottom or right:
                x = F.pad(x, (0, right, 0, bottom))
        x = self.conv(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())  # (B, H', W', dim)


class ConvStem(nn.Module):
    """Two overlapping convolutions, which halve a size, rounded up, each: conv, norm, GELU, conv, norm."""

    def __init__(self, in_chans: int, dim: int, norm: str = "layer"):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = get_norm(norm, dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = get_norm(norm, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 4), ceil(W / 4), dim)."""
        x = self.conv1(channels_last(x))
        x = self.act(add_norm(self.norm1, x.permute(0, 2, 3, 1).contiguous())[1])  # (B, H/2, W/2, dim/2)
        x = self.conv2(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1).contiguous())  # (B, H/4, W/4, dim)


class DeepConvStem(nn.Module):
    """Three convolutions of width `hidden_dim` at half the size, each with batch norm and ReLU, then one to `dim`.

    ``convs`` (7x7 with stride 2, two of 3x3), ``proj`` (3x3 with stride 2), layer norm. Stem of GroupMamba.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormAct(in_chans, hidden_dim, 7, stride=2),
            ConvNormAct(hidden_dim, hidden_dim, 3),
            ConvNormAct(hidden_dim, hidden_dim, 3),
        )
        self.proj = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1)
        self.norm = get_norm("layer", dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 4), ceil(W / 4), dim)."""
        x = self.proj(self.convs(channels_last(x)))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())  # (B, H/4, W/4, dim)


class ResidualConvStem(nn.Module):
    """Two strided 3x3 convolutions with a residual pair between them and a widened end, all with batch norm.

    ``conv1`` (stride 2, dim / 2), ``conv2`` (two convolutions, added to their input), ``conv3`` (stride 2, to 4 dim),
    ``conv4`` (1x1, to dim); ReLU behind all but the last of ``conv2`` and ``conv4``. Stem of VSSD and Spatial-Mamba.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        half, wide = dim // 2, 4 * dim
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2)
        self.conv2 = nn.Sequential(ConvNormAct(half, half, 3), ConvNormAct(half, half, 3, apply_act=False))
        self.conv3 = ConvNormAct(half, wide, 3, stride=2)
        self.conv4 = ConvNormAct(wide, dim, 1, apply_act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 4), ceil(W / 4), dim)."""
        x = self.conv1(channels_last(x))
        x = x + self.conv2(x)
        return self.conv4(self.conv3(x)).permute(0, 2, 3, 1).contiguous()  # (B, H/4, W/4, dim)

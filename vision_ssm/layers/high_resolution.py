"""Maps of several resolutions side by side, and what goes to and fro between them: HRNet without its blocks.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", arXiv 1908.07919.
"""

from collections.abc import Sequence

import torch
from timm.layers import ConvNormAct
from torch import nn
from torch.nn import functional as F


class ConvNorm(ConvNormAct):
    """timm's convolution without bias, batch norm and ReLU, of (B, H, W, C) maps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C_in). Returns (B, H', W', C_out)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvNormStem(nn.Sequential):
    """Two 3x3 `ConvNorm` of stride 2."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__(ConvNorm(in_chans, dim, 3, stride=2), ConvNorm(dim, dim, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 4), ceil(W / 4), dim)."""
        return super().forward(x.permute(0, 2, 3, 1).contiguous())


class Bottleneck(nn.Module):
    """ResNet's block: 1x1, 3x3, 1x1 to four times the `width`, added to the input or, if that is narrower or wider, to
    a 1x1 convolution of it."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, width, 1)
        self.conv2 = ConvNorm(width, width, 3)
        self.conv3 = ConvNorm(width, 4 * width, 1, apply_act=False)
        self.shortcut = nn.Identity() if dim == 4 * width else ConvNorm(dim, 4 * width, 1, apply_act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, H, W, 4 * width)."""
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class Upsample(ConvNorm):
    """1x1 convolution and batch norm, bilinearly enlarged by `factor`, then to the size that is asked for."""

    def __init__(self, dim: int, out_dim: int, factor: int):
        super().__init__(dim, out_dim, 1, apply_act=False)
        self.factor = factor

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:  # type: ignore[override]
        """x: (B, H, W, dim). Returns (B, H', W', out_dim), of the given `size`."""
        x = super().forward(x).permute(0, 3, 1, 2)
        x = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1)


class Downsample(nn.Sequential):
    """`steps` times half the size: depthwise 3x3, then 1x1, each with batch norm, and ReLU between the steps."""

    def __init__(self, dim: int, out_dim: int, steps: int):
        layers = []
        for step in range(1, steps + 1):
            layers.append(ConvNorm(dim, dim, 3, stride=2, groups=dim, apply_act=False))
            layers.append(ConvNorm(dim, out_dim if step == steps else dim, 1, apply_act=step < steps))
        super().__init__(*layers)


class Fusion(nn.ModuleDict):
    """New maps of all branches, each the sum of all maps brought to its size and width, then ReLU.

    ``self[i][j]`` is the way from branch j to branch i; rows i may be deleted.
    """

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        for i, out_dim in enumerate(dims):
            self[str(i)] = nn.ModuleDict()
            for j, dim in enumerate(dims):
                if j != i:
                    way = Upsample(dim, out_dim, 2 ** (j - i)) if j > i else Downsample(dim, out_dim, i - j)
                    self[str(i)][str(j)] = way

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: (B, H_j, W_j, C_j) of all branches. Returns the new maps of the branches that there are rows for."""
        fused = []
        for row, ways in self.items():
            terms = []
            for j, x in enumerate(maps):
                if j == int(row):
                    terms.append(x)
                else:
                    terms.append(ways[str(j)](x, maps[int(row)].shape[1:3]) if j > int(row) else ways[str(j)](x))
            fused.append(F.relu(sum(terms[1:], terms[0])))
        return fused


class SumNeck(nn.Module):
    """HRNet's way to one vector: every map is widened, and their sums go down from the finest to the coarsest.

    Parameters: ``increase`` (a `Bottleneck` per map, to `dims`), ``downsample`` (3x3 of stride 2), ``final`` (1x1).
    """

    def __init__(self, in_dims: Sequence[int], dims: Sequence[int], out_dim: int):
        super().__init__()
        self.increase = nn.ModuleList(Bottleneck(dim, out // 4) for dim, out in zip(in_dims, dims))
        self.downsample = nn.ModuleList(ConvNorm(dim, out, 3, stride=2) for dim, out in zip(dims, dims[1:]))
        self.final = ConvNorm(dims[-1], out_dim, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: as many as the neck was left with, finest first. Returns their sums, the last one of all widened."""
        sums = [self.increase[0](maps[0])]
        for x, increase, down in zip(maps[1:], self.increase[1:], self.downsample):
            sums.append(down(sums[-1]) + increase(x))
        return [*sums[:-1], self.final(sums[-1])]

    def keep(self, count: int) -> None:
        """Take away what the first `count` sums do not need."""
        if count < len(self.increase):
            self.final = nn.Identity()
            del self.increase[count:], self.downsample[count - 1 :]

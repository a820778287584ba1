"""The plain U-Net: pairs of 3x3 convolutions, max pooling on the way down, transposed convolutions on the way up.

Paper: Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, arXiv 1505.04597.
Source: the paper; no code of a repository is followed.

A baseline for the others, with the two changes that everyone makes to the paper's: convolutions are padded, so that the
scores have the size of the image, and each is followed by a batch norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbones.base import Stage, stage_widths
from ..backbones.family import register_family
from ..layers import ConvNorm, Halve, TransposedConv2d
from .base import ConcatStage, UNet


class ConvPair(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU, on (B, H, W, C) maps; a block of a `Stage`."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim, 3)
        self.conv2 = ConvNorm(out_dim, out_dim, 3)

    def forward(self, x: torch.Tensor, branch: None = None) -> tuple[torch.Tensor, None]:
        """x: (B, H, W, dim). Returns (B, H, W, out_dim) and no branch."""
        return self.conv2(self.conv1(x)), None


class ConvEncoder(nn.Module):
    """Stages of a `ConvPair` each, at half the size of the one before, with what a U-Net asks of its encoder."""

    def __init__(self, in_chans: int, widths: Sequence[int]):
        super().__init__()
        self.stages = nn.ModuleList(
            Stage([ConvPair(dim, out_dim)], Halve() if i else None)
            for i, (dim, out_dim) in enumerate(zip([in_chans, *widths], widths))
        )
        self.out_info: list[dict[str, Any]] = [
            dict(num_chs=width, reduction=2**i, module=f"stages.{i}") for i, width in enumerate(widths)
        ]

    def forward_stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: (B, in_chans, H, W). Returns the output of each stage, finest first, (B, H', W', C)."""
        x, maps = x.permute(0, 2, 3, 1), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As `forward_stages`, (B, C, H', W')."""
        return [m.permute(0, 3, 1, 2).contiguous() for m in self.forward_stages(x)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `UNet.set_grad_checkpointing`."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """See `UNet.group_matcher`."""
        return dict(stem=r"^stages\.0\.", blocks=r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)", None)])

    def no_weight_decay(self) -> set[str]:
        """No parameter but the one-dimensional ones is exempt."""
        return set()


class PlainUNet(UNet):
    """U-Net of convolutions.

    Args:
        dims: width of each stage, or of the first one (doubled from stage to stage); the decoder mirrors them.
        num_stages: stages, where `dims` is one number.
        **common: num_classes, in_chans, deep_supervision; see `UNet`.
    """

    family = "plain_unet"

    def __init__(self, *, dims: int | Sequence[int] = 64, num_stages: int = 5, **common: Any):
        super().__init__(**common)
        widths = stage_widths(dims, [1] * (num_stages if isinstance(dims, int) else len(dims)))
        if len(widths) < 2:
            raise ValueError(f"a U-Net needs two stages or more, got dims={dims}, num_stages={num_stages}")
        self.encoder = ConvEncoder(self.in_chans, widths)
        widths = widths[::-1]
        self.decoder = nn.ModuleList(
            ConcatStage([ConvPair(2 * dim, dim)], TransposedConv2d(wide, dim)) for wide, dim in zip(widths, widths[1:])
        )
        self.expand = nn.Identity()
        self.finish(widths[1:], [info["reduction"] for info in self.encoder.out_info[-2::-1]], widths[-1])

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.encoder.forward_stages(x)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return "encoder.stages.0.blocks.0.conv2.conv.weight" in keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(state_dict)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain_unet": dict(num_classes=1, dims=64),
    "plain_unet_micro": dict(num_classes=1, dims=12, num_stages=4),
}

PlainUNet.variants = VARIANTS
globals().update(register_family(PlainUNet))

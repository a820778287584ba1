"""Residual blocks and stages that the families share."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers import DepthwiseConv2d, add_norm, build_mlp, get_norm
from ..ops.registration import is_transformed
from ..scans import build_scan
from ..scans.sequence import TokenLayout


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates rising linearly from 0 to `rate` over all blocks, grouped by stage."""
    last = max(sum(depths) - 1, 1)
    rates = [rate * i / last for i in range(sum(depths))]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths)]


def stage_widths(dims: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Width of each stage; one number is the first stage's, doubled from stage to stage."""
    if not len(depths):
        raise ValueError("depths has the number of blocks of each stage, of one at least; got none")
    widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    if len(widths) != len(depths):
        raise ValueError(f"dims and depths must have one entry per stage, got {widths} and {tuple(depths)}")
    return widths


class ScanBlock(nn.Module):
    """Pre-norm residual block: a token mixer, then an MLP.

    Args:
        dim: width C.
        scan: strategy of the mixer, for `build_scan`; False leaves the mixer out.
        norm: norm of both branches, see `get_norm`.
        mlp_ratio: hidden width of the MLP over `dim`; 0 leaves the MLP out.
        mlp_act, mlp_gated, mlp_dropout: see `build_mlp`.
        drop_path: probability of dropping a branch for a sample, in training.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        dim: int,
        scan: dict | Literal[False],
        *,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_gated: bool = False,
        mlp_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.mixer = None
        if scan is not False:
            self.norm1 = get_norm(norm, dim, norm_eps)
            self.mixer = build_scan(scan, dim)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = get_norm(norm, dim, norm_eps)
            self.mlp = build_mlp(dim, int(dim * mlp_ratio), act=mlp_act, gated=mlp_gated, dropout=mlp_dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: torch.Tensor, branch: "Branch | None" = None, layout: TokenLayout | None = None
    ) -> "tuple[torch.Tensor, Branch | None]":
        """The residual stream x and what is still to be added to it, before and after the block.

        An addition waits for the norm that follows it, because the two together pass over memory once. The stream is a
        map, (B, H, W, dim), or a sequence with class tokens, (B, T, dim), of the given `layout`.
        """
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x, *(branch or ()))
            branch = self.mixer(normed) if layout is None else self.mixer.scan_tokens(normed, layout), self.drop_path
        if self.mlp is not None:
            x, normed = add_norm(self.norm2, x, *(branch or ()))
            branch = self.mlp(normed), self.drop_path
        return x, branch


class PositionConvBlock(ScanBlock):
    """`ScanBlock` with a residual depthwise 3x3 convolution, ``conv1`` and ``conv2``, in front of either branch.

    The convolutions tell a mixer without order where its tokens are; drop path does not touch them.
    """

    def __init__(self, dim: int, scan: dict | Literal[False], **options: Any):
        super().__init__(dim, scan, **options)
        self.conv1 = DepthwiseConv2d(dim, 3)
        self.conv2 = DepthwiseConv2d(dim, 3)

    def forward(
        self, x: torch.Tensor, branch: "Branch | None" = None, layout: TokenLayout | None = None
    ) -> "tuple[torch.Tensor, Branch | None]":
        """As `ScanBlock.forward`, on maps alone."""
        x = add_branch(x, branch)
        x = x + self.conv1(x)
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x)
            x = x + self.drop_path(self.mixer(normed))
        x = x + self.conv2(x)
        if self.mlp is None:
            return x, None
        x, normed = add_norm(self.norm2, x)
        return x, (self.mlp(normed), self.drop_path)


Branch = tuple[torch.Tensor, nn.Module]
"""Output of a residual branch, and the drop path that it goes through."""


def add_branch(x: torch.Tensor, branch: Branch | None) -> torch.Tensor:
    """`x` with a pending branch of the same shape added; without one, `x`."""
    if branch is None:
        return x
    values, drop_path = branch
    return x + drop_path(values)


def recomputes(part: nn.Module) -> bool:
    """Whether `part`, which has a switch ``grad_checkpointing``, makes activations of its blocks again in backward.

    `torch.func` cannot follow that.
    """
    return part.grad_checkpointing and part.training and torch.is_grad_enabled() and not is_transformed()


class Stage(nn.Module):
    """Downsampling (or none), then blocks with the interface of `ScanBlock`. Maps are (B, H, W, C)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_blocks(self.downsample(x))

    def forward_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C), downsampled. Returns the same shape."""
        branch = None
        for block in self.blocks:
            if recomputes(self):
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch)
        return add_branch(x, branch)

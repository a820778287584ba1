"""Strategies that walk a map as one sequence of tokens, in which class tokens may stand."""

from dataclasses import dataclass

import torch
from torch import nn

from ..ops.checks import check_map

CLASS_TOKENS = ("none", "first", "middle", "last", "double")


@dataclass(frozen=True)
class TokenLayout:
    """Where the patches of a map and the class tokens stand in one sequence.

    Patches are in raster order. ``"middle"`` puts the class token behind the first ``L // 2`` of L patches;
    ``"double"`` puts one token before all patches and one behind them.

    Attributes:
        height, width: cells of the map.
        class_tokens: one of `CLASS_TOKENS`.
    """

    height: int
    width: int
    class_tokens: str = "none"

    @property
    def positions(self) -> tuple[int, ...]:
        """Places of the class tokens in the sequence."""
        patches = self.height * self.width
        places = {"none": (), "first": (0,), "middle": (patches // 2,), "last": (patches,), "double": (0, patches + 1)}
        return places[self.class_tokens]

    def join(self, patches: torch.Tensor, class_tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) patches and (B, n, ...) class tokens to the sequence (B, L + n, ...)."""
        pieces, start = [], 0
        for i, place in enumerate(self.positions):
            pieces += [patches[:, start : place - i], class_tokens[:, i : i + 1]]
            start = place - i
        return torch.cat([*pieces, patches[:, start:]], dim=1)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequence (B, L + n, ...) to patches (B, L, ...) and class tokens (B, n, ...); the inverse of `join`."""
        places = self.positions
        if not places:
            return tokens, tokens[:, :0]
        edges = [-1, *places, tokens.shape[1]]
        patches = [tokens[:, before + 1 : after] for before, after in zip(edges, edges[1:])]
        return torch.cat(patches, dim=1), torch.cat([tokens[:, place : place + 1] for place in places], dim=1)


class SequenceScan(nn.Module):
    """Base of these strategies; one defines `scan_tokens` and serves maps as well.

    Attributes:
        dim: width C of input and output, which a strategy sets to have its maps checked.
    """

    dim: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        if self.dim is not None:
            check_map(self, x, self.dim)
        height, width = x.shape[1:3]
        return self.scan_tokens(x.flatten(1, 2), TokenLayout(height, width)).view(x.shape)  # (B, H*W, C) inside

    def scan_tokens(self, tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """tokens: (B, T, dim), class tokens at ``layout.positions``. Returns the same shape."""
        raise NotImplementedError

"""Base of plain backbones: one patch stem, then blocks that all work on maps of the same size."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.models import FeatureInfo, PretrainedCfg
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers import PositionTable, SimplePyramid, add_norm, trunc_normal_
from ..layers.pyramid import SCALES
from ..registry import suggest
from ..scans.sequence import CLASS_TOKENS, SequenceScan, TokenLayout
from .base import Backbone, Branch, recomputes

_FEATURE_MAPS = 4
_NORM_BIAS = re.compile(r"(stages\.\d+\.norm\d*|norm)\.bias")


class ClassTokens(nn.Module):
    """Learned class tokens with positions of their own, put into a sequence of patches.

    Parameters: ``tokens`` and, unless `positions` is False, ``positions``, (1, n, dim).
    """

    def __init__(self, dim: int, class_tokens: str, positions: bool = True):
        super().__init__()
        self.class_tokens = class_tokens
        count = len(TokenLayout(1, 1, class_tokens).positions)
        self.tokens = nn.Parameter(torch.empty(1, count, dim))
        self.positions = nn.Parameter(torch.empty(1, count, dim)) if positions else None
        for parameter in self.parameters():
            trunc_normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """x: (B, H, W, dim). Returns the sequence (B, H*W + n, dim) and its layout."""
        layout = TokenLayout(x.shape[1], x.shape[2], self.class_tokens)
        tokens = self.tokens if self.positions is None else self.tokens + self.positions
        return layout.join(x.flatten(1, 2), tokens.to(x.dtype).expand(x.shape[0], -1, -1)), layout


class PlainBackbone(Backbone):
    """A backbone whose stages are single blocks at one stride, any of which can be asked for its map.

    A family builds `stem` and passes its blocks, with the interface of `ScanBlock`, to `finish_plain`. Blocks run on
    maps (B, H, W, dim), or on sequences (B, T, dim) where class tokens stand among the patches. Only strategies that
    walk a sequence (`SequenceScan`) can carry class tokens: with any other, the model pools over all cells instead.

    Features are `_FEATURE_MAPS` maps of evenly spaced blocks unless others are asked for, all at the stride of the
    patches; with `pyramid` they become maps of four strides.

    Args:
        class_tokens: ``"none"`` (the classifier sees the mean over all cells), ``"first"``, ``"middle"``, ``"last"`` or
            ``"double"`` (the mean of a first and a last token).
        feature_source: what a block's map is: ``"stream"``, the residual stream behind it, or ``"mixer"``, what the
            block adds to the stream.
        pyramid: make maps at 4, 2, 1 and 1/2 times the size of four blocks' maps, or of one block's map. Needs
            `features_only`.
        **common: see `Backbone`.
    """

    def __init__(
        self, *, class_tokens: str = "none", feature_source: str = "stream", pyramid: bool = False, **common: Any
    ):
        super().__init__(**common)
        for keyword, value, choices in (
            ("class_tokens", class_tokens, CLASS_TOKENS),
            ("feature_source", feature_source, ("stream", "mixer")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {keyword} {value!r}.{suggest(str(value), choices)}")
        if pyramid and not self.features_only:
            raise ValueError("pyramid needs features_only=True: a classifier has no use for it")
        self.class_tokens = class_tokens
        self.feature_source = feature_source
        self.wants_pyramid = pyramid
        self.grad_checkpointing = False

    def finish_plain(
        self,
        blocks: Sequence[nn.Module],
        dim: int,
        stride: int,
        grid_size: tuple[int, int] | None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
    ) -> None:
        """Build what surrounds the blocks and initialise all weights. To be called last in a family's constructor.

        Args:
            blocks: the blocks, in order.
            dim: their width.
            stride: of the patches.
            grid_size: height and width of the position table; None: no positions.
            norm, norm_eps: see `Backbone.finish`.
        """
        if any(not isinstance(getattr(block, "mixer", None), SequenceScan) for block in blocks):
            self.class_tokens = "none"
        self.pos_embed = None if grid_size is None else PositionTable(dim, *grid_size)
        self.cls_token = None
        if self.class_tokens != "none":
            self.cls_token = ClassTokens(dim, self.class_tokens, positions=grid_size is not None)
        self.stages = nn.ModuleList(blocks)
        self.finish([dim] * len(blocks), [stride] * len(blocks), norm, norm_eps)
        self.pyramid = None
        if self.wants_pyramid:
            if len(self.out_indices) not in (1, len(SCALES)):
                raise ValueError(
                    f"a pyramid is made of the maps of 1 or {len(SCALES)} blocks, got out_indices={self.out_indices}"
                )
            self.pyramid = SimplePyramid(dim, getattr(self.stem, "remainder", "pad"))

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`official_keys`; rows of positions, ``pos_embed.rows`` (1, T, dim), become a table and class positions.

        The rows of a published variant's file are those of a square grid, which can be resampled; of another model, or
        where they are no square, those of this model's grid.
        """
        converted = self.official_keys(state_dict)
        rows = converted.pop("pos_embed.rows", None)
        if rows is None:
            return converted
        kind = self.class_tokens
        count = converted["cls_token.tokens"].shape[1] if "cls_token.tokens" in converted else 0
        if count != len(TokenLayout(1, 1, kind).positions):  # a model without the class tokens of the file
            one = self.variants.get(self.variant or "", {}).get("class_tokens", "first")
            kind = {0: "none", 1: one, 2: "double"}[count]
        cells = rows.shape[1] - count
        height, width = (cells, 1) if self.pos_embed is None else self.pos_embed.table.shape[2:]
        side = math.isqrt(cells)
        if height * width != cells or (self.variant and side * side == cells):
            height = width = side
        if height * width != cells:
            raise ValueError(f"pos_embed has {cells} rows for patches: neither this model's grid nor a square one")
        patches, of_tokens = TokenLayout(height, width, kind).split(rows)
        converted["pos_embed.table"] = patches.mT.unflatten(2, (height, width))  # (1, L, dim) -> (1, dim, H, W)
        if count:
            converted["cls_token.positions"] = of_tokens
        return converted

    def rule_for_missing(self, key: str, given: Collection[str]) -> str | None:
        if _NORM_BIAS.fullmatch(key) and not any(map(_NORM_BIAS.fullmatch, given)):
            return "biases of layer norms, which RMS norms do not have, as they were"
        return super().rule_for_missing(key, given)

    def default_out_indices(self) -> list[int]:
        count = len(self.stage_info)
        maps = min(_FEATURE_MAPS, count)
        return [count * (i + 1) // maps - 1 for i in range(maps)]

    @property
    def out_info(self) -> list[dict[str, Any]]:
        if self.pyramid is None:
            return super().out_info
        stride: int = self.stage_info[0]["reduction"]
        return [
            dict(num_chs=self.num_features, reduction=int(stride / scale), module=f"pyramid.levels.{i}")
            for i, scale in enumerate(SCALES)
        ]

    @property
    def feature_info(self) -> FeatureInfo:
        if self.pyramid is None:
            return super().feature_info
        return FeatureInfo(self.out_info, range(len(SCALES)))

    def pool_size(self, settings: PretrainedCfg) -> tuple[int, ...] | None:
        return super().pool_size(settings) if self.cls_token is None else None

    @property
    def own_pool(self) -> str:
        return "avg" if self.cls_token is None else "token"

    def embed(self, x: torch.Tensor) -> tuple[torch.Tensor, TokenLayout | None, tuple[int, int]]:
        """x: images. Returns the stream that enters the first block, the layout of its tokens (None if it is a map),
        and the size of the grid."""
        self.check_images(x)
        x = self.stem(x)
        size = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            x = self.pos_embed(x)
        if self.cls_token is None:
            return x, None, size
        x, layout = self.cls_token(x)
        return x, layout, size

    def run_block(
        self, index: int, x: torch.Tensor, branch: Branch | None, layout: TokenLayout | None
    ) -> tuple[torch.Tensor, Branch | None]:
        """Block number `index`, its activations recomputed in backward where that is switched on."""
        block = self.stages[index]
        if recomputes(self):
            return checkpoint(block, x, branch, layout, use_reentrant=False)
        return block(x, branch, layout)

    def source_of(self, index: int) -> str:
        """What the map of block `index` is, see `feature_source`."""
        return self.feature_source

    def _block_map(
        self, x: torch.Tensor, branch: Branch | None, layout: TokenLayout | None, size: tuple[int, int], source: str
    ) -> torch.Tensor:
        """Map of the block that left `x` and `branch`, (B, H, W, dim)."""
        if branch is not None:
            x = branch[0] if source == "mixer" else x + branch[0]
        if layout is not None:
            x = layout.split(x)[0].unflatten(1, size)  # (B, L, dim) -> (B, H, W, dim)
        return x

    def _walk(
        self, x: torch.Tensor, wanted: Sequence[int], whole: bool = False
    ) -> tuple[dict[int, torch.Tensor], tuple[torch.Tensor, Branch | None, TokenLayout | None]]:
        """Maps of the `wanted` blocks; stream, branch and layout behind the last of them, or of all if `whole`."""
        x, layout, size = self.embed(x)
        branch, maps = None, {}
        for i in range(max(wanted) + 1 if wanted and not whole else len(self.stages)):
            x, branch = self.run_block(i, x, branch, layout)
            if i in wanted:
                source = self.source_of(i)
                if branch is not None and source == "stream":
                    values, drop_path = branch
                    branch = drop_path(values), nn.Identity()  # it draws once, so the map is what the next block sees
                maps[i] = self._block_map(x, branch, layout, size, source)
        return maps, (x, branch, layout)

    def collect(
        self, x: torch.Tensor, indices: Sequence[int], norm: bool | None, whole: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        found, end = self._walk(x, indices, whole)
        maps = [self.map_norm(i, norm)(found[i]) for i in indices]
        if self.pyramid is not None:
            sizes = [[-(-side // info["reduction"]) for side in x.shape[2:]] for info in self.out_info]
            # without the cells that only padding of the image fills
            maps = [m[:, :height, :width] for m, (height, width) in zip(self.pyramid(maps), sizes)]
        features = self._features(*end) if whole else None
        return features, [m.permute(0, 3, 1, 2).contiguous() for m in maps]  # (B, C, H', W')

    def end_norm(self, index: int) -> nn.Module:
        return self.norm  # blocks have one width

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_chans, H, W). Returns the normalised end of the stream.

        A map, (B, C, H', W'), or the sequence (B, T, C) of a model with class tokens.
        """
        return self._features(*self._walk(x, ())[1])

    def _features(self, x: torch.Tensor, branch: Branch | None, layout: TokenLayout | None) -> torch.Tensor:
        features = add_norm(self.norm, x, *(branch or ()))[1]
        return features.permute(0, 3, 1, 2) if layout is None else features

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """features: of `forward_features`. Returns the vector that the classifier sees, (B, C)."""
        if features.dim() == 4:
            return super().pool(features)
        count = 0 if self.cls_token is None else self.cls_token.tokens.shape[1]
        positions = TokenLayout(1, features.shape[1] - count, self.class_tokens).positions
        return torch.stack([features[:, place] for place in positions]).mean(0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that give each parameter its depth (timm's contract), for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)", None), (r"^(?:norm|out_norms|pyramid)\b", (99999,))]
        return dict(stem=r"^(?:stem|pos_embed|cls_token)\b", blocks=r"^stages\.(\d+)" if coarse else blocks)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed: those of `Backbone.no_weight_decay`, and class tokens."""
        tokens = {name for name, _ in self.named_parameters() if name.startswith("cls_token.")}
        return super().no_weight_decay() | tokens

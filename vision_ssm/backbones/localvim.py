"""LocalVim: plain backbone whose blocks scan rows, columns and windows of the map, in directions that a search chose.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv 2403.09338.
Source: github.com/hunto/LocalMamba (Apache-2.0), commit 75e5d1f0, classification/lib/models/local_vim.py. Weights: see
`PUBLISHED`. The hierarchical LocalVMamba of the same family is in localvmamba.py.

New in this family: `WindowedSequenceScan` as a token mixer, with directions of its own in every block. With
`directions=None` it is the network in which they are searched (the original searches with `dim=128`, for 100 epochs,
and keeps the best four of every block). Blocks have no MLP; the stream is rotated by position in front of every block.
"""

import math
import re
from typing import Any, Literal

import torch
from torch import nn

from ..layers import PatchStem, RotaryTable, trunc_normal_
from ..scans.sequence import TokenLayout
from ..scans.windowed import FIXED, WindowedSequenceScan
from .base import Branch, ScanBlock, drop_path_rates, register_family, resolve_scan
from .localmamba import (
    WITHOUT_EFFECT,
    Directions,
    convert_gates,
    official_directions,
    published,
    scans_of_blocks,
    searched_directions,
)
from .official import official_settings, rename
from .plain import PlainBackbone

_SCAN = dict(type="windowed_sequence", expand=2.0, state_dim=16)


class LocalVim(PlainBackbone):
    """LocalVim of any size and switch.

    Args:
        depth: blocks.
        dim: width.
        directions: of the scan, see `Directions` and `WindowedSequenceScan`.
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out.
        patch_size: side of a patch.
        img_size: image size that sizes the tables of positions.
        pos_embed: add a learned position table after the stem.
        rotary: rotate the stream by its position in front of every block; not with class tokens, which have no cell.
        rotary_stream: rotate all of the stream, so that turns add up; False: only what the last block added to it.
        norm, norm_eps: norm of the blocks and of the end.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: class_tokens, feature_source, pyramid, see `PlainBackbone`; in_chans, num_classes, features_only,
            out_indices, out_norm, drop_rate, see `Backbone`.
    """

    family = "localmamba"

    def __init__(
        self,
        *,
        depth: int = 20,
        dim: int = 192,
        directions: Directions = FIXED,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        pos_embed: bool = True,
        rotary: bool = True,
        rotary_stream: bool = True,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if rotary and self.class_tokens != "none":
            raise ValueError("rotary needs class_tokens='none': a class token stands in no cell that could turn it")
        self.stem = PatchStem(self.in_chans, dim, patch_size, norm="none")
        grid = self.stem.grid_size((img_size, img_size) if isinstance(img_size, int) else img_size)
        self.rotary = RotaryTable(dim, *grid) if rotary else None
        self.rotary_stream = rotary_stream
        scans = scans_of_blocks(resolve_scan(scan, _SCAN), directions, depth)
        rates = drop_path_rates(drop_path_rate, [depth])[0]
        blocks = [
            ScanBlock(dim, spec, norm=norm, norm_eps=norm_eps, mlp_ratio=0.0, drop_path=rate)
            for spec, rate in zip(scans, rates)
        ]
        end_norm = "layer" if self.features_only else norm  # output norms are layer norms, whatever the blocks have
        self.finish_plain(blocks, dim, patch_size, grid if pos_embed else None, end_norm, norm_eps)
        self._init_like_original(depth)

    @torch.no_grad()
    def _init_like_original(self, depth: int) -> None:
        """Step sizes start at softplus(0): the original initialises their projections like any linear layer."""
        for block in self.stages:
            if isinstance(block.mixer, WindowedSequenceScan):
                for projection in (block.mixer.core.x_proj_weight, block.mixer.core.dt_proj_weight):
                    trunc_normal_(projection, std=0.02)
                nn.init.zeros_(block.mixer.core.dt_proj_bias)
                nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
                block.mixer.out_proj.weight /= math.sqrt(depth)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token.tokens)

    def run_block(
        self, index: int, x: torch.Tensor, branch: Branch | None, layout: TokenLayout | None
    ) -> tuple[torch.Tensor, Branch | None]:
        """Block number `index` on the rotated stream."""
        if self.rotary is not None:
            if branch is None:
                x = self.rotary(x)
            else:
                values, drop_path = branch
                if self.rotary_stream:
                    x, branch = self.rotary(x + drop_path(values)), None
                else:
                    branch = self.rotary(values), drop_path
        return super().run_block(index, x, branch, layout)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(_BLOCK_KEY.match(key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        kept = dict(state_dict)
        _drop_rotary(kept)
        positions, class_token = kept.get("pos_embed"), kept.pop("cls_token", None)
        if class_token is not None:
            kept["cls_token.tokens"] = class_token
        if positions is not None:
            del kept["pos_embed"]
            if class_token is not None:
                layout = TokenLayout(1, positions.shape[1] - 1, "middle")
                positions, kept["cls_token.positions"] = layout.split(positions)
            kept["pos_embed.table"] = positions  # (1, L, dim), see `own_keys`
        renamed = {}
        for key, value in kept.items():
            key = rename(key, _OFFICIAL_KEYS)
            renamed[key] = value
        return _join_directions(convert_gates(renamed))

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `official_keys`; the table of positions gets its grid, and numbers of output norms are this model's.

        The grid of a published variant's file is square, as is any that is not this model's.
        """
        ours = self.official_keys(state_dict)
        table = ours.get("pos_embed.table")
        if table is not None and table.ndim == 3:
            side = math.isqrt(table.shape[1])
            grid = (side, side) if self.pos_embed is None else tuple(self.pos_embed.table.shape[2:])
            if side * side == table.shape[1] and (self.variant or side * side != math.prod(grid)):
                grid = side, side
            if table.shape[1] == math.prod(grid):
                ours["pos_embed.table"] = table.mT.unflatten(2, grid)  # (1, L, dim) -> (1, dim, H, W)
        norms = [key for key in ours if key.startswith("outnorm_")]
        numbers = {int(key.split(".")[0].removeprefix("outnorm_")) for key in norms}
        counted = numbers == set(range(len(self.out_indices)))  # otherwise they are numbers of blocks
        for key in norms:
            number, leaf = key.removeprefix("outnorm_").split(".")
            ours[f"out_norms.{self.out_indices[int(number)] if counted else number}.{leaf}"] = ours.pop(key)
        return ours

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings(cls.__name__, config, _OFFICIAL_DEFAULTS, WITHOUT_EFFECT)
        has_class_token = "cls_token" in keys
        if has_class_token and not given["use_middle_cls_token"]:
            raise ValueError("an original LocalVim has its class token in the middle: use_middle_cls_token=True")
        if has_class_token and given["if_rope"]:
            raise ValueError("an original LocalVim has no rotary positions for a class token: if_rope=False")
        if given["pt_hw_seq_len"] != 14:
            raise ValueError(f"rotary positions span 14 patches, got pt_hw_seq_len={given['pt_hw_seq_len']}")
        dense = "norm_f.weight" not in keys
        if not dense and not has_class_token and given["final_pool_type"] != "mean":
            raise ValueError(f"final_pool_type of an original LocalVim is 'mean', got {given['final_pool_type']!r}")
        return dict(
            depth=given["depth"],
            dim=given["embed_dim"],
            directions=official_directions(given["directions"]),
            scan=dict(
                state_dim=given["d_state"], expand=given["expand"], conv_width=given["d_conv"], inverse="official"
            ),
            patch_size=given["patch_size"],
            img_size=given["img_size"],
            pos_embed="pos_embed" in keys,
            rotary=given["if_rope"] or "rope.freqs_cos" in keys,
            rotary_stream=given["if_rope_residual"],
            norm="rms" if given["rms_norm"] else "layer",
            norm_eps=given["norm_epsilon"],
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["channels"],
            num_classes=given["num_classes"] if "head.weight" in keys else 0,
            class_tokens="middle" if has_class_token else "none",
            features_only=dense,
            feature_source="mixer" if dense else "stream",
            out_indices=given["out_indices"] if dense else None,
            out_norm=any(key.startswith("outnorm_") for key in keys),
        )


_BLOCK_KEY = re.compile(r"layers\.\d+\.mixer\.A_log_\d+$|stages\.\d+\.mixer\.core\.gate\.")

_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.(\d+)\.norm\.", r"stages.\1.norm1."),
    (r"^layers\.", "stages."),
)
# original name of a direction's parameter: our name, and how the directions are joined
_DIRECTION_KEYS = {
    "A_log": ("core.A_log", torch.stack),
    "D": ("core.D", torch.stack),
    "x_proj.weight": ("core.x_proj_weight", torch.stack),
    "dt_proj.weight": ("core.dt_proj_weight", torch.stack),
    "dt_proj.bias": ("core.dt_proj_bias", torch.stack),
    "conv1d.weight": ("conv.weight", torch.cat),
    "conv1d.bias": ("conv.bias", torch.cat),
}
_DIRECTION_KEY = re.compile(r"(stages\.\d+\.mixer\.)(A_log|D|x_proj|dt_proj|conv1d)_(\d+)(\.weight|\.bias)?$")


def _join_directions(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters that the original numbers by direction, joined to one tensor for all of them."""
    joined: dict[str, torch.Tensor] = {}
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for key, value in state_dict.items():
        match = _DIRECTION_KEY.match(key)
        if match is None:
            joined[key] = value
        else:
            parts.setdefault((match[1], match[2] + (match[4] or "")), {})[int(match[3])] = value
    for (prefix, name), of_direction in parts.items():
        ours, join = _DIRECTION_KEYS[name]
        joined[prefix + ours] = join([of_direction[k] for k in sorted(of_direction)])
    return joined


def _drop_rotary(state_dict: dict[str, torch.Tensor]) -> None:
    """Remove rotary tables, which every model computes; those of an unexpected shape stay, to be reported."""
    stem, positions = state_dict.get("patch_embed.proj.weight"), state_dict.get("pos_embed")
    for key in ("rope.freqs_cos", "rope.freqs_sin"):
        table = state_dict.get(key)
        if table is None or stem is None or table.shape[1:] != stem.shape[:1]:
            continue
        if positions is None or table.shape[0] == positions.shape[1]:
            del state_dict[key]


_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    img_size=224,
    patch_size=16,
    depth=20,
    embed_dim=192,
    channels=3,
    num_classes=1000,
    d_state=16,
    d_conv=4,
    expand=2,
    directions=None,
    rms_norm=False,
    norm_epsilon=1e-5,
    final_pool_type="mean",
    if_rope=False,
    if_rope_residual=False,
    use_middle_cls_token=True,  # with a class token, which has no other place that works
    pt_hw_seq_len=14,
    drop_path_rate=0.1,
    out_indices=None,
)

_SEARCHED_TINY = searched_directions(
    "h v_flip w7 w7_flip",
    "h_flip w2_flip w7 w7_flip",
    "h h_flip v w7",
    *["h h_flip v v_flip"] * 3,
    "h_flip v v_flip w7",
    "h_flip v v_flip w2_flip",
    *["h h_flip v v_flip"] * 2,
    "h v v_flip w2",
    "h v v_flip w2_flip",
    "h h_flip v_flip w7",
    "h_flip v v_flip w2",
    "h h_flip v v_flip",
    "h v w2 w2_flip",
    "v v_flip w2 w7",
    "h h_flip v w2",
    "h h_flip w2_flip w7",
    "v v_flip w2 w2_flip",
)

VARIANTS: dict[str, dict[str, Any]] = {
    "localvim_tiny": dict(scan=_SCAN, directions=_SEARCHED_TINY, drop_path_rate=0.1),
    "localvim_tiny_middle_cls_token": dict(
        scan=_SCAN, directions=_SEARCHED_TINY, class_tokens="middle", rotary=False, drop_path_rate=0.1
    ),
    "localvim_tiny_wo_search": dict(scan=_SCAN, directions=FIXED, drop_path_rate=0.1),
    # The original defines its small model twice: with the directions below, which count there, and before that with
    # those searched for the tiny one. Which of them the released weights were trained with is not known.
    "localvim_small": dict(scan=_SCAN, dim=384, directions=FIXED, drop_path_rate=0.1),
    "localvim_small_searched": dict(scan=_SCAN, dim=384, directions=_SEARCHED_TINY, drop_path_rate=0.1),
    "localvim_micro": dict(
        scan=_SCAN,
        depth=3,
        dim=32,
        img_size=64,
        directions=searched_directions("h v_flip w7 w7_flip", "h_flip w2_flip v w2", "h h_flip v_flip w3"),
    ),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "localvim_tiny": published(76.2, "local_vim_tiny.ckpt"),
    "localvim_tiny_middle_cls_token": published(77.8, "local_vim_tiny_middle_cls_token.ckpt"),
    "localvim_small": published(81.1),  # the link on the original's page leads to another model
}

LocalVim.variants = VARIANTS
LocalVim.published = PUBLISHED
globals().update(register_family(LocalVim))

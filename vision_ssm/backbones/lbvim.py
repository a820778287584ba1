"""LBVim: Vim with one scan per block that looks ahead in windows, in alternating directions.

Paper: LBMamba: Locally Bi-directional Mamba, arXiv 2506.15976 (TMLR).
Source: github.com/cvlab-stonybrook/LBMamba, commit 52155516, classification/models_mamba_bi.py and the dense backbones
of segmentation/ and detection/. No weights are published.

New in this family: the locally bi-directional scan, here `LocalBidirectionalScan`. It needs no second set of
parameters, so blocks are lighter than Vim's; every other one walks the raster from its end. The models below have no
class token; `lbvim_300` and `lbvim_528` are as fast as Vim's tiny and small.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..layers import AttentionHead, get_norm
from ..scans.sequence import TokenLayout
from .base import register_family
from .official import official_settings, rename
from .vim import OFFICIAL_DEFAULTS as VIM_DEFAULTS
from .vim import WITHOUT_EFFECT, Vim, linear_head, scan_sizes

_SCAN = dict(type="local_bidirectional")


class LBVim(Vim):
    """LBVim of any size and switch.

    Args:
        alternate: blocks 1, 3, ... walk the sequence from its end.
        attention_heads: pool by attention of a learned query with so many heads; 0: the mean over all cells.
        out_dim: width that the maps of a `features_only` model are projected to, in front of their norms; None: none.
        full_blocks: so many blocks at the end also scan the other way, see ``both`` of `LocalBidirectionalScan`.
        **common: see `Vim`; with ``class_tokens="double"`` the classifier sees both tokens side by side.
    """

    family = "lbvim"
    own_scan: ClassVar[dict[str, Any]] = _SCAN
    own_scan_names: ClassVar[tuple[str, ...]] = ("local_bidirectional", "LocalBidirectionalScan")

    def __init__(
        self,
        *,
        alternate: bool = True,
        attention_heads: int = 0,
        out_dim: int | None = None,
        full_blocks: int = 0,
        depth: int = 24,
        **common: Any,
    ):
        self.alternate, self.attention_heads, self.out_dim = alternate, attention_heads, out_dim
        if not 0 <= full_blocks <= depth:
            raise ValueError(f"full_blocks must be a part of the {depth} blocks, got {full_blocks}")
        self.first_full_block = depth - full_blocks
        if attention_heads:
            self.classifier_key = "head.fc.weight"
        super().__init__(depth=depth, **common)
        if out_dim is not None:
            for key in self.out_norms:
                self.out_norms[key] = nn.Sequential(nn.Linear(self.num_features, out_dim), get_norm("layer", out_dim))

    def block_options(self, index: int, pairs: bool) -> dict[str, Any]:
        if pairs:
            raise ValueError("blocks of one direction side by side are Vim's; LBVim alternates from block to block")
        options = dict(reverse=index % 2 == 1) if self.alternate else {}
        return dict(options, both=True) if index >= self.first_full_block else options

    def turn(self, index: int, tokens: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """As `Vim.turn`, with positions that count along the walk of the block."""
        if self.rotary is None or not self.alternate or index % 2 == 0:
            return super().turn(index, tokens, layout)
        axes = (1, 2) if layout is None else (1,)
        return super().turn(index, tokens.flip(axes), layout).flip(axes)

    @property
    def out_info(self) -> list[dict[str, Any]]:
        info = super().out_info
        if self.out_dim is None or not self.out_norms or self.pyramid is not None:
            return info
        return [{**entry, "num_chs": self.out_dim} for entry in info]

    def build_head(self, num_classes: int) -> nn.Module:
        if not self.attention_heads:
            return linear_head(self.num_features * (2 if self.class_tokens == "double" else 1), num_classes)
        return AttentionHead(self.num_features, num_classes, self.attention_heads)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        if self.alternate and len(self.stages) % 2 and features.dim() == 3:
            features = features.flip(1)  # class tokens are read where they stood, from a stream that ends reversed
        if isinstance(self.head, AttentionHead):
            return self.head.pool(features.flatten(2).mT if features.dim() == 4 else features)  # of (B, T, C)
        if self.class_tokens == "double":
            return torch.cat([features[:, 0], features[:, -1]], dim=1)
        return super().pool(features)

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `Vim.own_keys`; output norms that are numbered from 0 on get the numbers of their blocks."""
        converted = super().own_keys(state_dict)
        numbers = {int(key.split(".")[1]) for key in converted if key.startswith("out_norms.")}
        if numbers != set(range(len(self.out_indices))):
            return converted

        def number_of_block(match: re.Match) -> str:
            return f"out_norms.{self.out_indices[int(match[1])]}."

        return {re.sub(r"^out_norms\.(\d+)\.", number_of_block, key): value for key, value in converted.items()}

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        ours = {key.removeprefix("stages.0.mixer.") for key in keys if key.startswith("stages.0.mixer.")}
        if ours:
            return ours in (_MIXER_KEYS, _MIXER_KEYS | _OTHER_KEYS)
        return "layers.0.mixer.x_proj.weight" in keys and "layers.0.mixer.A_b_log" not in keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with_projections = any(key.startswith("out_map_") for key in state_dict)
        original = any(key.startswith("layers.") for key in state_dict)
        converted = {}
        for key, value in super().official_keys(state_dict).items():
            key = rename(key, _OFFICIAL_KEYS + _OUT_NORM_KEYS[with_projections])
            if original and ".mixer.core." in key and len(value) == 2:  # of a block with both directions
                converted[key], converted[key.replace(".core.", ".other_core.")] = value.split(1)
            else:
                converted[key] = value
        return converted

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings(cls.__name__, config, _OFFICIAL_DEFAULTS, WITHOUT_EFFECT)
        for name, value in _UNSUPPORTED.items():
            if given[name] != value:
                raise ValueError(f"original LBVims have {name}={value!r}, all that are registered; got {given[name]!r}")
        if given["bimamba_type"] not in ("none", "v2"):
            raise ValueError(f"bimamba_type of an original LBVim is 'none' or 'v2', got {given['bimamba_type']!r}")
        head, window = given["head_type"], given["local_window"]
        if head not in (None, _ATTENTION_HEAD):
            raise ValueError(f"head_type of an original LBVim is None or {_ATTENTION_HEAD!r}, got {head!r}")
        if isinstance(window, Mapping):
            if dict(window) != _WINDOW_RULE:
                raise ValueError(f"local_window is a number, None or the published rule {_WINDOW_RULE}, got {window!r}")
            window = None
        options = dict(
            cls.shared_options(given, keys),
            alternate=given["layerwise_reverse_sq"],
            full_blocks=given["depth"] if given["bimamba_type"] == "v2" else given["last_n_layer_vim"],
            scan=dict(
                _SCAN, window=window if given["lbm"] else 1, average=given["if_divide_out"], **scan_sizes(given)
            ),
            **cls.dense_options(given, keys),
        )
        if options.get("features_only"):
            projected = any(key.startswith("out_map_") for key in keys)
            dim = given["embed_dim"]
            out_dim = _OUT_DIMS.get(dim, dim) if given["out_dim"] is None else given["out_dim"]
            normed = any(key.startswith("outnorm_") for key in keys)
            return dict(options, out_norm=normed, out_dim=out_dim if projected else None)
        return dict(options, attention_heads=given["head_n_heads"] if head else 0)


_MIXER_KEYS = {"in_proj.weight", "conv.weight", "conv.bias", "out_proj.weight"} | {
    f"core.{name}" for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
}
_OTHER_KEYS = {f"other_{key}" for key in _MIXER_KEYS if key.startswith(("conv.", "core."))}
_ATTENTION_HEAD = "att_qkv_onlyatt_pnorm_nomapq"
_WINDOW_RULE = {"L<=128": 4, "L<=256": 8, "else": 16}
_OUT_DIMS = {300: 192, 528: 384}
_OFFICIAL_KEYS = (
    (r"^(stages\.\d+\.mixer)\.convs\.0\.", r"\1.conv."),
    (r"^(stages\.\d+\.mixer)\.convs\.1\.", r"\1.other_conv."),
    (r"^head\.0\.post_norm\.", "head.norm."),
    (r"^head\.0\.", "head."),
    (r"^head\.1\.", "head.fc."),
)
_OUT_NORM_KEYS = {
    False: ((r"^outnorm_(\d+)\.", r"out_norms.\1."),),
    True: ((r"^out_map_(\d+)\.", r"out_norms.\1.0."), (r"^outnorm_(\d+)\.", r"out_norms.\1.1.")),
}
_UNSUPPORTED: dict[str, Any] = dict(
    if_bimamba=False,
    if_bidirectional=False,
    init_layer_scale=None,
)
_OFFICIAL_DEFAULTS: dict[str, Any] = {
    **VIM_DEFAULTS,
    **_UNSUPPORTED,
    "bimamba_type": "none",
    "if_cls_token": False,
    "lbm": True,
    "layerwise_reverse_sq": True,
    "local_window": None,
    "head_type": None,
    "head_n_heads": 6,
    "last_n_layer_vim": 0,
    "out_dim": None,
}

_COMMON = dict(drop_path_rate=0.05)

VARIANTS: dict[str, dict[str, Any]] = {
    "lbvim_tiny": dict(_COMMON, dim=192),
    "lbvim_300": dict(_COMMON, dim=300),
    "lbvim_small": dict(_COMMON, dim=384),
    "lbvim_528": dict(_COMMON, dim=528, attention_heads=6),
    "lbvim_micro": dict(dim=32, depth=4, img_size=64, scan=dict(_SCAN, state_dim=4)),
}
PUBLISHED: dict[str, dict[str, Any]] = {}

LBVim.variants = VARIANTS
LBVim.published = PUBLISHED
globals().update(register_family(LBVim))

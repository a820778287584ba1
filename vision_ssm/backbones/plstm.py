"""pLSTM-Vis: plain backbone of linear recurrences on the edges of the grid, by turns as beams and as diffusion.

Paper: pLSTM: parallelizable Linear Source Transition Mark networks, arXiv 2506.11997. Source: github.com/ml-jku/plstm
(MIT), commit a404ff38, src/plstm/torch/vision_model.py, and its configurations in github.com/ml-jku/plstm_experiments,
commit ac539b61. No weights are published.

New in this family: a mixer that is no scan along a line, here `PLSTMScan`, whose modes alternate from block to block;
a classifier that sees the four corners of the map, where states of the four orientations arrive.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import LayerScale
from torch import nn

from ..layers import PatchStem, add_norm, trunc_normal_
from ..registry import SCANS, suggest
from ..scans.plstm import PLSTMScan
from ..scans.sequence import TokenLayout
from .base import DEFAULT_PRETRAINED_CFG, Branch, ScanBlock, register_family, resolve_scan
from .official import official_settings, rename
from .plain import PlainBackbone

_SCAN = dict(type="plstm")
_CORNERS = ((0, 0), (-1, 0), (0, -1), (-1, -1))
_POOLINGS = ("corners", "mean")
_NORM_EPS = 1e-5
_MLP_MULTIPLE = 64
_MLP_RATIO = 4


class PLSTMBlock(ScanBlock):
    """Pre-norm residual token mixer, then an MLP; with `layer_scale` both branches are scaled per channel.

    Args:
        dim: width C.
        scan: strategy of the mixer; False leaves it out.
        layer_scale: initial scale of both branches, ``scale1`` and ``scale2``; None: no scale.
        **options: see `ScanBlock`.
    """

    mlp: nn.Module

    def __init__(self, dim: int, scan: dict | Literal[False], *, layer_scale: float | None = None, **options: Any):
        hidden = math.ceil(_MLP_RATIO * dim / _MLP_MULTIPLE) * _MLP_MULTIPLE
        super().__init__(dim, scan, mlp_ratio=hidden / dim, norm="rms", norm_eps=_NORM_EPS, **options)
        wanted = layer_scale is not None
        self.scale1 = LayerScale(dim, layer_scale) if wanted and self.mixer is not None else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale) if wanted else nn.Identity()

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`."""
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x, *(branch or ()))
            mixed = self.mixer(normed) if layout is None else self.mixer.scan_tokens(normed, layout)
            branch = self.scale1(mixed), self.drop_path
        x, normed = add_norm(self.norm2, x, *(branch or ()))
        return x, (self.scale2(self.mlp(normed)), self.drop_path)


class NearZeroLinear(nn.Linear):
    """A linear layer that starts near zero."""


class PLSTM(PlainBackbone):
    """pLSTM-Vis of any size and switch.

    Args:
        depth: blocks.
        dim: width of all of them.
        num_heads: heads of the recurrences, ``"auto"`` for about 64 channels each.
        scan: strategy of the blocks, or options that replace some of pLSTM's own (see `resolve_scan`); False leaves the
            mixers out.
        modes: modes of the recurrences, which blocks take in turns, see `PLSTMScan`; a `mode` in `scan` replaces them.
        patch_size: side of a patch.
        positions: whether there is a table of learned positions.
        layer_scale: initial scale of the branches of all blocks; None: no scale.
        pooling: what the classifier of a model without class tokens sees, ``"corners"``: the four corner cells, one
            behind the other, or ``"mean"``.
        normed_map: in a classifier, `forward_intermediates` returns the normalised map behind the last block alone
            unless asked for others; without it, the raw maps of evenly spaced blocks.
        img_size: image size that sizes the position table.
        drop_path_rate: stochastic depth, the same for all blocks.
        **common: feature_source, pyramid, in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see
            `PlainBackbone` and `Backbone`.
    """

    family = "plstm"
    common_cfg = {**DEFAULT_PRETRAINED_CFG, "crop_pct": 1.0}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 192,
        num_heads: int | str = "auto",
        scan: str | dict | Literal[False] | None = None,
        modes: Sequence[str] = ("propagation", "diffusion"),
        patch_size: int = 16,
        positions: bool = True,
        layer_scale: float | None = None,
        pooling: str = "corners",
        normed_map: bool = False,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if pooling not in _POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}.{suggest(str(pooling), _POOLINGS)}")
        if not modes:
            raise ValueError("modes must name at least one mode, such as ('propagation', 'diffusion')")
        if normed_map and self.features_only:
            raise ValueError("normed_map is for classifiers; a features_only model normalises the maps of out_indices")
        self.pooling = pooling
        self.stem = PatchStem(self.in_chans, dim, patch_size, norm="none")
        spec = resolve_scan(scan, _SCAN)
        blocks = []
        for i in range(depth):
            options = spec
            if spec is not False and SCANS.get(spec["type"]) is PLSTMScan:
                options = {"num_heads": num_heads, "mode": modes[i % len(modes)], **spec}
            blocks.append(PLSTMBlock(dim, options, layer_scale=layer_scale, drop_path=drop_path_rate))
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self._normed_map = normed_map
        self.finish_plain(
            blocks, dim, patch_size, self.stem.grid_size(size) if positions else None, "rms", norm_eps=_NORM_EPS
        )

    @property
    def head_hidden_size(self) -> int:
        return self.num_features * (len(_CORNERS) if self._sees_corners else 1)

    @property
    def own_pool(self) -> str:
        return "corners" if self._sees_corners else super().own_pool

    @property
    def _sees_corners(self) -> bool:
        return self.pooling == "corners" and self.class_tokens == "none"

    def build_head(self, num_classes: int) -> nn.Module:
        return NearZeroLinear(self.head_hidden_size, num_classes)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """The originals' rule: normal, of variance 2 / 5 over the last axis of the weight, and a classifier near 0."""
        if isinstance(module, NearZeroLinear):
            trunc_normal_(module.weight, std=2e-5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * module.weight.shape[-1])))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PLSTMScan):
            module.reset_parameters()
        elif isinstance(module, PLSTM) and module.pos_embed is not None:
            nn.init.normal_(module.pos_embed.table, std=math.sqrt(2 / (5 * module.pos_embed.table.shape[1])))

    def default_out_indices(self) -> list[int]:
        return [len(self.stage_info) - 1] if self._normed_map else super().default_out_indices()

    def map_norm(self, index: int, norm: bool | None = None) -> nn.Module:
        if norm is not False and self._normed_map and index == len(self.stage_info) - 1:
            return self.norm
        return super().map_norm(index, norm)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        if not self._sees_corners:
            return super().pool(features)
        return torch.cat([features[:, :, x, y] for x, y in _CORNERS], dim=1)  # (B, 4 C)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(
            re.search(r"(^|\.)block_stack\.blocks\.0\.block0\.interaction_module\.", key)
            or re.search(r"(^|\.)stages\.0\.mixer\.transition_bias$", key)
            for key in keys
        )

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not any(".interaction_module." in key for key in state_dict):
            return dict(state_dict)
        converted: dict[str, torch.Tensor] = {}
        parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
        for key, value in state_dict.items():
            key = rename(key, _OFFICIAL_KEYS)
            prefix, _, name = key.rpartition(".mixer.")
            if key == "pos_embed.embed":
                converted["pos_embed.table"] = value.permute(0, 3, 1, 2)  # (1, X, Y, C) -> (1, C, X, Y)
            elif name in _PARTS:
                ours, place = _PARTS[name]
                rows = value.flatten() if name.endswith("bias") else value.reshape(-1, value.shape[-1])
                parts.setdefault((prefix, ours), {})[place] = rows
            elif name in ("orientation_weight", "orientation_bias"):
                converted[key] = value.flatten(0, 1)  # (4, H) or (4, H, C), row h * 4 + n is of head h, orientation n
            else:
                converted[key] = value.flatten() if name in ("D", "norm_weight") else value
        for (prefix, name), found in parts.items():
            join = torch.cat if name.startswith("qkv") else torch.stack
            converted[f"{prefix}.mixer.{name}"] = join([found[place] for place in sorted(found)])
        return converted

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The final norm is the output norm of the last map, where a model without classifier has one."""
        keys = self.official_keys(state_dict)
        last = f"out_norms.{len(self.stage_info) - 1}"
        if f"{last}.weight" in keys or last.removeprefix("out_norms.") not in self.out_norms:
            return keys
        return {re.sub(r"^norm\.", f"{last}.", key): value for key, value in keys.items()}

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("pLSTM vision model", config, _OFFICIAL_DEFAULTS)
        if given["layers"] is not None and given["layers"] != 2 * given["num_blocks"]:
            raise ValueError(
                f"layers={given['layers']} and num_blocks={given['num_blocks']} disagree: a block has two layers"
            )
        unknown = sorted(set(given["modes"]) - set(_OFFICIAL_MODES))
        if unknown:
            raise ValueError(f"modes of an original pLSTM are 'P' and 'D', got {', '.join(map(repr, unknown))}")
        head = any(key.startswith("head.") for key in keys)
        resolution = given["resolution"]
        return dict(
            depth=2 * given["num_blocks"],
            dim=given["dim"],
            num_heads=given["num_heads"],
            patch_size=given["patch_size"],
            img_size=resolution if isinstance(resolution, int) else tuple(resolution),
            modes=tuple(_OFFICIAL_MODES[mode] for mode in given["modes"]),
            positions=given["pos_embed"],
            layer_scale=_LAYER_SCALE if given["layer_scale"] else None,
            pooling=given["pooling"],
            drop_path_rate=given["drop_path_rate"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_norm=head or not keys.isdisjoint(("norm.scale", "norm.weight")),
            out_indices=None if head else (2 * given["num_blocks"] - 1,),
            normed_map=head,
            scan=dict(_SCAN, chirality=given["chirality"], gate_weights=given["gate_weights"]),
        )


_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^block_stack\.blocks\.(\d+)\.block([01])\.", lambda m: f"stages.{2 * int(m[1]) + int(m[2])}."),
    (r"^(stages\.\d+)\.norm\.scale$", r"\1.norm1.weight"),
    (r"^(stages\.\d+)\.norm2\.scale$", r"\1.norm2.weight"),
    (r"\.upproj\.", ".mlp.fc1."),
    (r"\.downproj\.", ".mlp.fc2."),
    (r"\.(scale[12])\.scale$", r".\1.gamma"),
    (r"\.interaction_module\.", ".mixer."),
    (r"\.mixer\.direct\.bias$", ".mixer.D"),
    (r"\.mixer\.mhnorm\.scale$", ".mixer.norm_weight"),
    (r"\.mixer\.outprojection\.", ".mixer.out_proj."),
    (r"^norm\.scale$", "norm.weight"),
)
_TRANSITIONS = ("transition", "transition_r", "transition_d", "transition_rd")
_LEVELS = ("source", "source_r", "source_d", "mark", "mark_l", "mark_u")
_PARTS = {
    f"{part}.{theirs}{kind}": (f"{ours}{kind}", place)
    for parts, theirs, ours in (
        (("query", "key", "value_"), "", "qkv."),
        (_TRANSITIONS, "eigenvalues_", "transition_"),
        (_LEVELS, "", "gate_"),
    )
    for place, part in enumerate(parts)
    for kind in ("weight", "bias")
}
"""Tensors of the original mixer that are parts of one of ours: its name, and the place in it."""

_OFFICIAL_MODES = {"P": "propagation", "D": "diffusion"}
_LAYER_SCALE = 1e-4
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    dim=192,
    num_heads=3,
    resolution=(224, 224),
    patch_size=16,
    num_blocks=6,
    layers=None,
    modes=["P", "D"],
    chirality="L",
    pos_embed=True,
    layer_scale=False,
    gate_weights=True,
    pooling="corners",
    drop_path_rate=0.0,
    num_classes=1000,
)

_TINY = dict(dim=192, num_heads=3)
_ABLATIONS: dict[str, dict[str, Any]] = {
    "pmodeonly": dict(modes=("propagation",)),
    "dmodeonly": dict(modes=("diffusion",)),
    "conststm": dict(scan=dict(_SCAN, gate_weights=False)),
    "noposemb": dict(positions=False),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plstm_vis_t": _TINY,
    "plstm_vis_s": dict(dim=384, num_heads=6, drop_path_rate=0.05),
    "plstm_vis_b": dict(dim=768, num_heads=12, drop_path_rate=0.1),
    **{f"plstm_vis_t_{name}": {**_TINY, **change} for name, change in _ABLATIONS.items()},
    **{
        f"plstm_vis_t_{name}_scale": {**_TINY, **change, "layer_scale": _LAYER_SCALE}
        for name, change in _ABLATIONS.items()
    },
    "plstm_micro": dict(dim=32, depth=4, num_heads=2, img_size=64),
}

PLSTM.variants = VARIANTS
globals().update(register_family(PLSTM))

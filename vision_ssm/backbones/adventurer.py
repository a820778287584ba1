"""Adventurer: a plain Mamba-2 backbone that reads the patches of an image as one causal sequence.

Paper: Causal Image Modeling for Efficient Visual Understanding, arXiv 2410.07599 (CVPR 2025).
Source: github.com/wangf3014/Adventurer, commit a895f9ed, models_mamba.py. Weights: see `PUBLISHED`.

New in this family: the mixer `CausalScan`, one forward scan behind a token that is the mean of all tokens, with the
class token last, where it has seen everything. The paper reverses the patches in every second block; its code, and so
its weights, reverse them in blocks 2 and 3 alone, which is what `reversed_blocks` says.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import lecun_normal_
from torch import nn

from ..layers import PatchStem, trunc_normal_
from ..scans.causal import CausalScan
from .base import ScanBlock, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename
from .plain import PlainBackbone

_SCAN = dict(type="causal", expand=2.0, state_dim=64, head_dim=64)
_REVERSED_BLOCKS = (2, 3)


class Adventurer(PlainBackbone):
    """Adventurer of any size and switch.

    Args:
        dim: width of all blocks.
        depth: number of blocks.
        patch_size: side of a patch.
        scan: strategy of the blocks, or options that replace some of the family's own (see `resolve_scan`); False
            leaves the mixers out.
        reversed_blocks: numbers of the blocks that walk the patches from the last to the first, if the strategy is the
            family's own.
        mlp_ratio: hidden width of the gated MLP over `dim`; 0 leaves the MLP out.
        norm: ``"rms"`` or ``"layer"``, before both branches and behind the last block.
        norm_eps: epsilon of these norms.
        class_tokens: see `PlainBackbone`.
        img_size: image size that sizes the position table.
        remainder: see `PatchStem`.
        drop_path_rate: stochastic depth of the last block; earlier blocks but the first are one step behind a linear
            rise.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate, feature_source, pyramid; see
            `PlainBackbone` and `Backbone`.
    """

    family = "adventurer"

    def __init__(
        self,
        *,
        dim: int = 256,
        depth: int = 12,
        patch_size: int = 16,
        scan: str | dict | Literal[False] | None = None,
        reversed_blocks: Sequence[int] = _REVERSED_BLOCKS,
        mlp_ratio: float = 2.5,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        class_tokens: str = "last",
        img_size: int | tuple[int, int] = 224,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(class_tokens=class_tokens, **common)
        spec = resolve_scan(scan, _SCAN)
        reversed_spec = spec
        if spec is not False and spec["type"] in ("causal", "CausalScan"):
            reversed_spec = {**spec, "reverse": True}
        self.stem = PatchStem(self.in_chans, dim, patch_size, "none", remainder)
        rates = [0.0, *drop_path_rates(drop_path_rate, [depth])[0]]
        blocks = [
            ScanBlock(
                dim,
                reversed_spec if i in reversed_blocks else spec,
                norm=norm,
                norm_eps=norm_eps,
                mlp_ratio=mlp_ratio,
                mlp_act="silu",
                mlp_gated=True,
                drop_path=rates[i],
            )
            for i in range(depth)
        ]
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.finish_plain(blocks, dim, patch_size, self.stem.grid_size(size), norm, norm_eps)
        lecun_normal_(self.stem.conv.weight)
        nn.init.zeros_(self.stem.conv.bias)
        for block in self.stages:
            if isinstance(block.mixer, CausalScan):
                with torch.no_grad():
                    block.mixer.out_proj.weight.div_(math.sqrt(depth))

    def build_head(self, num_classes: int) -> nn.Module:
        head = nn.Linear(self.num_features, num_classes)
        trunc_normal_(head.weight, std=0.02)
        return head

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Weights of linear layers but the classifier's stay as PyTorch made them."""
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        official = "layers.0.norm_mlp.weight" in keys and "layers.0.mixer.dt_bias" in keys
        return official or {"stages.0.mixer.dt_bias", "stages.0.mixer.A_log"} <= keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        converted = {}
        for key, value in state_dict.items():
            if key == "pos_embed":
                side = math.isqrt(value.shape[1] - 1)
                if side * side != value.shape[1] - 1:
                    raise ValueError(f"pos_embed has {value.shape[1] - 1} patches, which are no square grid")
                # (1, L + 1, C), the class token's row last -> (1, C, side, side) and (1, 1, C)
                converted["pos_embed.table"] = value[:, :-1].mT.unflatten(2, (side, side))
                converted["cls_token.positions"] = value[:, -1:]
                continue
            key = rename(key, _OFFICIAL_KEYS)
            converted[key] = value
        for key in [key for key in converted if ".mlp.w1." in key]:
            # values and gates are one layer here: (2 * hidden, C), the gates last
            pair = converted.pop(key.replace(".w1.", ".w2.")), converted.pop(key)
            converted[key.replace(".w1.", ".fc1.")] = torch.cat(pair)
        return converted

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("Adventurer", config, _OFFICIAL_DEFAULTS, constants=dict(channels=3))
        if given["ngroups"] != 1:
            raise ValueError(f"an original Adventurer has one group of B and C, got ngroups={given['ngroups']}")
        dim, hidden = given["embed_dim"], given["mlp_hidden"]
        return dict(
            dim=dim,
            depth=given["depth"],
            patch_size=given["patch_size"],
            img_size=given["img_size"],
            scan=dict(
                expand=given["mamba_expand"],
                state_dim=given["mamba_d_state"],
                head_dim=given["headdim"],
                conv_kernel=given["d_conv"],
            ),
            # rounded up, so that the block, which rounds its product with the width down, gets that width
            mlp_ratio=2.5 if hidden is None else math.nextafter(hidden / dim, math.inf),
            norm="rms" if given["rms_norm"] else "layer",
            norm_eps=given["norm_epsilon"],
            remainder="drop",
            drop_rate=given["drop_rate"],
            drop_path_rate=given["drop_path_rate"],
            num_classes=given["num_classes"] if "head.weight" in keys else 0,
        )


_OFFICIAL_KEYS = (
    (r"^cls_token$", "cls_token.tokens"),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^norm_f\.", "norm."),
    (r"^layers\.", "stages."),
    (r"^(stages\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.norm_mlp\.", ".norm2."),
    (r"\.mixer\.conv1d\.", ".mixer.conv."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    img_size=224,
    patch_size=16,
    depth=12,
    embed_dim=256,
    num_classes=1000,
    rms_norm=True,
    norm_epsilon=1e-5,
    mamba_expand=2,
    mamba_d_state=64,
    headdim=64,
    d_conv=4,
    ngroups=1,
    mlp_hidden=None,
    drop_rate=0.0,
    drop_path_rate=0.0,
)

_BASE = dict(dim=768, depth=12, drop_path_rate=0.1)
_LARGE_INPUT = dict(_BASE, drop_path_rate=0.6)

VARIANTS: dict[str, dict[str, Any]] = {
    "adventurer_tiny_patch16_224": dict(dim=256, depth=12),
    "adventurer_small_patch16_224": dict(dim=512, depth=12),
    "adventurer_base_patch16_224": _BASE,
    "adventurer_large_patch16_224": dict(dim=1024, depth=24),
    "adventurer_base_patch8_224": dict(_BASE, patch_size=8),
    "adventurer_base_patch16_384": dict(_LARGE_INPUT, img_size=384),
    "adventurer_base_patch16_448": dict(_LARGE_INPUT, img_size=448),
    "adventurer_base_patch8_448": dict(_LARGE_INPUT, patch_size=8, img_size=448),
    "adventurer_micro": dict(dim=32, depth=4, img_size=64, scan=dict(_SCAN, state_dim=16, head_dim=16)),
}


def _published(name: str, top1: float) -> dict[str, Any]:
    size = VARIANTS[name].get("img_size", 224)
    padded = size == 224 and VARIANTS[name].get("patch_size", 16) == 16  # only these were evaluated on larger images
    file = f"{name}.pth"
    return dict(
        url=f"https://huggingface.co/Wangf3014/Adventurer/resolve/main/{file}",
        file=file,
        top1_reported=top1,
        paper="arXiv:2410.07599",
        input_size=(3, size, size),
        crop_pct=0.875 if padded else 1.0,
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    name: _published(name, top1)
    for name, top1 in {
        "adventurer_tiny_patch16_224": 78.2,
        "adventurer_small_patch16_224": 81.8,
        "adventurer_base_patch16_224": 82.6,
        "adventurer_large_patch16_224": 83.4,
        "adventurer_base_patch8_224": 83.9,
        "adventurer_base_patch16_384": 84.2,
        "adventurer_base_patch16_448": 84.3,
        "adventurer_base_patch8_448": 84.8,
    }.items()
}

Adventurer.variants = VARIANTS
Adventurer.published = PUBLISHED
globals().update(register_family(Adventurer))

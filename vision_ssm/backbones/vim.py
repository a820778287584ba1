"""Vim (Vision Mamba): plain backbone whose blocks scan the raster of patches from both ends.

Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, arXiv 2401.09417
(ICML 2024).
Source: github.com/hustvl/Vim (Apache-2.0), commit dd0358ad, vim/models_mamba.py and the dense backbones of seg/ and
det/. Weights: see `PUBLISHED`.

New in this family: the bidirectional mixer, here `BidirectionalScan`, and a class token in the middle of the sequence.
Blocks have no MLP. `*_stride8` are the models with overlapping patches, Vim-Ti+ and Vim-S+ of the paper, fine-tuned
from the others.
"""

import math
import re
from typing import Any, ClassVar, Literal

import torch
from timm.layers import lecun_normal_
from torch import nn

from ..layers import PatchStem, RotaryTable, get_norm, trunc_normal_
from ..registry import suggest
from ..scans.sequence import TokenLayout
from .base import Branch, ScanBlock, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename
from .plain import PlainBackbone

_SCAN = dict(type="bidirectional", average=True)
_ROTARY = ("none", "branch", "stream")
_FINAL_NORMS = ("drop", "keep", "apply")


class PairBlock(nn.Module):
    """Two blocks side by side on the same input, the second of which walks backwards.

    Both streams and both outputs are added, so that a pair doubles the stream.

    Args:
        first, second: the blocks.
        reverses: give the second block the tokens in reversed order, and bring what it makes of them back; False where
            it walks backwards by itself.
    """

    def __init__(self, first: ScanBlock, second: ScanBlock, reverses: bool = False):
        super().__init__()
        self.first, self.second, self.reverses = first, second, reverses

    @property
    def mixer(self) -> nn.Module | None:
        return self.first.mixer

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`."""
        if branch is not None:
            values, drop_path = branch
            x = x + drop_path(values)
        axes = (1, 2) if layout is None else (1,)
        results = [self.first(x, None, layout)[1], self.second(x.flip(axes) if self.reverses else x, None, layout)[1]]
        if None in results:
            return 2 * x, None
        (first, _), (second, drop_path) = results
        return 2 * x, (first + (second.flip(axes) if self.reverses else second), drop_path)


class Vim(PlainBackbone):
    """Vim of any size and switch.

    Args:
        depth: blocks.
        dim: width.
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out.
        patch_size: side of a patch.
        stride: of the patches; smaller than `patch_size` where they overlap. None: `patch_size`.
        norm: ``"rms"`` or ``"layer"``, in front of the blocks and behind the last; output norms are layer norms.
        norm_eps: epsilon of these norms.
        pairs: blocks two and two side by side, the second walking backwards (see `PairBlock`). They have one direction
            each, unless `scan` names ``directions``.
        pos_embed: add a learned position table.
        rotary: ``"branch"`` turns what enters a block, the output of the one before it, by rotary positions;
            ``"stream"`` the residual stream as well, again and again from block to block; ``"none"`` neither.
            Class tokens are not turned.
        rotary_skips_first: of a sequence with a class token, leave the first token as it is instead of the class token,
            and turn the others in their order. The original does so wherever its class token stands.
        img_size: image size that sizes the tables.
        remainder: see `PatchStem`.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        final_norm: what a `features_only` model does with a classifier's last norm: ``"drop"``, ``"keep"`` (unused
            and frozen, as it is in the state dicts of the original dense backbone) or ``"apply"`` it as the output
            norm of the last block.
        last_source: `feature_source` of the last block's map; None: as of all others.
        **common: class_tokens, feature_source, pyramid (see `PlainBackbone`), and what `Backbone` takes.
    """

    family = "vim"
    own_scan: ClassVar[dict[str, Any]] = _SCAN
    own_scan_names: ClassVar[tuple[str, ...]] = ("bidirectional", "BidirectionalScan")

    def __init__(
        self,
        *,
        depth: int = 24,
        dim: int = 192,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = 16,
        stride: int | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        pairs: bool = False,
        pos_embed: bool = True,
        rotary: str = "none",
        rotary_skips_first: bool = False,
        img_size: int | tuple[int, int] = 224,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        final_norm: str = "drop",
        last_source: str | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        self.last_source, self.depth = last_source, depth
        for keyword, value, choices in (
            ("rotary", rotary, _ROTARY),
            ("final_norm", final_norm, _FINAL_NORMS),
            ("last_source", last_source or "stream", ("stream", "mixer")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {keyword} {value!r}.{suggest(str(value), choices)}")
        if final_norm != "drop" and not self.features_only:
            raise ValueError(f"final_norm={final_norm!r} needs features_only=True: a classifier applies it anyway")
        if pairs and depth % 2:
            raise ValueError(f"pairs need an even number of blocks, got depth={depth}")
        self.stem = PatchStem(self.in_chans, dim, patch_size, "none", remainder, stride)
        spec = resolve_scan(scan, self.own_scan)
        reverses = spec is not False and spec["type"] in self.own_scan_names and "directions" in spec
        blocks: list[nn.Module] = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            options = spec
            if options is not False and options["type"] in self.own_scan_names:
                options = {**options, **self.block_options(i, pairs and not reverses)}
            blocks.append(ScanBlock(dim, options, norm=norm, norm_eps=norm_eps, mlp_ratio=0.0, drop_path=rate))
        for block in blocks:
            if isinstance(getattr(block.mixer, "out_proj", None), nn.Linear):
                with torch.no_grad():
                    block.mixer.out_proj.weight.div_(math.sqrt(depth))
        if pairs:
            blocks = [PairBlock(*pair, reverses) for pair in zip(blocks[::2], blocks[1::2])]
        grid = self.stem.grid_size((img_size, img_size) if isinstance(img_size, int) else tuple(img_size))
        self.rotary: nn.Module | None = None if rotary == "none" else RotaryTable(dim, *grid)
        self.turns_stream, self.rotary_skips_first = rotary == "stream", rotary_skips_first
        end_norm = "layer" if self.features_only else norm  # output norms are layer norms, whatever the blocks have
        self.finish_plain(blocks, dim, self.stem.stride, grid if pos_embed else None, end_norm, norm_eps)
        if final_norm == "keep":
            self.norm = get_norm(norm, dim, norm_eps).requires_grad_(False)
        elif final_norm == "apply":
            if self.out_indices[-1] != len(blocks) - 1:
                raise ValueError(f"final_norm='apply' needs the last block's map, got out_indices={self.out_indices}")
            self.out_norms[str(len(blocks) - 1)] = get_norm(norm, dim, norm_eps)
        self.final_norm = final_norm
        lecun_normal_(self.stem.conv.weight)
        nn.init.zeros_(self.stem.conv.bias)

    def block_options(self, index: int, pairs: bool) -> dict[str, Any]:
        """Options of this family's own strategy in block number `index`."""
        return dict(directions=("forward", "backward")[index % 2], average=False) if pairs else {}

    def build_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.num_features, num_classes)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Linear layers of the mixers keep PyTorch's initialisation; the others are initialised where they are made."""

    def run_block(
        self, index: int, x: torch.Tensor, branch: Branch | None, layout: TokenLayout | None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `PlainBackbone.run_block`, behind the rotary positions."""
        if branch is None or self.turns_stream:
            x = self.turn(index, x, layout)
        if branch is not None:
            branch = self.turn(index, branch[0], layout), branch[1]
        return super().run_block(index, x, branch, layout)

    def source_of(self, index: int) -> str:
        if self.last_source is not None and index == self.depth - 1:
            return self.last_source
        return super().source_of(index)

    def turn(self, index: int, tokens: torch.Tensor, layout: TokenLayout | None) -> torch.Tensor:
        """`tokens`, of the given layout or a map, turned by the rotary positions in front of block `index`."""
        if self.rotary is None:
            return tokens
        if layout is None:
            return self.rotary(tokens)
        if self.rotary_skips_first:
            layout = TokenLayout(layout.height, layout.width, "first")
        patches, class_tokens = layout.split(tokens)
        turned = self.rotary(patches.unflatten(1, (layout.height, layout.width)))  # (B, L, dim) -> (B, H, W, dim)
        return layout.join(turned.flatten(1, 2), class_tokens)

    def own_keys(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `PlainBackbone.own_keys`; blocks become pairs, and the last norm an output norm, where they are here."""
        converted = super().own_keys(state_dict)
        if self.final_norm == "apply":
            converted = {re.sub(r"^norm\.", f"out_norms.{len(self.stages) - 1}.", k): v for k, v in converted.items()}
        if not isinstance(self.stages[0], PairBlock) or "stages.0.first.norm1.weight" in converted:
            return converted
        paired = {}
        for key, value in converted.items():
            match = re.match(r"stages\.(\d+)\.(.*)", key)
            if match:
                key = f"stages.{int(match[1]) // 2}.{('first', 'second')[int(match[1]) % 2]}.{match[2]}"
            paired[key] = value
        return paired

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return not keys.isdisjoint(
            {
                "layers.0.mixer.A_b_log",
                "stages.0.mixer.convs.0.weight",
                "stages.0.first.mixer.convs.0.weight",
            }
        )

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        renamed = {}
        for key, value in state_dict.items():
            if key.startswith("rope."):
                continue  # computed
            key = rename(key, _OFFICIAL_KEYS)
            renamed[key] = value
        if "cls_token_head" in renamed:
            tokens = renamed.pop("cls_token_head"), renamed.pop("cls_token_tail")
            renamed["cls_token.tokens"] = torch.cat(tokens, dim=1)  # (1, 2, C)
        return stack_directions(renamed)

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings(cls.__name__, config, OFFICIAL_DEFAULTS, WITHOUT_EFFECT)
        both = "layers.0.mixer.A_b_log" in keys
        kind = "v1" if given["if_bimamba"] else given["bimamba_type"]
        if given["if_bidirectional"] and not both:
            kind = "none"
        if kind not in _DIRECTIONS:
            raise ValueError(f"unknown bimamba_type {kind!r} of an original Vim.{suggest(str(kind), _DIRECTIONS)}")
        if both != (kind != "none"):
            raise ValueError(f"bimamba_type {kind!r} of an original Vim does not fit its weights, A_b_log says")
        average = dict(average=given["if_divide_out"]) if kind == "v2" else dict(average=False)
        return dict(
            cls.shared_options(given, keys),
            pairs=given["if_bidirectional"],
            scan=dict(
                cls.own_scan,
                directions=_DIRECTIONS[kind],
                **average,
                layer_scale=given["init_layer_scale"],
                **scan_sizes(given),
            ),
            **cls.dense_options(given, keys),
        )

    @classmethod
    def shared_options(cls, given: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        """Options that Vim and its descendants read alike from an original's hyperparameters."""
        if given["ssm_cfg"]:
            raise ValueError(f"ssm_cfg of an original is None or empty, got {given['ssm_cfg']!r}")
        class_tokens = "none"
        if given["if_cls_token"] and not keys.isdisjoint({"cls_token", "cls_token_head"}):  # dense backbones drop them
            class_tokens = "middle" if given["use_middle_cls_token"] else "first"
            class_tokens = "double" if given["use_double_cls_token"] else class_tokens
        rotary = given["if_rope"]
        if rotary and class_tokens == "double":
            raise ValueError("an original Vim has rotary positions for one class token at most, not for two")
        if rotary and given["pt_hw_seq_len"] != 14:
            raise ValueError(f"rotary positions span 14 patches, got pt_hw_seq_len={given['pt_hw_seq_len']}")
        head = any(key.startswith("head.") for key in keys)
        if head and class_tokens == "none" and given["final_pool_type"] != "mean":
            raise ValueError(
                f"a classifier without class token takes the mean, got final_pool_type={given['final_pool_type']!r}"
            )
        return dict(
            depth=given["depth"],
            dim=given["embed_dim"],
            patch_size=given["patch_size"],
            stride=given["stride"],
            norm="rms" if given["rms_norm"] else "layer",
            norm_eps=given["norm_epsilon"],
            pos_embed=given["if_abs_pos_embed"],
            rotary=("stream" if given["if_rope_residual"] else "branch") if rotary else "none",
            rotary_skips_first=True,
            img_size=given["img_size"] if isinstance(given["img_size"], int) else tuple(given["img_size"]),
            remainder="drop",
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"] if given["channels"] is None else given["channels"],
            class_tokens=class_tokens,
            num_classes=given["num_classes"] if head else 0,
        )

    @classmethod
    def dense_options(cls, given: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        """Options of the backbones for segmentation (several maps) and detection (one, of the last block)."""
        pyramid = any(key.startswith("fpn1.") for key in keys)
        indices, end = given["out_indices"], given["last_layer_process"]
        if any(key.startswith("head.") for key in keys) or (indices is None and end is None and not pyramid):
            return {}
        if end not in (None, "none", "add", "add & norm"):
            raise ValueError(f"last_layer_process is 'none', 'add' or 'add & norm', got {end!r}")
        if given["if_bidirectional"]:
            raise ValueError("an original Vim with if_bidirectional has no dense backbone")
        last = given["depth"] - 1
        one_map = indices is None and not pyramid
        source = "stream" if given["use_residual_as_feature"] or (one_map and end in ("add", "add & norm")) else "mixer"
        chosen = [last] if one_map else list(_SEGMENTATION_INDICES if indices is None else indices)
        if given["use_residual_as_feature"] and given["if_rope"]:
            raise ValueError("an original Vim collects the residual stream behind the next block's rotary positions")
        # what the last block's map is where it is not taken behind its mixer: of one map, or of the residual stream,
        # which is collected when the next block has added to it
        processed = one_map or (given["use_residual_as_feature"] and last in chosen)
        kept = "apply" if processed and end == "add & norm" else "keep" if "norm_f.weight" in keys else "drop"
        return dict(
            features_only=True,
            out_indices=chosen,
            out_norm=False,
            feature_source=source,
            pyramid=pyramid,
            final_norm=kept,
            last_source="mixer" if end in (None, "none") and not one_map else None,
        )


def linear_head(dim: int, num_classes: int) -> nn.Linear:
    """Classifier of a vector of `dim` channels, initialised as the original's."""
    head = nn.Linear(dim, num_classes)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


_OFFICIAL_KEYS = (
    (r"^pos_embed$", "pos_embed.rows"),
    (r"^cls_token$", "cls_token.tokens"),
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^norm_f\.", "norm."),
    (r"^fpn1\.", "pyramid.levels.0."),
    (r"^fpn2\.0\.", "pyramid.levels.1."),
    (r"^layers\.(\d+)\.norm\.", r"stages.\1.norm1."),
    (r"^layers\.", "stages."),
    (r"\.mixer\.gamma$", ".mixer.layer_scale"),
)
_MIXER_KEYS = (
    ("core.A_log", ("A_log", "A_b_log")),
    ("core.D", ("D", "D_b")),
    ("core.x_proj_weight", ("x_proj.weight", "x_proj_b.weight")),
    ("core.dt_proj_weight", ("dt_proj.weight", "dt_proj_b.weight")),
    ("core.dt_proj_bias", ("dt_proj.bias", "dt_proj_b.bias")),
)


def stack_directions(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of the scans as one tensor for all directions, (K, ...); convolutions under numbers."""
    converted = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(stages\.\d+\.mixer\.)(.+)", key)
        prefix, leaf = match.groups() if match else ("", key)
        if match and leaf.startswith("conv1d"):
            leaf = re.sub(r"^conv1d(_b)?\.", lambda found: f"convs.{int(found[1] is not None)}.", leaf)
        ours = next((ours for ours, theirs in _MIXER_KEYS if match and leaf in theirs), None)
        if ours is None:
            converted[prefix + leaf] = value
        else:
            theirs = dict(_MIXER_KEYS)[ours]
            directions = [state_dict[prefix + name] for name in theirs if prefix + name in state_dict]
            converted[prefix + ours] = torch.stack(directions)
    return converted


def scan_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the mixers in an original's hyperparameters."""
    return dict(state_dim=given["d_state"], conv_width=given["d_conv"], expand=given["expand"])


_DIRECTIONS = {"v2": "both", "v1": "shared", "none": "forward"}
_SEGMENTATION_INDICES = (5, 11, 17, 23)
# precision and speed, training alone, what the state dict says, and a misspelling in Vim-B's own settings
WITHOUT_EFFECT = {
    *("residual_in_fp32", "fused_add_norm", "use_checkpoint", "pretrained", "device", "dtype"),
    *("flip_img_sequences_ratio", "drop_rate", "initializer_cfg", "if_fpn", "ft_seq_len", "if_devide_out"),
}
OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    ssm_cfg=None,
    img_size=224,
    patch_size=16,
    stride=16,
    depth=24,
    embed_dim=192,
    in_chans=3,  # of the dense backbones; the classifier's is called channels
    channels=None,
    num_classes=1000,
    d_state=16,
    d_conv=4,
    expand=2,
    drop_path_rate=0.1,
    rms_norm=True,
    norm_epsilon=1e-5,
    if_abs_pos_embed=True,
    if_rope=False,
    if_rope_residual=False,
    pt_hw_seq_len=14,
    if_bidirectional=False,
    if_bimamba=False,
    bimamba_type="v2",
    if_divide_out=True,
    init_layer_scale=None,
    if_cls_token=True,
    use_middle_cls_token=True,
    use_double_cls_token=False,
    final_pool_type="mean",
    # of the dense backbones
    out_indices=None,
    use_residual_as_feature=False,
    last_layer_process=None,
)

_COMMON = dict(class_tokens="middle")

VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny": dict(_COMMON, dim=192),
    "vim_tiny_stride8": dict(_COMMON, dim=192, stride=8),
    "vim_small": dict(_COMMON, dim=384, drop_path_rate=0.05),
    "vim_small_stride8": dict(_COMMON, dim=384, stride=8),
    "vim_base": dict(_COMMON, dim=768),
    "vim_micro": dict(_COMMON, dim=32, depth=4, img_size=64, scan=dict(_SCAN, state_dim=4)),
}


def _published(size: str, file: str, top1: float) -> dict[str, Any]:
    return dict(
        url=f"https://huggingface.co/hustvl/Vim-{size}-midclstok/resolve/main/{file}",
        file=file,
        top1_reported=top1,
        ema=False,
        license="apache-2.0",
        paper="arXiv:2401.09417",
        crop_pct=0.875,
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "vim_tiny": _published("tiny", "vim_t_midclstok_76p1acc.pth", 76.1),
    "vim_tiny_stride8": _published("tiny", "vim_t_midclstok_ft_78p3acc.pth", 78.3),
    "vim_small": _published("small", "vim_s_midclstok_80p5acc.pth", 80.5),
    "vim_small_stride8": _published("small", "vim_s_midclstok_ft_81p6acc.pth", 81.6),
    "vim_base": _published("base", "vim_b_midclstok_81p9acc.pth", 81.9),
}

Vim.variants = VARIANTS
Vim.published = PUBLISHED
globals().update(register_family(Vim))

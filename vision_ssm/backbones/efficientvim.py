"""EfficientViM: three-stage backbone for speed, which mixes channels on hidden states and classifies from them too.

Paper: EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality, arXiv 2411.15241 (CVPR
2025).
Source: github.com/mlvlab/EfficientViM (MIT), commit 304340cb, classification/models/EfficientViM.py and, for images of
any shape, detection/efficientViM.py. Weights: see `PUBLISHED`; timm has the same under the same parameter names, on the
Hugging Face hub as timm/efficientvim_m1.e300_in1k and so on, and those load here too.

New in this family: `HiddenStateMixer`; blocks that mix input and branch in learned shares per channel where others add;
and a classifier that is a weighted sum over the last hidden states of every stage and the last map. `*_dist` have a
second such classifier, which learned from a teacher.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ConvNormAct, SqueezeExcite
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..layers import ChannelLastBatchNorm, DepthwiseConv2d, HiddenStateHead, LayerNorm, add_norm, channels_last
from ..scans import build_scan
from ..scans.hidden_state import HiddenStateMixer
from .base import Backbone, Stage, recomputes, register_family, resolve_scan
from .official import official_settings, rename, stage_key

_STRIDE = 16
_SCAN = dict(type="hidden_state", inert_decay=True)
_OWN_SCAN = ("hidden_state", "HiddenStateMixer", HiddenStateMixer)


class FourConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with batch norm, widths dim / 8 to dim; ReLU behind all but the last."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
        self.layers = nn.Sequential(
            *(ConvNormAct(widths[i], widths[i + 1], 3, stride=2, apply_act=i < 3) for i in range(4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / 16), ceil(W / 16), dim)."""
        x = self.layers(channels_last(x))
        return x.permute(0, 2, 3, 1).contiguous()  # (B, H/16, W/16, dim)


class DepthwiseConvNorm(nn.Module):
    """Depthwise 3x3 convolution, ``conv``, and batch norm, ``norm``, of a channel-last map."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = DepthwiseConv2d(dim, 3, bias=False)
        self.norm = ChannelLastBatchNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        return self.norm(self.conv(x))


class BatchNormMlp(nn.Module):
    """``norm2(fc2(relu(norm1(fc1(x)))))`` with batch norms, which stand in for the biases."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False)
        self.norm1 = ChannelLastBatchNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)
        self.norm2 = ChannelLastBatchNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns the same shape."""
        return self.norm2(self.fc2(F.relu(self.norm1(self.fc1(x)))))


class ResidualDownsample(nn.Module):
    """Inverted bottleneck of stride 2 with squeeze-and-excitation, between two residual depthwise convolutions."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        wide = 4 * out_dim
        self.conv1 = DepthwiseConvNorm(dim)
        self.bottleneck = nn.Sequential(
            ConvNormAct(dim, wide, 1),
            ConvNormAct(wide, wide, 3, stride=2, groups=wide),
            SqueezeExcite(wide, rd_ratio=0.25),
            ConvNormAct(wide, out_dim, 1, apply_act=False),
        )
        self.conv2 = DepthwiseConvNorm(out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, dim). Returns (B, ceil(H/2), ceil(W/2), out_dim)."""
        x = x + self.conv1(x)
        x = self.bottleneck(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()  # (B, H/2, W/2, out_dim)
        return x + self.conv2(x)


class SharedBlock(nn.Module):
    """Convolution, token mixer, convolution and MLP, each weighed against its input: ``(1 - a) * x + a * branch(x)``.

    ``alpha`` (4, dim) holds the shares ``a = sigmoid(alpha)`` of the four branches per channel, near 1/2 at first.

    Args:
        dim: width.
        scan: strategy of the mixer, for `build_scan`; False leaves the mixer out.
        mlp_ratio: hidden width of the MLP over `dim`.
    """

    def __init__(self, dim: int, scan: dict | Literal[False], mlp_ratio: float = 4.0):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((4, dim), 1e-4))
        self.conv1 = DepthwiseConvNorm(dim)
        self.mixer = None
        if scan is not False:
            self.norm = LayerNorm(dim, eps=1e-5)
            self.mixer = build_scan(scan, dim)
        self.conv2 = DepthwiseConvNorm(dim)
        self.mlp = BatchNormMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (B, H, W, dim). Returns the same shape, and the hidden states (B, N, dim) of a `HiddenStateMixer`."""
        shares, hidden = self.alpha.sigmoid().unbind(0), None
        x = _blend(x, self.conv1(x), shares[0])
        if self.mixer is not None:
            normed = add_norm(self.norm, x)[1]
            mixes = isinstance(self.mixer, HiddenStateMixer)
            y, hidden = self.mixer.mix(normed) if mixes else (self.mixer(normed), None)
            x = _blend(x, y, shares[1])
        x = _blend(x, self.conv2(x), shares[2])
        return _blend(x, self.mlp(x), shares[3]), hidden


def _blend(x: torch.Tensor, branch: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return torch.lerp(x.to(share.dtype), branch.to(share.dtype), share)  # float32 under autocast, like any stream


class HiddenStateStage(Stage):
    """A stage of `SharedBlock`; it returns its map and the hidden states of its last block."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, hidden = self.downsample(x), None
        for block in self.blocks:
            if recomputes(self):
                x, hidden = checkpoint(block, x, use_reentrant=False)
            else:
                x, hidden = block(x)
        return x, hidden


class EfficientViM(Backbone):
    """EfficientViM of any size.

    What `forward_features` returns and `forward_head` takes is a list: the hidden states (B, N, dim) of every stage,
    then the last map. With a `scan` that has no hidden states it is the map alone, and so is what the classifier sees.

    Args:
        depths: blocks per stage.
        dims: width of each stage.
        states: hidden states of each stage's mixers.
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out. `states` are not for other strategies.
        mlp_ratio: hidden width of the MLP over that of its stage.
        distilled: a second classifier for a teacher's labels, see `HiddenStateHead`.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "efficientvim"
    classifier_key = "head.label.map.weight"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2),
        dims: Sequence[int] = (128, 192, 320),
        states: Sequence[int] = (49, 25, 9),
        scan: str | dict | Literal[False] | None = None,
        mlp_ratio: float = 4.0,
        distilled: bool = False,
        **common: Any,
    ):
        super().__init__(**common)
        if not len(depths) == len(dims) == len(states):
            raise ValueError(
                "depths, dims and states must have one entry per stage,"
                f" got {tuple(depths)}, {tuple(dims)} and {tuple(states)}"
            )
        if min(dims) < 8 or min(depths) < 1:
            raise ValueError(f"dims start at 8 and depths at 1, got {tuple(dims)} and {tuple(depths)}")
        own = resolve_scan(scan, _SCAN)
        self.distilled = distilled
        self.stem = FourConvStem(self.in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            spec = {"state_dim": states[i], **own} if own and own["type"] in _OWN_SCAN else own
            blocks = [SharedBlock(dim, spec, mlp_ratio) for _ in range(depths[i])]
            self.stages.append(HiddenStateStage(blocks, ResidualDownsample(dims[i - 1], dim) if i else None))
        has_states = isinstance(self.stages[-1].blocks[-1].mixer, HiddenStateMixer)
        self.hidden_dims = list(dims) if has_states else []
        self.finish(list(dims), [_STRIDE * 2**i for i in range(len(dims))])

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is None:
            return  # convolutions in the original, which keep their framework's initial values
        Backbone._init_weights(module)

    def build_head(self, num_classes: int) -> nn.Module:
        return HiddenStateHead(self.num_features, self.hidden_dims, num_classes, self.distilled)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        before = self.head
        super().reset_classifier(num_classes, global_pool)
        if isinstance(before, HiddenStateHead) and isinstance(self.head, HiddenStateHead):
            self.head.norms = before.norms  # they know the features, not the classes

    def _run_stages(self, x: torch.Tensor, last: int | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps and hidden states of the stages up to number `last`; none of the latter with another strategy."""
        self.check_images(x)
        x, maps, states = self.stem(x), [], []
        for stage in self.stages[: None if last is None else last + 1]:
            x, hidden = stage(x)
            maps.append(x)
            if hidden is not None:
                states.append(hidden)
        return maps, states

    def forward_stages(self, x: torch.Tensor, last: int | None = None) -> list[torch.Tensor]:
        return self._run_stages(x, last)[0]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """x: (B, in_chans, H, W). Returns [hidden states (B, N, dim) of every stage, last map (B, C, H', W')].

        The map, normalised in a classifier, comes alone where the blocks have no hidden states.
        """
        return self.trace(x)[0]

    def trace(self, x: torch.Tensor) -> tuple[torch.Tensor | list[torch.Tensor], list[torch.Tensor]]:
        maps, states = self._run_stages(x)
        features = self.norm(maps[-1]).permute(0, 3, 1, 2)
        return [*states, features] if states else features, maps

    def forward_head(self, features: torch.Tensor | list[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """features: of `forward_features`. Returns logits, or the pooled map (B, C) if `pre_logits`."""
        *states, last = features if isinstance(features, list) else [features]
        if self.global_pool == "":
            return last
        pooled = self.head_drop(self.pool(last))
        if pre_logits or not isinstance(self.head, HiddenStateHead):
            return pooled
        return self.head(states, pooled)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(re.match(r"stages\.\d+\.blocks\.\d+\.alpha$", key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not any(key.startswith("patch_embed.") for key in state_dict):
            return dict(state_dict)
        last = max((int(key.split(".")[1]) for key in state_dict if re.match(r"norm\.\d+\.weight$", key)), default=-1)
        final_keys = (
            (rf"^norm\.{last}\.", "norm."),
            (rf"^heads\.{last}\.", "head.label.map."),
            (rf"^heads_dist\.{last}\.", "head.teacher.map."),
        )
        renamed = {}
        for key, value in state_dict.items():
            key = rename(key, final_keys + _OFFICIAL_KEYS)
            key = stage_key(key)
            if _NORM_OF_CHANNELS.search(key):
                value = value.flatten()  # (1, C, 1) or (1, C, 1, 1)
            elif _LINEAR.search(key):
                value = value.flatten(1)  # of a convolution of size 1
            renamed[key] = value
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("EfficientViM", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        head = "weights" in keys
        return dict(
            depths=list(given["depths"]),
            dims=list(given["embed_dim"]),
            states=list(given["state_dim"]),
            scan={**_SCAN, "expand": given["ssd_expand"]},
            mlp_ratio=given["mlp_ratio"],
            distilled=given["distillation"],
            in_chans=given["in_dim"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_norm=False,
        )


_OFFICIAL_KEYS = (
    (r"^weights$", "head.label.weights"),
    (r"^weights_dist$", "head.teacher.weights"),
    (r"^norm\.(\d+)\.", r"head.norms.\1."),
    (r"^heads\.", "head.label.hidden."),
    (r"^heads_dist\.", "head.teacher.hidden."),
    (r"^patch_embed\.conv\.(\d+)\.norm\.", r"stem.layers.\1.bn."),
    (r"^patch_embed\.conv\.", "stem.layers."),
    (r"\.downsample\.conv\.(\d+)\.norm\.", r".downsample.bottleneck.\1.bn."),
    (r"\.downsample\.conv\.", ".downsample.bottleneck."),
    (r"\.dwconv([12])\.", r".conv\1."),
    (r"\.mixer\.BCdt_proj\.conv\.", ".mixer.in_proj."),
    (r"\.mixer\.dw\.conv\.", ".mixer.conv."),
    (r"\.mixer\.hz_proj\.conv\.", ".mixer.hidden_in_"),
    (r"\.mixer\.out_proj\.conv\.", ".mixer.hidden_out_"),
    (r"\.ffn\.fc([12])\.conv\.", r".mlp.fc\1."),
    (r"\.ffn\.fc([12])\.norm\.", r".mlp.norm\1."),
)
_NORM_OF_CHANNELS = re.compile(r"^norm\.|^head\.norms\.|\.blocks\.\d+\.norm\.")
_LINEAR = re.compile(r"\.mlp\.fc[12]\.weight$|\.mixer\.(in_proj\.|hidden_in_|hidden_out_)weight$")
_WITHOUT_EFFECT = {"frozen_stages", "pretrained"}  # on what the weights compute
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    in_dim=3,
    num_classes=1000,
    embed_dim=[128, 192, 320],
    depths=[2, 2, 2],
    state_dim=[49, 25, 9],
    mlp_ratio=4.0,
    ssd_expand=1.0,
    distillation=False,
)

_M1 = dict(depths=(2, 2, 2), dims=(128, 192, 320), states=(49, 25, 9), scan=_SCAN)
_M2 = dict(_M1, dims=(128, 256, 512))
_M3 = dict(_M1, dims=(224, 320, 512))
_M4 = dict(depths=(3, 4, 2), dims=(224, 320, 512), states=(64, 32, 16), scan=_SCAN)

VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvim_m1": _M1,
    "efficientvim_m2": _M2,
    "efficientvim_m3": _M3,
    "efficientvim_m4": _M4,
    "efficientvim_m1_dist": dict(_M1, distilled=True),
    "efficientvim_m2_dist": dict(_M2, distilled=True),
    "efficientvim_m3_dist": dict(_M3, distilled=True),
    "efficientvim_m4_dist": dict(_M4, distilled=True),
    "efficientvim_micro": dict(depths=(1, 1, 2), dims=(32, 32, 48), states=(6, 5, 4), scan=_SCAN),
}


def _weights(size: str, recipe: str, identity: str, top1: float) -> dict[str, Any]:
    url = f"https://drive.google.com/file/d/{identity}/view"
    tag = {} if recipe == "dist" else dict(tag=f"{recipe}_in1k")
    return dict(tag, url=url, file=f"EfficientViM_{size}_{recipe}.pth", top1_reported=top1)


def _published(size: str, recipe: str, identity: str, top1: float, *also: dict[str, Any]) -> dict[str, Any]:
    return dict(
        _weights(size, recipe, identity, top1),
        input_size=(3, 256, 256) if size == "M4" else (3, 224, 224),
        license="mit",
        paper="arXiv:2411.15241",
        also=list(also),
    )


_E300 = {  # the shorter of two trainings of the plain models, beside the longer one of 450 epochs
    "M1": _weights("M1", "e300", "1zat4-1npC-kvVkDsCDp--c5Sou7gn5Uj", 72.9),
    "M2": _weights("M2", "e300", "1Mm7Ems4KHFCunNJ8iI0FFQOC3hav7sEj", 75.4),
    "M3": _weights("M3", "e300", "1zmqmSwl0FHSQHaqjHHGR1XRalPibi_sf", 77.6),
    "M4": _weights("M4", "e300", "1cfRSlvtPaGxMf1N1N_m3e1_IDh7b_OEq", 79.4),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "efficientvim_m1": _published("M1", "e450", "1ztpSVnWccoGEEobpmk107US3MjX4LEgz", 73.5, _E300["M1"]),
    "efficientvim_m2": _published("M2", "e450", "1_YbrVx06cLtAaCgLG-jKH5tx1mLmnfO2", 75.8, _E300["M2"]),
    "efficientvim_m3": _published("M3", "e450", "1z8dxkVLPbZdHaran9pDeuMmILsz5xUlf", 77.9, _E300["M3"]),
    "efficientvim_m4": _published("M4", "e450", "1rVnX2FT9AVJdU6xSPhEUllXZlhUYv28z", 79.6, _E300["M4"]),
    "efficientvim_m1_dist": _published("M1", "dist", "1S0HSauwj-d-2_tqf20fBlNAdQbUxhypD", 74.6),
    "efficientvim_m2_dist": _published("M2", "dist", "1HrzY3hI1F0FwXXy8ejO6kXUi-QGK4I74", 76.7),
    "efficientvim_m3_dist": _published("M3", "dist", "13u_UgyOC2sH1ThcQO4GhnW572SggfsTq", 79.1),
    "efficientvim_m4_dist": _published("M4", "dist", "1gvINJ-oszWj7_Gb9wAYuIGV15xWDAQxQ", 80.7),
}

EfficientViM.variants = VARIANTS
EfficientViM.published = PUBLISHED
globals().update(register_family(EfficientViM))

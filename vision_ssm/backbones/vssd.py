"""VSSD: four-stage backbone whose first three stages sum over all cells instead of scanning them.

Paper: VSSD: Vision Mamba with Non-Causal State Space Duality, arXiv 2407.18559.
Source: github.com/YuHengsss/VSSD (its licence: see there), commit 87b753b3, classification/models/mamba2.py.
Weights: see `PUBLISHED`.

New in this family: `NonCausalSSD` as the mixer of the first three stages, with softmax attention in the last and two
depthwise convolutions per block. The paper's smallest model, VSSD-M ("micro"), is `vssd_micro_d48` here, after the
width of its first stage; `vssd_micro` is, as in every family, the small model for tests.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import ConvNormAct
from torch import nn

from ..layers import ChannelLastConv2d, ConvDownsample, InvertedDownsample, PatchStem, ResidualConvStem
from ..registry import suggest
from ..scans.noncausal_ssd import NonCausalSSD
from .base import Backbone, PositionConvBlock, Stage, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename, stage_key

_STRIDE = 4
_SCAN = dict(type="noncausal_ssd", state_dim=64)
_OWN_SCAN = ("noncausal_ssd", "NonCausalSSD", NonCausalSSD)


class NormedPatchStem(PatchStem):
    """`PatchStem` with batch norm and ReLU between its convolution and its norm."""

    def __init__(self, in_chans: int, dim: int, remainder: str = "pad"):
        super().__init__(in_chans, dim, _STRIDE, "layer", remainder)
        self.conv = ConvNormAct(in_chans, dim, _STRIDE, stride=_STRIDE, padding=0)


class ReluConvDownsample(ConvDownsample):
    """`ConvDownsample` of kernel 3 with ReLU in front of its norm."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim)
        self.conv = nn.Sequential(ChannelLastConv2d(dim, out_dim, 3, stride=2, padding=1), nn.ReLU())


class VSSD(Backbone):
    """VSSD of any size and switch.

    Args:
        depths: blocks per stage.
        dims: width of the first stage, doubled from stage to stage.
        heads: heads of the mixers of each stage, of SSD and of attention alike.
        mixers: per stage ``"ssd"`` or ``"attention"``.
        scan: strategy of the ``"ssd"`` stages, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers of these stages out. `heads` are not for other strategies.
        stem: ``"residual"`` (five convolutions) or ``"patch"`` (one patch convolution).
        downsample: ``"inverted"`` (inverted bottleneck) or ``"conv"`` (a strided convolution).
        mlp_ratio: hidden width of the MLP over that of its stage.
        remainder: ``"pad"`` or ``"drop"``, what the patch stem does with pixels that fill no patch.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "vssd"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 8, 4),
        dims: int = 64,
        heads: Sequence[int] = (2, 4, 8, 16),
        mixers: Sequence[str] = ("ssd", "ssd", "ssd", "attention"),
        scan: str | dict | Literal[False] | None = None,
        stem: str = "residual",
        downsample: str = "inverted",
        mlp_ratio: float = 4.0,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if not len(depths) == len(heads) == len(mixers):
            raise ValueError(
                "depths, heads and mixers must have one entry per stage,"
                f" got {tuple(depths)}, {tuple(heads)} and {tuple(mixers)}"
            )
        stems: dict[str, Callable[[], nn.Module]] = {
            "residual": lambda: ResidualConvStem(self.in_chans, dims),
            "patch": lambda: NormedPatchStem(self.in_chans, dims, remainder),
        }
        downsamples: dict[str, Callable[[int, int], nn.Module]] = {
            "inverted": InvertedDownsample,
            "conv": ReluConvDownsample,
        }
        own = resolve_scan(scan, _SCAN)
        specs: dict[str, Callable[[int], dict | Literal[False]]] = {
            "ssd": lambda count: {"heads": count, **own} if own and own["type"] in _OWN_SCAN else own,
            "attention": lambda count: {"type": "attention", "heads": count},
        }
        switches: list[tuple[str, str, Mapping[str, Any]]] = [
            ("stem", stem, stems),
            ("downsample", downsample, downsamples),
            *(("mixer", mixer, specs) for mixer in mixers),
        ]
        for keyword, value, choices in switches:
            if value not in choices:
                raise ValueError(f"unknown {keyword} {value!r}.{suggest(str(value), choices)}")
        widths = [dims * 2**i for i in range(len(depths))]
        self.stem = stems[stem]()
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            spec = specs[mixers[i]](heads[i])
            blocks = [PositionConvBlock(widths[i], spec, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates]
            self.stages.append(Stage(blocks, downsamples[downsample](widths[i - 1], widths[i]) if i else None))
        self.finish(widths, [_STRIDE * 2**i for i in range(len(depths))])

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(_OFFICIAL_MIXER.search(key) for key in keys) or (
            any(_OWN_MIXER.search(key) for key in keys) and "stages.0.blocks.0.conv1.weight" in keys
        )

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        stem = "patch" if "patch_embed.norm.weight" in state_dict else "residual"
        downsample = "inverted" if any(".downsample.conv.1." in key for key in state_dict) else "conv"
        renamed = {}
        for key, value in state_dict.items():
            key = rename(key, _STEM_KEYS[stem] + _DOWNSAMPLE_KEYS[downsample] + _BLOCK_KEYS)
            renamed[stage_key(key)] = value
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("VSSD", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        if given["patch_size"] != _STRIDE:
            raise ValueError(f"patch_size of an original VSSD is {_STRIDE}, got {given['patch_size']!r}")
        if given["conv_init"] is not None:
            raise ValueError(f"conv_init={given['conv_init']!r} never worked in the original, only None did")
        if given["learnable_init_states"]:
            raise ValueError("learnable_init_states=True is not supported: no published model learns initial states")
        mixers = []
        for name in given["attn_types"][: len(given["depths"])]:
            if name not in _OFFICIAL_MIXERS:
                raise ValueError(
                    f"unknown attn_types entry {name!r} of an original VSSD.{suggest(str(name), _OFFICIAL_MIXERS)}"
                )
            mixers.append(_OFFICIAL_MIXERS[name])
        order = "none" if given["linear_attn_duality"] else "bidirectional" if given["bidirection"] else "raster"
        head = "head.weight" in keys
        outputs = any(key.startswith("outnorm") for key in keys)
        classifier = head or ("norm.weight" in keys and not outputs)
        return dict(
            depths=list(given["depths"]),
            dims=given["embed_dim"],
            heads=list(given["num_heads"])[: len(given["depths"])],
            mixers=mixers,
            scan=dict(
                type="noncausal_ssd",
                expand=given["ssd_expansion"],
                state_dim=given["d_state"],
                groups="heads" if given["ssd_ngroups"] == -1 else given["ssd_ngroups"],
                order=order,
                positive_weights=given["ssd_positve_dA"],
            ),
            stem="patch" if given["simple_patch_embed"] else "residual",
            downsample="conv" if given["simple_downsample"] else "inverted",
            mlp_ratio=given["mlp_ratio"],
            remainder="drop",
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not classifier,
            out_indices=None if classifier else tuple(given["out_indices"]),
            out_norm=outputs,
        )


_OFFICIAL_MIXER = re.compile(r"^layers\.\d+\.blocks\.\d+\.attn\.(dt_bias|to_qkv\.weight)$")
_OWN_MIXER = re.compile(r"^stages\.\d+\.blocks\.\d+\.mixer\.(dt_bias|attention\.qkv\.weight)$")
_OFFICIAL_MIXERS = {"mamba2": "ssd", "standard": "attention"}
_STEM_KEYS = {
    "residual": (
        (r"^patch_embed\.conv3\.0\.", "patch_embed.conv3."),
        (r"^patch_embed\.conv3\.1\.", "patch_embed.conv4."),
        (r"^patch_embed\.(.*)\.norm\.", r"stem.\1.bn."),
        (r"^patch_embed\.", "stem."),
    ),
    "patch": (
        (r"^patch_embed\.conv1\.norm\.", "stem.conv.bn."),
        (r"^patch_embed\.conv1\.", "stem.conv."),
        (r"^patch_embed\.", "stem."),
    ),
}
_DOWNSAMPLE_KEYS = {
    "inverted": (
        (r"\.downsample\.conv\.0\.conv\.", ".downsample.expand."),
        (r"\.downsample\.conv\.1\.conv\.", ".downsample.depthwise."),
        (r"\.downsample\.conv\.2\.conv\.", ".downsample.project."),
        (r"\.downsample\.conv\.2\.norm\.", ".downsample.norm."),
    ),
    "conv": ((r"\.downsample\.conv\.0\.conv\.", ".downsample.conv.0."),),
}
_BLOCK_KEYS = (
    (r"\.cpe([12])\.", r".conv\1."),
    (r"\.attn\.to_qkv\.", ".mixer.attention.qkv."),
    (r"\.attn\.to_out\.", ".mixer.attention.proj."),
    (r"\.attn\.conv2d\.", ".mixer.conv."),
    (r"\.attn\.", ".mixer."),
    (r"^outnorm(\d+)\.", r"out_norms.\1."),
)
_WITHOUT_EFFECT = {  # on what the weights compute
    *("ssd_chunk_size", "qkv_bias", "drop_rate", "use_checkpoint", "pretrained", "key"),
    # the original takes any keyword and ignores these
    *("image_size", "img_size", "lepe", "LEPE", "ssd_expand", "norm_layer", "ape"),
}
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    embed_dim=64,
    depths=[2, 4, 8, 4],
    num_heads=[2, 4, 8, 16],
    mlp_ratio=4.0,
    drop_path_rate=0.2,
    simple_downsample=False,
    simple_patch_embed=False,
    ssd_expansion=2,
    ssd_ngroups=1,
    linear_attn_duality=True,
    ssd_positve_dA=True,
    bidirection=False,
    d_state=64,
    conv_init=None,
    learnable_init_states=False,
    attn_types=["mamba2", "mamba2", "mamba2", "standard"],
    out_indices=(0, 1, 2, 3),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vssd_micro_d48": dict(
        depths=(2, 2, 8, 4), dims=48, heads=(2, 4, 8, 16), scan={**_SCAN, "state_dim": 48}, drop_path_rate=0.2
    ),
    "vssd_tiny": dict(depths=(2, 4, 8, 4), dims=64, heads=(2, 4, 8, 16), scan=_SCAN, drop_path_rate=0.2),
    "vssd_small": dict(depths=(3, 4, 21, 5), dims=64, heads=(2, 4, 8, 16), scan=_SCAN, drop_path_rate=0.4),
    "vssd_base": dict(depths=(3, 4, 21, 5), dims=96, heads=(3, 6, 12, 24), scan=_SCAN, drop_path_rate=0.6),
    "vssd_micro": dict(depths=(1, 1, 1, 1), dims=16, heads=(1, 2, 4, 8), scan={**_SCAN, "state_dim": 8}),
}


def _weights(name: str, top1: float, **facts: Any) -> dict[str, Any]:
    file = f"vssd_{name}.pth"
    url = f"https://huggingface.co/YuhengSSS/VSSD/resolve/main/{file}"
    return dict(url=url, file=file, top1_reported=top1, **facts)


def _published(size: str, top1: float, top1_with_mesa: float) -> dict[str, Any]:
    """Averaged weights, and beside them those that also learned from their average (MESA)."""
    also = [_weights(f"{size}_e300_with_mesa", top1_with_mesa, tag="mesa_in1k")]
    return _weights(f"{size}_best_ema", top1, tag="ema_in1k", ema=True, paper=_PAPER, also=also)


_PAPER = "arXiv:2407.18559"

PUBLISHED: dict[str, dict[str, Any]] = {
    "vssd_micro_d48": _weights("micro_best", 82.5, ema=False, paper=_PAPER),
    "vssd_tiny": _published("tiny", 83.6, 84.1),
    "vssd_small": _published("small", 84.1, 84.5),
    "vssd_base": _published("base", 84.7, 85.4),
}

VSSD.variants = VARIANTS
VSSD.published = PUBLISHED
globals().update(register_family(VSSD))

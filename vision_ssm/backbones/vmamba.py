"""VMamba: four-stage state-space backbone whose blocks scan the map along four routes.

Paper: VMamba: Visual State Space Model, arXiv 2401.10166 (NeurIPS 2024).
Source: github.com/MzeroMiko/VMamba (MIT), commit 2ed52ead, classification/models/vmamba.py. Weights: see `PUBLISHED`.

New in this family: the cross scan (SS2D) as a token mixer, here `MultiDirectionScan`. The paper's VMamba-T, -S and -B
are `vmamba_tiny_s1l8`, `vmamba_small_s2l15` and `vmamba_base_s2l15`: s is the inner width over the stage width, l the
depth of stage 3. `vanilla_vmamba_*` is the first version of the paper, `*_m2` the Mamba-2 (SSD) form without published
weights.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..layers import ConvDownsample, ConvStem, PatchMerging, PatchStem, PositionTable
from ..registry import suggest
from .base import Backbone, ScanBlock, Stage, drop_path_rates, register_family, resolve_scan, stage_widths
from .official import official_settings, rename, stage_key

_PATCH_SIZE = 4
_V0_SCAN = dict(type="multi_direction", expand=2.0, state_dim=16)
_V2_SCAN = dict(type="multi_direction", expand=1.0, state_dim=1, conv_bias=False, gate=False)
_M2_SCAN = dict(
    type="multi_direction",
    core="ssd",
    expand=1.0,
    state_dim=64,
    conv_bias=False,
    gate=False,
    act="gelu",
    init="uniform",
)


class VMamba(Backbone):
    """VMamba of any size and switch.

    Args:
        depths: blocks per stage.
        dims: width of each stage, or of the first one (doubled from stage to stage).
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out.
        stem: ``"conv"`` (two overlapping convolutions) or ``"patch"`` (one patch convolution).
        downsample: ``"conv3"``, ``"conv2"`` (a strided convolution of that size) or ``"merge"`` (patch merging).
        norm: ``"layer"`` or ``"batch"``, everywhere but inside the scan.
        stem_norm: whether the stem has norms.
        mlp_ratio, mlp_act, mlp_gated, mlp_dropout: the MLP of a block; ratio 0 leaves it out.
        pos_embed: add a learned position table after the stem.
        img_size: image size that sizes the position table.
        remainder: ``"pad"`` keeps every pixel of sizes that a patch or a stride does not divide, ``"drop"`` cuts the
            rest off as the original does.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "vmamba"
    default_scan: ClassVar[dict[str, Any]] = _V2_SCAN
    """Strategy and options of the blocks, of which a dict without a type replaces some."""

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = _PATCH_SIZE,
        stem: str = "conv",
        downsample: str = "conv3",
        norm: str = "layer",
        stem_norm: bool = True,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_gated: bool = False,
        mlp_dropout: float = 0.0,
        pos_embed: bool = False,
        img_size: int | tuple[int, int] = 224,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        dims = stage_widths(dims, depths)
        stem_norm_name = norm if stem_norm else "none"
        stems: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: ConvStem(self.in_chans, dims[0], stem_norm_name),
            "patch": lambda: PatchStem(self.in_chans, dims[0], patch_size, stem_norm_name, remainder),
        }
        downsamples: dict[str, Callable[[int, int], nn.Module]] = {
            "merge": lambda dim, out_dim: PatchMerging(dim, out_dim, norm),
            "conv2": lambda dim, out_dim: ConvDownsample(dim, out_dim, 2, norm, remainder),
            "conv3": lambda dim, out_dim: ConvDownsample(dim, out_dim, 3, norm),
        }
        for keyword, value, choices in (("stem", stem, stems), ("downsample", downsample, downsamples)):
            if value not in choices:
                raise ValueError(f"unknown {keyword} {value!r}.{suggest(str(value), choices)}")
        if stem == "conv" and patch_size != _PATCH_SIZE:
            raise ValueError(f"stem 'conv' has patch_size {_PATCH_SIZE}, got {patch_size}; stem='patch' has any")
        spec = resolve_scan(scan, self.default_scan)
        self.stem = stems[stem]()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if pos_embed:
            cells = [
                side // patch_size if remainder == "drop" else math.ceil(side / patch_size) for side in (height, width)
            ]
            self.pos_embed = PositionTable(dims[0], *cells)
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [
                self.build_block(
                    i,
                    dims[i],
                    spec,
                    norm=norm,
                    mlp_ratio=mlp_ratio,
                    mlp_act=mlp_act,
                    mlp_gated=mlp_gated,
                    mlp_dropout=mlp_dropout,
                    drop_path=rate,
                )
                for rate in rates
            ]
            self.stages.append(Stage(blocks, downsamples[downsample](dims[i - 1], dims[i]) if i else None))
        self.finish(dims, [patch_size * 2**i for i in range(len(depths))], norm)

    def build_block(self, stage: int, dim: int, scan: dict | Literal[False], **options: Any) -> nn.Module:
        """A block of a stage, with options of `ScanBlock`; a family that grows out of this one may have another."""
        return ScanBlock(dim, scan, **options)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        mixer = any(_MIXER_KEY.search(key) and key.startswith(("layers.", "stages.")) for key in keys)
        return mixer and not any(_RELATIVES_KEY.match(key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("stages.") for key in state_dict):
            return dict(state_dict)
        overlapping_stem = "patch_embed.5.weight" in state_dict
        renamed = {}
        for key, value in state_dict.items():
            key = rename(key, _VANILLA_KEYS)
            key = rename(key, _STEM_KEYS[overlapping_stem] + _OFFICIAL_KEYS)
            renamed[stage_key(key)] = value
        return convert_mixers(renamed)

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("VMamba", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        norm = _lookup("norm_layer", str(given["norm_layer"]).lower(), {"ln": "layer", "ln2d": "layer", "bn": "batch"})
        head = any(re.match(r"^(classifier|head)\.", key) for key in keys)
        options = dict(
            depths=list(given["depths"]),
            dims=given["dims"] if isinstance(given["dims"], int) else list(given["dims"]),
            patch_size=given["patch_size"],
            stem=_lookup("patchembed_version", given["patchembed_version"], {"v1": "patch", "v2": "conv"}),
            downsample=_lookup(
                "downsample_version", given["downsample_version"], {"v1": "merge", "v2": "conv2", "v3": "conv3"}
            ),
            norm=norm,
            stem_norm=given["patch_norm"],
            mlp_ratio=given["mlp_ratio"],
            mlp_act=str(given["mlp_act_layer"]).lower(),
            mlp_gated=given["gmlp"],
            mlp_dropout=given["mlp_drop_rate"],
            pos_embed=given["posembed"],
            img_size=given["imgsize"],
            remainder="drop",
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_indices=None if head else tuple(given["out_indices"]),
            out_norm=any(key.startswith("outnorm") for key in keys),
            scan=given["ssm_ratio"] > 0
            and official_scan(
                given["forward_type"],
                expand=given["ssm_ratio"],
                state_dim=given["ssm_d_state"],
                dt_rank=given["ssm_dt_rank"],
                act=str(given["ssm_act_layer"]).lower(),
                conv_kernel=given["ssm_conv"],
                conv_bias=given["ssm_conv_bias"],
                dropout=given["ssm_drop_rate"],
                init=given["ssm_init"],
            ),
        )
        return options


_MIXER_KEY = re.compile(r"\.blocks\.\d+\.(op|self_attention|mixer)\.(core\.)?x_proj_weight$")
# parts of a block that only families have which grew out of VMamba
_RELATIVES_KEY = re.compile(
    r"(layers|stages)\.\d+\.blocks\.\d+\."
    r"((op|self_attention)\.(multi_scan|conv2d_b1|se)|conv_branch|convFFN|conv_mlp|cpe1|conv1|branches)\."
)

# state dicts of the first version, before its layers were renamed
_VANILLA_KEYS = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)
_STEM_KEYS = {
    False: ((r"^patch_embed\.0\.", "stem.conv."), (r"^patch_embed\.2\.", "stem.norm.")),
    True: (
        (r"^patch_embed\.0\.", "stem.conv1."),
        (r"^patch_embed\.2\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
    ),
}
_OFFICIAL_KEYS = (
    (r"^pos_embed$", "pos_embed.table"),
    (r"^classifier\.(norm|head)\.", r"\1."),
    (r"^outnorm(\d+)\.", r"out_norms.\1."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
)
_MIXER_KEYS = (
    (r"(^|\.)conv2d\.(?:1\.)?(weight|bias)$", r"\1conv.\2"),
    (r"(^|\.)out_norm\.1\.weight$", r"\1out_norm.weight"),  # a lone convolution behind a permutation
    (r"(^|\.)out_norm\.2\.weight$", r"\1out_norm.1.weight"),  # a norm, a permutation, a convolution
    (r"(^|\.)A_logs$", r"\1core.A_log"),
    (r"(^|\.)Ds$", r"\1core.D"),
    (r"(^|\.)x_proj_weight$", r"\1core.x_proj_weight"),
    (r"(^|\.)dt_projs_(weight|bias)$", r"\1core.dt_proj_\2"),
)


def convert_mixers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes of original SS2D parameters as `MultiDirectionScan` has them; other entries are kept.

    Decays and skips are stored per route here, (K, D, N) and (K, D); 1x1 convolutions as linear weights.
    """
    converted = {}
    for key, value in state_dict.items():
        key = rename(key, _MIXER_KEYS)
        if value.ndim == 4 and value.shape[2:] == (1, 1) and re.search(r"(_proj|fc1|fc2|head|reduction)\.weight$", key):
            value = value.flatten(1)
        converted[key] = value
    for key in [key for key in converted if key.endswith("core.dt_proj_weight")]:
        prefix, routes = key.removesuffix("dt_proj_weight"), converted[key].shape[0]
        for leaf in ("A_log", "D"):
            flat = converted.get(prefix + leaf)
            if flat is not None and flat.shape[0] % routes == 0 and flat.shape[0] != routes:
                converted[prefix + leaf] = flat.unflatten(0, (routes, -1))  # (K*D, ...) -> (K, D, ...)
    return converted


def _lookup(name: str, value: Any, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"unknown {name} {value!r} of an original VMamba.{suggest(str(value), table)}")
    return table[value]


# The original packs its switches into one string: <core><_onNORM><_nozact><_noz><_oact><_no32>, stripped from the end.
_OFFICIAL_CORES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("v01", "v02", "v03", "v04", "v05", "v2", "v3")},
    **{name: dict(gate=True, gate_act=True, act="silu", conv_bias=True) for name in ("v0", "v0seq")},
    "v051d": dict(routes="unidirectional"),
    "v052d": dict(routes="bidirectional"),
    "v052dc": dict(routes="cascade"),
    "v052d3": dict(routes="rotations"),
    "m0": dict(core="ssd"),
}
_OFFICIAL_SUFFIXES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("_no32", {}),  # the scan is float32 inside whatever its inputs are
    ("_oact", dict(out_act=True)),
    ("_noz", dict(gate=False)),
    ("_nozact", dict(gate_act=False)),
)
_OFFICIAL_OUT_NORMS = {
    "_onnone": "none",
    "_ondwconv3": "conv",
    "_oncnorm": "layer_conv",
    "_onsoftmax": "softmax",
    "_onsigmoid": "sigmoid",
}
_OFFICIAL_INITS = {"v0": "mamba", "v1": "normal", "v2": "uniform"}


def official_scan(forward_type: str, *, init: str = "v0", **options: Any) -> dict[str, Any]:
    """Scan options for an original ``forward_type`` string; `options` are keywords of `MultiDirectionScan`.

    Raises:
        ValueError: a core that the original does not know or cannot run.
    """
    core, switches = forward_type, {}
    for suffix, switch in _OFFICIAL_SUFFIXES:
        if core.endswith(suffix):
            core = core.removesuffix(suffix)
            switches.update(switch)
    for suffix, out_norm in _OFFICIAL_OUT_NORMS.items():
        if core.endswith(suffix):
            core = core.removesuffix(suffix)
            switches["out_norm"] = out_norm
            break
    if re.fullmatch(r"xv[123]a", core):
        raise ValueError(f"forward_type {forward_type!r} never worked in the original (shape error) and has no model")
    switches.update(_lookup("forward_type", core, _OFFICIAL_CORES))
    init = _lookup("ssm_init", init, _OFFICIAL_INITS)
    return {"type": "multi_direction", **options, "init": init, **switches}


_WITHOUT_EFFECT = {"use_checkpoint", "pretrained"}  # of the original's hyperparameters, on what the weights compute
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    depths=[2, 2, 9, 2],
    dims=[96, 192, 384, 768],
    ssm_d_state=16,
    ssm_ratio=2.0,
    ssm_dt_rank="auto",
    ssm_act_layer="silu",
    ssm_conv=3,
    ssm_conv_bias=True,
    ssm_drop_rate=0.0,
    ssm_init="v0",
    forward_type="v2",
    mlp_ratio=4.0,
    mlp_act_layer="gelu",
    mlp_drop_rate=0.0,
    gmlp=False,
    drop_path_rate=0.1,
    patch_norm=True,
    norm_layer="LN",
    downsample_version="v2",
    patchembed_version="v1",
    posembed=False,
    imgsize=224,
    out_indices=(0, 1, 2, 3),
)

_VANILLA = dict(dims=96, scan=_V0_SCAN, stem="patch", downsample="merge", mlp_ratio=0.0)
_M2 = dict(dims=96, scan=_M2_SCAN)
_S2 = dict(scan={**_V2_SCAN, "expand": 2.0})
_S1 = dict(scan=_V2_SCAN)

VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla_vmamba_tiny": dict(_VANILLA, depths=(2, 2, 9, 2), drop_path_rate=0.2),
    "vanilla_vmamba_small": dict(_VANILLA, depths=(2, 2, 27, 2), drop_path_rate=0.3),
    "vanilla_vmamba_base": dict(_VANILLA, depths=(2, 2, 27, 2), dims=128, drop_path_rate=0.6),
    "vmamba_tiny_s2l5": dict(_S2, depths=(2, 2, 5, 2), dims=96, drop_path_rate=0.2),
    "vmamba_small_s2l15": dict(_S2, depths=(2, 2, 15, 2), dims=96, drop_path_rate=0.3),
    "vmamba_base_s2l15": dict(_S2, depths=(2, 2, 15, 2), dims=128, drop_path_rate=0.6),
    "vmamba_tiny_s1l8": dict(_S1, depths=(2, 2, 8, 2), dims=96, drop_path_rate=0.2),
    "vmamba_small_s1l20": dict(_S1, depths=(2, 2, 20, 2), dims=96, drop_path_rate=0.3),
    "vmamba_base_s1l20": dict(_S1, depths=(2, 2, 20, 2), dims=128, drop_path_rate=0.5),
    "vmamba_tiny_m2": dict(_M2, depths=(2, 2, 4, 2), drop_path_rate=0.2),
    "vmamba_small_m2": dict(_M2, depths=(2, 2, 12, 2), drop_path_rate=0.3),
    "vmamba_base_m2": dict(_M2, depths=(2, 2, 12, 2), dims=128, drop_path_rate=0.3),
    "vmamba_micro": dict(_S1, depths=(1, 1, 2, 1), dims=16),
}

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"


def _published(release: str, file: str, top1: float, ema: bool = True) -> dict[str, Any]:
    url = f"{_RELEASES}/%23{release}/{file}"
    return dict(url=url, file=file, top1_reported=top1, ema=ema, license="mit", paper="arXiv:2401.10166")


PUBLISHED: dict[str, dict[str, Any]] = {
    "vanilla_vmamba_tiny": _published("v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, ema=False),
    "vanilla_vmamba_small": _published("v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
    "vanilla_vmamba_base": _published("v0cls", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
    "vmamba_tiny_s2l5": _published("v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
    "vmamba_small_s2l15": _published("v2cls", "vssm_small_0229_ckpt_epoch_222.pth", 83.6),
    "vmamba_base_s2l15": _published("v2cls", "vssm_base_0229_ckpt_epoch_237.pth", 83.9),
    "vmamba_tiny_s1l8": _published("v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
    "vmamba_small_s1l20": _published("v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
    "vmamba_base_s1l20": _published("v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
}

VMamba.variants = VARIANTS
VMamba.published = PUBLISHED
globals().update(register_family(VMamba))

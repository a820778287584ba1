"""MSVMamba: VMamba with three of its four routes at half resolution, channel gates and convolutional MLPs.

Paper: Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model, arXiv 2405.14174 (NeurIPS 2024).
Source: github.com/YuHengsss/MSVMamba, classification/models/vmamba.py: `msvmamba_*` are the models of the first version
of the paper (branch master, commit c3940191), `msvmambav3_*` those of the last one (branch v2, commit fca4a391).
Weights: see `PUBLISHED`. The paper's MSVMamba-Micro is `msvmamba_micro_d64` here, after the width of its first
stage; `msvmamba_micro` is, as in every family, the small model for tests.

New in this family: the multi-scale scan, here `MultiScaleScan`, in the forms of the two versions; and an MLP with a
depthwise convolution in its hidden layer, with its norm before it in the first version and behind it in the last.
"""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..layers import ConvMlp, add_norm, get_norm
from ..scans.sequence import TokenLayout
from .base import Branch, ScanBlock, register_family
from .official import official_settings, rename
from .vmamba import VMamba

_V1_SCAN = dict(type="multi_scale", merge="norm_add", expand=2.0, state_dim=1, gate=True, channel_gate=True)
_V3_SCAN = dict(type="multi_scale", merge="add_norm", expand=1.0, state_dim=1, gate=False, channel_gate=True)
_OF_SCALES = ("merge", "reverse_full")  # options that `MultiScaleScan` has and `MultiDirectionScan` has not


class ConvMlpBlock(ScanBlock):
    """`ScanBlock` with a convolutional MLP at its end.

    Args:
        conv_mlp_ratio: hidden width of that MLP over `dim`; 0 leaves it out.
        conv_mlp_dropout: see `ConvMlp`.
        post_norm: its norm stands behind it, not before it.
        options: see `ScanBlock`. An ordinary MLP shares its norm with the convolutional one.
    """

    def __init__(
        self,
        dim: int,
        scan: dict | Literal[False],
        *,
        conv_mlp_ratio: float,
        conv_mlp_dropout: float = 0.0,
        post_norm: bool = False,
        norm: str = "layer",
        **options: Any,
    ):
        super().__init__(dim, scan, norm=norm, **options)
        self.post_norm = post_norm
        self.conv_mlp = None
        if conv_mlp_ratio > 0:
            if self.mlp is None:
                self.norm2 = get_norm(norm, dim)
            self.conv_mlp = ConvMlp(dim, int(dim * conv_mlp_ratio), residual=True, dropout=conv_mlp_dropout)

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        x, branch = super().forward(x, branch)
        if self.conv_mlp is None:
            return x, branch
        if self.post_norm:
            if branch is not None:
                x = x + branch[1](branch[0])
            return x, (self.norm2(self.conv_mlp(x)), self.drop_path)
        x, normed = add_norm(self.norm2, x, *(branch or ()))
        return x, (self.conv_mlp(normed), self.drop_path)


class MSVMamba(VMamba):
    """MSVMamba of either version, of any size and switch.

    Args:
        conv_mlp_ratio, conv_mlp_dropout, post_norm: the convolutional MLP of a block, see `ConvMlpBlock`.
        multi_scale_stages: stages (from 0) with multi-scale scans, all by default; the others scan all four routes at
            full resolution.
        mlp_ratio: hidden width of an ordinary MLP beside the convolutional one, over the width.
        **options: see `VMamba`.
    """

    family = "msvmamba"
    default_scan: ClassVar[dict[str, Any]] = _V3_SCAN

    def __init__(
        self,
        *,
        conv_mlp_ratio: float = 4.0,
        conv_mlp_dropout: float = 0.0,
        post_norm: bool = True,
        multi_scale_stages: Iterable[int] | None = None,
        mlp_ratio: float = 0.0,
        **options: Any,
    ):
        # known before the blocks are built, which the base class does
        self.multi_scale_stages = None if multi_scale_stages is None else frozenset(multi_scale_stages)
        self.block_options: dict[str, Any] = dict(
            conv_mlp_ratio=conv_mlp_ratio, conv_mlp_dropout=conv_mlp_dropout, post_norm=post_norm
        )
        super().__init__(mlp_ratio=mlp_ratio, **options)
        stages = range(len(self.stage_info))
        if unknown := sorted((self.multi_scale_stages or set()) - set(stages)):
            raise ValueError(f"multi_scale_stages are numbers of stages in 0..{stages[-1]}, got {unknown}")

    def build_block(self, stage: int, dim: int, scan: dict | Literal[False], **options: Any) -> nn.Module:
        low = self.multi_scale_stages is None or stage in self.multi_scale_stages
        if scan and not low and scan["type"] in ("multi_scale", "MultiScaleScan"):
            scan = {key: value for key, value in scan.items() if key not in _OF_SCALES} | {"type": "multi_direction"}
        return ConvMlpBlock(dim, scan, **self.block_options, **options)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        VMamba._init_weights(module)
        if isinstance(module, ConvMlp):  # whose layers are convolutions in the original and start as torch makes them
            module.fc1.reset_parameters()
            module.fc2.reset_parameters()

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(_OWN_KEY.match(key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for key, value in state_dict.items():
            key = rename(key, _OFFICIAL_KEYS)
            renamed[key] = value
        return super().official_keys(renamed)

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        forward_type = config.get("forward_type", "")
        last = forward_type.startswith("vms") or bool(set(config) & (_V3_SWITCHES - _V1_SWITCHES))
        own = _V3_SWITCHES if last else _V1_SWITCHES
        official_settings(f"MSVMamba ({'last' if last else 'first'} version)", config, {}, own | _COMMON)
        _refuse(config, last)
        core = "vms" if last else "v2"
        forward_type = forward_type or core
        if not forward_type.startswith(core) or (not last and forward_type != core):
            raise ValueError(f"forward_type {forward_type!r} of an original MSVMamba is not offered; it is {core!r}")
        common = {key: value for key, value in config.items() if key in _COMMON}
        options = super().from_official_config({**common, "forward_type": "v05" + forward_type[len(core) :]}, keys)
        if options["scan"]:
            scan = {**(_V3_SCAN if last else _V1_SCAN), "gate": True, **options["scan"], "type": "multi_scale"}
            scan["channel_gate"] = config.get("add_se", any(".op.se." in key for key in keys))
            scan["reverse_full"] = config.get("full_res_index", 1) == 2
            options["scan"] = scan
        convolutional = config.get("convffn" if last else "convFFN", any(".convFFN." in key for key in keys))
        ratio = config.get("conv_ffn_ratio", 4) if last else 2
        stages = config.get("ms_stage")
        return dict(
            options,
            conv_mlp_ratio=ratio if convolutional else 0.0,
            conv_mlp_dropout=config.get("ffn_dropout", 0.2),
            post_norm=last and str(config.get("norm_layer", "ln")).lower() != "ln",
            multi_scale_stages=None if stages is None else set(stages) & set(range(len(options["depths"]))),
            mlp_ratio=0.0 if last and convolutional else options["mlp_ratio"],
        )


_OWN_KEY = re.compile(r"(layers|stages)\.\d+\.blocks\.\d+\.(convFFN|conv_mlp|op\.conv2d_b1|mixer\.low_conv)\.")
_OFFICIAL_KEYS = (
    (r"\.op\.conv2d_b1\.", ".op.low_conv."),
    (r"\.op\.se\.fc\.0\.", ".op.channel_gate.reduce."),
    (r"\.op\.se\.fc\.2\.", ".op.channel_gate.expand."),
    (r"\.convFFN\.linear(\d)\.", r".conv_mlp.fc\1."),
    (r"\.convFFN\.dwc\.", ".conv_mlp.conv."),
)

# hyperparameters of the originals: those of VMamba, and those of each version, some of them without effect
_COMMON = {
    *("patch_size", "in_chans", "num_classes", "depths", "dims", "ssm_d_state", "ssm_ratio", "ssm_dt_rank"),
    *("ssm_act_layer", "ssm_conv", "ssm_conv_bias", "ssm_drop_rate", "ssm_init", "forward_type", "mlp_ratio"),
    *("mlp_act_layer", "mlp_drop_rate", "gmlp", "drop_path_rate", "patch_norm", "norm_layer", "downsample_version"),
    *("patchembed_version", "posembed", "imgsize", "out_indices", "use_checkpoint", "pretrained"),
}
_V1_SWITCHES = {
    *("ssm_rank_ratio", "ssm_simple_init", "sscore_type", "add_conv", "add_se", "ms_fusion", "up_sample", "convFFN"),
    *("sep_norm", "ms_stage", "ms_split", "ffn_dropout"),
}
_V3_SWITCHES = {"add_se", "convffn", "axis_stage", "num_heads", "conv_ffn_ratio", "full_res_index", "ffn_dropout"}


def _refuse(config: dict[str, Any], last: bool) -> None:
    """Raise for values that never worked in the originals, or that no model was published with."""
    offered: dict[str, tuple[Any, ...]] = {
        "sscore_type": ("multiscale_4scan_12",),
        "add_conv": (True,),
        "ms_fusion": (None,),
        "sep_norm": (False,),
        "ms_split": ([1, 3],),
        "axis_stage": ([],),
        "full_res_index": (1, 2),
    }
    for name, values in offered.items():
        value = config.get(name, values[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in values:
            choices = " or ".join(map(repr, values))
            raise ValueError(f"{name}={value!r} of an original MSVMamba is not offered; it is {choices}")
    rank_ratio, ratio = (config.get(name, 2.0) for name in ("ssm_rank_ratio", "ssm_ratio"))
    if rank_ratio < ratio and not last:
        raise ValueError(f"ssm_rank_ratio={rank_ratio} below ssm_ratio={ratio} of an original MSVMamba is not offered")


_V1 = dict(
    scan=_V1_SCAN, stem="patch", downsample="merge", conv_mlp_ratio=2.0, post_norm=False, drop_path_rate=0.2
)
_V3 = dict(scan=_V3_SCAN, stem="conv", downsample="conv3", conv_mlp_ratio=4.0, post_norm=True)

VARIANTS: dict[str, dict[str, Any]] = {
    "msvmamba_nano": dict(_V1, depths=(1, 2, 5, 2), dims=48),
    "msvmamba_micro_d64": dict(_V1, depths=(1, 2, 5, 2), dims=64),
    "msvmamba_tiny": dict(_V1, depths=(1, 2, 9, 2), dims=96),
    "msvmambav3_tiny": dict(_V3, depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2),
    "msvmambav3_small": dict(_V3, depths=(2, 3, 20, 2), dims=96, drop_path_rate=0.4),
    "msvmambav3_base": dict(
        _V3, scan={**_V3_SCAN, "gate": True}, depths=(2, 4, 18, 2), dims=128, drop_path_rate=0.5
    ),
    "msvmamba_micro": dict(_V3, depths=(1, 1, 2, 1), dims=(32, 32, 48, 64), scan={**_V3_SCAN, "expand": 2.0}),
}

_PAPER = "arXiv:2405.14174"


def _on_drive(folder: str, top1: float, **facts: Any) -> dict[str, Any]:
    url = f"https://drive.google.com/drive/folders/{folder}"
    return dict(url=url, top1_reported=top1, ema=False, paper=_PAPER, **facts)


def _on_hub(size: str, top1: float) -> dict[str, Any]:
    file = f"msvmambav3_{size}_224.pth"
    url = f"https://huggingface.co/YuhengSSS/MSVMamba/resolve/main/{file}"
    return dict(url=url, file=file, top1_reported=top1, ema=True, paper=_PAPER)


PUBLISHED: dict[str, dict[str, Any]] = {
    "msvmamba_nano": _on_drive("1J41w3ApitQhp2O3wHmJoOs4U032uqebK", 77.3),
    "msvmamba_micro_d64": _on_drive("1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", 79.8, file="vssm_micro_ms_e300.pth"),
    "msvmamba_tiny": _on_drive("1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", 82.8),
    "msvmambav3_tiny": _on_hub("tiny", 83.0),
    "msvmambav3_small": _on_hub("small", 84.1),
    "msvmambav3_base": _on_hub("base", 84.4),
}

MSVMamba.variants = VARIANTS
MSVMamba.published = PUBLISHED
globals().update(register_family(MSVMamba))

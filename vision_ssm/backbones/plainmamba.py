"""PlainMamba: plain state-space backbone with one scan along four continuous routes.

Paper: PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition, arXiv 2403.17695 (BMVC 2024).
Source: github.com/ChenhongyiYang/PlainMamba, commit 0975a1d0d8bc, mmcls/plain_mamba_dev. Weights: see
`PUBLISHED`; the licence is that of the repository.

New in this family: a scan whose steps always go to a neighbouring cell and know their direction, here
`ContinuousScan`; blocks without an MLP; a stem of convolutions under the patches. The published weights need step
sizes, B and C in raster order whatever the route, as the original's code has them; ``scan=dict(parameters="token")``
is the scan that the paper describes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ConvNormAct
from torch import nn

from ..layers import ChannelLastBatchNorm, DepthwiseConv2d, PatchStem, channels_last, get_norm
from ..registry import suggest
from ..scans.sequence import TokenLayout
from .base import Branch, ScanBlock, add_branch, drop_path_rates, register_family, resolve_scan
from .official import official_settings, rename
from .plain import PlainBackbone

_STEM_WIDTH = 64
_NORM_EPS = 1e-6  # of the norms behind the blocks
_SCAN = dict(type="continuous", init="trunc_normal")


class ConvPatchStem(nn.Module):
    """A 7x7 convolution of stride 2, more 3x3 convolutions, all of 64 channels with batch norm and ReLU, then patches.

    Patches are squares of that map, `patch_size` pixels wide; sizes that they do not fill are padded. Parameters:
    ``convs``, ``patches``.
    """

    def __init__(self, in_chans: int, dim: int, convs: int = 1, patch_size: int = 16):
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be even, as the convolutions halve the image; got {patch_size}")
        first = ConvNormAct(in_chans, _STEM_WIDTH, 7, stride=2)
        self.convs = nn.Sequential(first, *(ConvNormAct(_STEM_WIDTH, _STEM_WIDTH, 3) for _ in range(convs)))
        self.patches = PatchStem(_STEM_WIDTH, dim, patch_size // 2, norm="none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, ceil(H / patch_size), ceil(W / patch_size), dim)."""
        return self.patches(self.convs(channels_last(x)))


class PlainMambaBlock(ScanBlock):
    """Pre-norm residual token mixer; with `local`, a depthwise 3x3 convolution, batch norm and GELU replace its sum.

    Args:
        dim: width C.
        scan: strategy of the mixer; False leaves it out.
        local: whether there is that convolution, of the name ``local``.
        **options: norm and drop_path, see `ScanBlock`.
    """

    def __init__(self, dim: int, scan: dict | Literal[False], *, local: bool = False, **options: Any):
        super().__init__(dim, scan, mlp_ratio=0.0, **options)
        self.local = None
        if local:
            self.local = nn.Sequential(DepthwiseConv2d(dim, 3, bias=False), ChannelLastBatchNorm(dim), nn.GELU())

    def forward(
        self, x: torch.Tensor, branch: Branch | None = None, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, Branch | None]:
        """As `ScanBlock.forward`, on maps alone."""
        x, branch = super().forward(x, branch)
        if self.local is None:
            return x, branch
        return self.local(add_branch(x, branch)), None


class PlainMamba(PlainBackbone):
    """PlainMamba of any size and switch.

    The last block's feature map shares the norm of the classifier, ``norm``; other maps have norms of their own.

    Args:
        depth: blocks.
        dim: width of all of them.
        scan: strategy of the blocks, or options that replace some of PlainMamba's own (see `resolve_scan`); False
            leaves the mixers out.
        patch_size: side of a patch, even.
        stem_convs: 3x3 convolutions of the stem.
        local_blocks: numbers of the blocks with a local convolution, see `PlainMambaBlock`.
        norm: norm inside the blocks, ``"layer"`` or ``"rms"``.
        final_norm: whether there is a layer norm behind the last block.
        norm_indices: blocks of a classifier whose maps `forward_intermediates` returns by default and normalises;
            None: maps of a classifier are raw.
        img_size: image size that sizes the position table.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: feature_source, pyramid, in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see
            `PlainBackbone` and `Backbone`.
    """

    family = "plainmamba"

    def __init__(
        self,
        *,
        depth: int = 24,
        dim: int = 192,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = 16,
        stem_convs: int = 2,
        local_blocks: Sequence[int] = (),
        norm: str = "layer",
        final_norm: bool = True,
        norm_indices: Sequence[int] | None = None,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        if any(not 0 <= i < depth for i in local_blocks):
            raise ValueError(f"local_blocks must be numbers of blocks in 0..{depth - 1}, got {tuple(local_blocks)}")
        if norm_indices is not None and self.features_only:
            raise ValueError("norm_indices is for classifiers; a features_only model normalises those of out_indices")
        self.stem = ConvPatchStem(self.in_chans, dim, stem_convs, patch_size)
        spec = resolve_scan(scan, _SCAN)
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        blocks = [
            PlainMambaBlock(dim, spec, local=i in local_blocks, norm=norm, drop_path=rate)
            for i, rate in enumerate(rates)
        ]
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid_size = (math.ceil(height / patch_size), math.ceil(width / patch_size))
        self.finish_plain(blocks, dim, patch_size, grid_size, norm_eps=_NORM_EPS)
        last = depth - 1
        if norm_indices is not None:
            self.out_indices = self.resolve_indices(norm_indices)
            own = [i for i in self.out_indices if i != last]
            self.out_norms.update({str(i): get_norm("layer", dim, _NORM_EPS) for i in own})
        elif str(last) in self.out_norms:
            self.norm = self.out_norms.pop(str(last))
        self._normed_end = norm_indices is not None or self._wants_out_norm
        if not final_norm:
            self.norm = nn.Identity()

    def map_norm(self, index: int, norm: bool | None = None) -> nn.Module:
        if norm is not False and self._normed_end and index == len(self.stage_info) - 1:
            return self.norm
        return super().map_norm(index, norm)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed: those of `Backbone.no_weight_decay`, and the biases of directions."""
        directions = {name for name, _ in self.named_parameters() if name.endswith("direction_bias")}
        return super().no_weight_decay() | directions

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(re.fullmatch(r"(backbone\.)?patch_embed\.stem\.0\.weight", key) for key in keys) or (
            "stem.patches.conv.weight" in keys and "stem.convs.0.conv.weight" in keys
        )

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "stem.patches.conv.weight" in state_dict:
            return dict(state_dict)
        renamed = {}
        for key, value in state_dict.items():
            if key.startswith("ema_"):  # mmcv's averaging hook keeps the weights as trained beside the averaged ones
                continue
            key = rename(key, _OFFICIAL_KEYS + OFFICIAL_MIXER_KEYS)
            conv = re.match(r"patch_embed\.convs\.(\d+)\.(.+)", key)
            if conv:  # convolution, norm and activation in turns, behind the first convolution
                number, part = divmod(int(conv[1]), 3)
                key = f"stem.convs.{number + 1}.{('conv', 'bn')[part]}.{conv[2]}"
            renamed[key] = value
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("PlainMamba", config, _OFFICIAL_DEFAULTS, without_effect=["drop_rate"])
        arch = config.get("arch") or {}
        if isinstance(arch, str):
            if arch not in _OFFICIAL_ARCHS:
                raise ValueError(f"unknown arch {arch!r} of an original PlainMamba.{suggest(arch, _OFFICIAL_ARCHS)}")
            arch = _OFFICIAL_ARCHS[arch]
        given.update({**arch, **config})
        depth, indices = given["num_layers"], given["out_indices"]
        wanted = sorted(i + depth if i < 0 else i for i in ([indices] if isinstance(indices, int) else indices))
        head = any(key.startswith("head.") for key in keys)
        return dict(
            depth=depth,
            dim=given["embed_dims"],
            stem_convs=given["num_convs_patch_embed"],
            local_blocks=tuple(given["layers_with_dwconv"]),
            norm="rms" if given["use_rms_norm"] else "layer",
            final_norm=given["final_norm"],
            norm_indices=wanted if head and wanted != [depth - 1] else None,
            patch_size=given["patch_size"],
            in_chans=given["in_channels"],
            img_size=given["img_size"] if isinstance(given["img_size"], int) else tuple(given["img_size"]),
            drop_path_rate=given["drop_path_rate"],
            num_classes=given["num_classes"] if head else 0,
            features_only=not head,
            out_indices=None if head else wanted,
            scan=dict(
                _SCAN,
                expand=given["expand"],
                state_dim=given["d_state"],
                conv_kernel=given["conv_size"],
                conv_bias=given["conv_bias"],
                bias=given["bias"],
            ),
        )


_OFFICIAL_KEYS = (
    (r"^backbone\.", ""),
    (r"^head\.fc\.", "head."),
    (r"^patch_embed\.stem\.0\.", "stem.convs.0.conv."),
    (r"^patch_embed\.stem\.1\.", "stem.convs.0.bn."),
    (r"^patch_embed\.projection\.", "stem.patches.conv."),
    (r"^layers\.", "stages."),
    (r"^(stages\.\d+)\.norm\.", r"\1.norm1."),
    (r"^(stages\.\d+)\.dw\.", r"\1.local."),
    (r"^(stages\.\d+)\.mamba\.", r"\1.mixer."),
    (r"^ln1\.", "norm."),
    (r"^pos_embed$", "pos_embed.rows"),
    (r"^norm_layer(\d+)\.", r"out_norms.\1."),
)
OFFICIAL_MIXER_KEYS = (
    (r"\.mixer\.conv2d\.", ".mixer.conv."),
    (r"\.mixer\.(x_proj|dt_proj)\.(weight|bias)$", r".mixer.core.\1_\2"),
    (r"\.mixer\.(A_log|D)$", r".mixer.core.\1"),
    (r"\.mixer\.direction_Bs$", ".mixer.core.direction_bias"),
)
"""Names inside the original mixer, which VCMamba took over, and inside `ContinuousScan`."""

_OFFICIAL_ARCHS: dict[str, dict[str, Any]] = {
    "L1": dict(embed_dims=192, num_layers=24, num_convs_patch_embed=1, layers_with_dwconv=[0]),
    "L2": dict(embed_dims=384, num_layers=24, num_convs_patch_embed=2, layers_with_dwconv=[]),
    "L3": dict(embed_dims=448, num_layers=36, num_convs_patch_embed=2, layers_with_dwconv=[]),
}
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    arch=None,
    img_size=224,
    patch_size=16,
    in_channels=3,
    embed_dims=192,
    num_layers=24,
    num_convs_patch_embed=1,
    layers_with_dwconv=[],
    d_state=16,
    expand=2,
    conv_size=7,
    use_rms_norm=False,
    bias=True,
    conv_bias=True,
    final_norm=True,
    out_indices=[-1],
    drop_path_rate=0.0,
    num_classes=1000,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plainmamba_l1": dict(dim=192, depth=24, stem_convs=1, local_blocks=(0,), drop_path_rate=0.2),
    "plainmamba_l2": dict(dim=384, depth=24, stem_convs=2, drop_path_rate=0.2),
    "plainmamba_l3": dict(dim=448, depth=36, stem_convs=2, drop_path_rate=0.4),
    "plainmamba_micro": dict(dim=32, depth=3, stem_convs=1, local_blocks=(0,)),
}


def _published(file: str, top1: float, ema: bool) -> dict[str, Any]:
    url = f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/{file}"
    names = dict(url=url, file=file, cached_as=f"plainmamba_{file}")
    return dict(names, top1_reported=top1, ema=ema, paper="arXiv:2403.17695")


PUBLISHED: dict[str, dict[str, Any]] = {
    "plainmamba_l1": _published("l1.pth", 77.9, ema=False),
    "plainmamba_l2": _published("l2.pth", 81.6, ema=True),
    "plainmamba_l3": _published("l3.pth", 82.3, ema=True),
}

PlainMamba.variants = VARIANTS
PlainMamba.published = PUBLISHED
globals().update(register_family(PlainMamba))

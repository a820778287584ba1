"""MSVM-UNet: VMamba as encoder, large-kernel patch expanding and blocks with multi-scale convolutions as decoder.

Paper: MSVM-UNet: Multi-Scale Vision Mamba UNet for Medical Image Segmentation, arXiv 2408.13735 (BIBM 2024).
Source: github.com/gndlwch2w/msvm-unet, commit abb1a8ed, model. No trained weights are published.

New in this family: blocks whose MLP has depthwise convolutions of several sizes (`MultiScaleMlp`), and patch expanding
with a depthwise convolution in front of the spreading (`LargeKernelExpanding`). The encoder is `vmamba_tiny_s1l8` or
`vmamba_small_s1l20`, whose stages' outputs are the skips.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..backbones.base import ScanBlock, resolve_scan, stage_widths
from ..backbones.family import register_family
from ..backbones.official import official_settings, rename
from ..backbones.vmamba import VMamba, convert_mixers, official_scan
from ..layers import LargeKernelExpanding, MultiScaleMlp, get_norm
from ..registry import suggest
from .base import ConcatStage, UNet, falling_drop_path_rates

_STRIDE = 4
_KERNEL_SIZES = (1, 3, 5)


class MultiScaleBlock(ScanBlock):
    """`ScanBlock` with a `MultiScaleMlp`: MSVM-UNet's MSVSS block."""

    def __init__(
        self,
        dim: int,
        scan: dict | Literal[False],
        *,
        mlp_ratio: float = 4.0,
        kernel_sizes: Sequence[int] = _KERNEL_SIZES,
        drop_path: float = 0.0,
    ):
        super().__init__(dim, scan, mlp_ratio=0.0, drop_path=drop_path)
        self.norm2 = get_norm("layer", dim)
        self.mlp = MultiScaleMlp(dim, int(dim * mlp_ratio), kernel_sizes)


class MSVMUNet(UNet):
    """MSVM-UNet of any size and scan.

    Args:
        depths: blocks per stage of the encoder.
        decoder_depths: blocks per level of the decoder, coarsest first; one level fewer than stages.
        dims: width of each stage, or of the first one (doubled from stage to stage); the decoder mirrors them.
        scan: strategy of all blocks, or options that replace some of the variant's own (see `resolve_scan`).
        mlp_ratio: hidden width of all MLPs over the width of the block.
        kernel_sizes: of the convolutions in the decoder's MLPs.
        drop_path_rate: stochastic depth of the encoder's last block; earlier ones rise to it linearly.
        decoder_drop_path_rate: that of the decoder's first block; later ones fall from it linearly.
        **common: num_classes, in_chans, deep_supervision; see `UNet`.
    """

    family = "msvmunet"
    default_scan: ClassVar[dict[str, Any]] = VMamba.default_scan
    """Strategy and options of the blocks, of which a dict without a type replaces some."""

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        decoder_depths: Sequence[int] = (2, 2, 2),
        dims: int | Sequence[int] = 96,
        scan: str | dict | Literal[False] | None = None,
        mlp_ratio: float = 4.0,
        kernel_sizes: Sequence[int] = _KERNEL_SIZES,
        drop_path_rate: float = 0.2,
        decoder_drop_path_rate: float = 0.2,
        **common: Any,
    ):
        super().__init__(**common)
        if len(decoder_depths) != len(depths) - 1:
            raise ValueError(
                f"decoder_depths has one entry fewer than depths, got {tuple(decoder_depths)} for {tuple(depths)}"
            )
        widths = stage_widths(dims, depths)
        spec = resolve_scan(scan, self.default_scan)
        self.encoder = VMamba(
            depths=depths,
            dims=widths,
            scan=spec,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            in_chans=self.in_chans,
            features_only=True,
            out_norm=False,
        )
        widths = widths[::-1]
        levels = []
        for wide, dim, rates in zip(
            widths, widths[1:], falling_drop_path_rates(decoder_drop_path_rate, decoder_depths), strict=False
        ):
            blocks = [
                MultiScaleBlock(dim, spec, mlp_ratio=mlp_ratio, kernel_sizes=kernel_sizes, drop_path=rate)
                for rate in rates
            ]
            levels.append(ConcatStage(blocks, LargeKernelExpanding(wide, dim), nn.Linear(2 * dim, dim)))
        self.decoder = nn.ModuleList(levels)
        self.expand = LargeKernelExpanding(widths[-1], widths[-1], _STRIDE)
        self.finish(widths[1:], [info["reduction"] for info in self.encoder.out_info[-2::-1]], widths[-1])

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.encoder.forward_stages(x)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        keys = {key.removeprefix("_model.") for key in keys}
        return "decoder.layers.0.concat_layer.weight" in keys or "decoder.0.blocks.0.mlp.convs.0.weight" in keys

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("encoder.stages.") for key in state_dict):
            return dict(state_dict)
        renamed = {rename(key, _OFFICIAL_KEYS): value for key, value in state_dict.items()}
        for key, value in renamed.items():
            if key.endswith(("fuse.weight", ".scores.weight", "expand.expand.weight")):
                renamed[key] = value.flatten(1)  # of a 1x1 convolution
        return convert_mixers(renamed)

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("MSVM-UNet", config, _OFFICIAL_DEFAULTS)
        encoder = given["enc_name"]
        if encoder not in _OFFICIAL_ENCODERS:
            raise ValueError(f"unknown enc_name {encoder!r}.{suggest(str(encoder), _OFFICIAL_ENCODERS)}")
        settings = _OFFICIAL_ENCODERS[encoder]
        return dict(
            num_classes=given["num_classes"],
            depths=list(given["depths"] or settings["depths"]),
            decoder_depths=list(given["decoder_depths"]),
            dims=stage_widths(given["dims"], given["depths"] or settings["depths"]),
            drop_path_rate=settings["drop_path_rate"],
            mlp_ratio=given["mlp_ratio"],
            kernel_sizes=tuple(given["kernel_sizes"]),
            scan=official_scan(
                given["forward_type"],
                expand=given["ssm_ratio"],
                state_dim=given["ssm_d_state"],
                conv_bias=given["ssm_conv_bias"],
            ),
        )


_OFFICIAL_KEYS = (
    (r"^_model\.", ""),  # of the original's training code
    (r"^encoder\.layer0\.0\.", "encoder.stem.conv1."),
    (r"^encoder\.layer0\.2\.", "encoder.stem.norm1."),
    (r"^encoder\.layer1\.0\.", "encoder.stem.conv2."),
    (r"^encoder\.layer1\.2\.", "encoder.stem.norm2."),
    (r"^encoder\.downsamples\.(\d+)\.1\.", lambda match: f"encoder.stages.{int(match[1]) + 1}.downsample.conv."),
    (r"^encoder\.downsamples\.(\d+)\.3\.", lambda match: f"encoder.stages.{int(match[1]) + 1}.downsample.norm."),
    (r"^encoder\.layers\.", "encoder.stages."),
    (r"^decoder\.layers\.(\d+)\.up\.", r"decoder.\1.expand."),
    (r"^decoder\.layers\.(\d+)\.concat_layer\.", r"decoder.\1.fuse."),
    (r"^decoder\.layers\.(\d+)\.vss_layer\.", r"decoder.\1."),
    (r"^decoder\.out_layers\.0\.out\.", "head.scores."),
    (r"^decoder\.out_layers\.0\.", "expand."),
    (r"((?:^|\.)expand)\.expand\.0\.", r"\1.expand."),
    (r"((?:^|\.)expand)\.expand\.1\.", r"\1.expand_norm."),
    (r"((?:^|\.)expand)\.expand\.3\.", r"\1.conv."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(\.blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"\.multiscale_conv\.dw_convs\.", ".convs."),
)
_OFFICIAL_ENCODERS: dict[str, dict[str, Any]] = {
    "tiny_0230s": dict(depths=(2, 2, 8, 2), drop_path_rate=0.2),
    "small_0229s": dict(depths=(2, 2, 20, 2), drop_path_rate=0.3),
}
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    num_classes=9,
    enc_name="tiny_0230s",
    dims=[96, 192, 384, 768],
    depths=None,
    decoder_depths=[2, 2, 2],
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type="v05_noz",
    mlp_ratio=4.0,
    ssm_conv_bias=False,
    kernel_sizes=_KERNEL_SIZES,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "msvmunet_tiny": dict(_OFFICIAL_ENCODERS["tiny_0230s"], num_classes=9),
    "msvmunet_small": dict(_OFFICIAL_ENCODERS["small_0229s"], num_classes=9),
    "msvmunet_micro": dict(
        num_classes=1,
        depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1),
        dims=16,
        drop_path_rate=0.0,
        decoder_drop_path_rate=0.0,
    ),
}

MSVMUNet.variants = VARIANTS
MSVMUNet.published = {
    "msvmunet_tiny": dict(encoder_weights="vmamba_tiny_s1l8"),
    "msvmunet_small": dict(encoder_weights="vmamba_small_s1l20"),
}
globals().update(register_family(MSVMUNet))

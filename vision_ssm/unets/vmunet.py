"""VM-UNet: a U-Net of VMamba's first blocks, in the encoder and in the decoder.

Paper: VM-UNet: Vision Mamba UNet for Medical Image Segmentation, arXiv 2402.02491.
Source: github.com/JCruan519/VM-UNet (Apache-2.0), commit 43c495bf, models/vmunet.

The encoder is VMamba's first version without its classifier. A skip is the input of a stage, not its output, and is
added at its own resolution in front of the patch expanding; the finest skip is not used. The original applies a sigmoid
inside the model where there is one class; here scores are raw.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch

from ..backbones.base import ScanBlock, resolve_scan, stage_widths
from ..backbones.family import register_family
from ..backbones.official import official_settings, rename
from ..backbones.vmamba import VMamba, convert_mixers
from ..layers import PatchExpanding
from ..weights import LoadReport
from .base import AddStage, UNet, falling_drop_path_rates

_PATCH_SIZE = 4


def has_form(keys: set[str]) -> bool:
    """Whether these are keys of VM-UNet or of a net with other scans in its place, official or ours."""
    ours = {"encoder.stem.conv.weight", "expand.expand.weight", "decoder.1.expand.expand.weight"} <= keys
    fused = any(".fuse." in key for key in keys)
    return any(key.removeprefix("vmunet.").startswith("layers_up.") for key in keys) or (ours and not fused)


def has_heads(keys: set[str]) -> bool:
    """Whether these are keys of multi-head scans, official or ours."""
    return any(".mhs." in key or ".mixer.head_proj." in key for key in keys)


class VMUNet(UNet):
    """VM-UNet of any size and scan.

    Args:
        depths: blocks per stage of the encoder.
        decoder_depths: blocks per level of the decoder, coarsest first.
        dims: width of each stage, or of the first one (doubled from stage to stage); the decoder mirrors them.
        scan: strategy of all blocks, or options that replace some of the variant's own (see `resolve_scan`).
        drop_path_rate: stochastic depth; it rises to this over the encoder's blocks, and falls from it over the
            decoder's.
        **common: num_classes, in_chans, deep_supervision; see `UNet`.
    """

    family = "vmunet"
    default_scan: ClassVar[dict[str, Any]] = dict(type="multi_direction", expand=2.0, state_dim=16)
    """Strategy and options of the blocks, of which a dict without a type replaces some."""
    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        dims: int | Sequence[int] = 96,
        scan: str | dict | Literal[False] | None = None,
        drop_path_rate: float = 0.2,
        **common: Any,
    ):
        super().__init__(**common)
        if len(decoder_depths) != len(depths):
            raise ValueError(f"decoder_depths has one entry per stage, got {tuple(decoder_depths)} for {tuple(depths)}")
        widths = stage_widths(dims, depths)
        spec = resolve_scan(scan, self.default_scan)
        self.encoder = VMamba(
            depths=depths,
            dims=widths,
            scan=spec,
            stem="patch",
            patch_size=_PATCH_SIZE,
            downsample="merge",
            mlp_ratio=0.0,
            drop_path_rate=drop_path_rate,
            in_chans=self.in_chans,
            features_only=True,
            out_norm=False,
        )
        widths = widths[::-1]
        levels = []
        for j, rates in enumerate(falling_drop_path_rates(drop_path_rate, decoder_depths)):
            blocks = [ScanBlock(widths[j], spec, mlp_ratio=0.0, drop_path=rate) for rate in rates]
            levels.append(AddStage(blocks, PatchExpanding(widths[j - 1], widths[j]) if j else None))
        self.decoder = torch.nn.ModuleList(levels)
        head_dim = widths[-1] // _PATCH_SIZE
        self.expand = PatchExpanding(widths[-1], head_dim, _PATCH_SIZE)
        self.decoder.apply(VMamba._init_weights)
        self.expand.apply(VMamba._init_weights)
        self.finish(widths, [info["reduction"] for info in self.encoder.out_info[::-1]], head_dim)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: padded images. Returns the inputs of all stages and the output of the last one, each (B, H', W', C)."""
        x, maps = self.encoder.stem(x), []
        for stage in self.encoder.stages:
            x = stage.downsample(x)
            maps.append(x)
            x = stage.forward_blocks(x)
        return [*maps, x]

    def decode(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: those of `encode`, of which the first is not used."""
        first = self.decoder[0](maps[-1])
        outputs = [first]
        for level, skip in zip(self.decoder[1:], maps[-2:0:-1], strict=True):
            outputs.append(level(outputs[-1], skip))
        return outputs

    def load_mirrored(self, tensors: Mapping[str, torch.Tensor], report: LoadReport) -> None:
        """Blocks of stage i go to level 3 - i of the decoder, as in the original; blocks that the weights do not have
        stay as they are."""
        last = len(self.decoder) - 1
        for j, level in enumerate(self.decoder):
            for name, target in level.blocks.state_dict().items():
                ours, theirs = f"decoder.{j}.blocks.{name}", f"stages.{last - j}.blocks.{name}"
                if theirs in tensors and tensors[theirs].shape == target.shape:
                    target.copy_(tensors[theirs])  # state dicts share memory with their modules
                    report.loaded.append(ours)
                else:
                    report.ignored.setdefault("decoder block that the file does not have, as it was", []).append(ours)

    @staticmethod
    def convert_scans(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Original parameters of the scans under our names; other entries are kept."""
        return convert_mixers(state_dict)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return has_form(keys) and not has_heads(keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(key.startswith("encoder.stages.") for key in state_dict):
            return dict(state_dict)
        renamed = cls.convert_scans({rename(key, _OFFICIAL_KEYS): value for key, value in state_dict.items()})
        if "head.scores.weight" in renamed:
            renamed["head.scores.weight"] = renamed["head.scores.weight"].flatten(1)  # of a 1x1 convolution
        return renamed

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("VM-UNet", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        return dict(cls.official_sizes(given), scan=dict(cls.default_scan, state_dim=given["d_state"]))

    @staticmethod
    def official_sizes(given: dict[str, Any]) -> dict[str, Any]:
        """Constructor keywords for the hyperparameters that VM-UNet and its descendants share."""
        dims = stage_widths(given["dims"], given["depths"])
        if list(given["dims_decoder"]) != dims[::-1]:
            raise ValueError(f"dims_decoder must be dims reversed, got {given['dims_decoder']} for {given['dims']}")
        return dict(
            num_classes=given["num_classes"],
            in_chans=given["input_channels"],
            depths=list(given["depths"]),
            decoder_depths=list(given["depths_decoder"]),
            dims=dims,
            drop_path_rate=given["drop_path_rate"],
        )


_OFFICIAL_KEYS = (
    (r"^vmunet\.", ""),
    (r"^patch_embed\.proj\.", "encoder.stem.conv."),
    (r"^patch_embed\.norm\.", "encoder.stem.norm."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"encoder.stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "encoder.stages."),
    (r"^layers_up\.(\d+)\.upsample\.", r"decoder.\1.expand."),
    (r"^layers_up\.", "decoder."),
    (r"^final_up\.", "expand."),
    (r"^final_conv\.", "head.scores."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.self_attention\.", ".mixer."),
)
_WITHOUT_EFFECT = {"load_ckpt_path"}  # of the original's hyperparameters, on what the weights compute
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    num_classes=1,
    input_channels=3,
    depths=[2, 2, 9, 2],
    depths_decoder=[2, 9, 2, 2],
    dims=[96, 192, 384, 768],
    dims_decoder=[768, 384, 192, 96],
    d_state=16,
    drop_path_rate=0.2,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vmunet_isic": dict(num_classes=1),
    "vmunet_synapse": dict(num_classes=9),
    "vmunet_default": dict(num_classes=1, depths=(2, 2, 9, 2), decoder_depths=(2, 9, 2, 2)),
    "vmunet_micro": dict(
        num_classes=1,
        depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1),
        dims=24,
        scan={**VMUNet.default_scan, "expand": 1.0, "state_dim": 2},
        drop_path_rate=0.0,
    ),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "vmunet_isic": dict(input_size=(3, 256, 256), encoder_weights="vanilla_vmamba_small"),
    "vmunet_synapse": dict(input_size=(3, 224, 224), encoder_weights="vanilla_vmamba_small"),
    "vmunet_default": dict(input_size=(3, 256, 256), encoder_weights="vanilla_vmamba_small"),
}

VMUNet.variants = VARIANTS
VMUNet.published = PUBLISHED
globals().update(register_family(VMUNet))

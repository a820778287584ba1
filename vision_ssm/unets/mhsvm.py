"""MHS-VM: VM-UNet with multi-head scans.

Paper: MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, arXiv 2406.05992.
Source: github.com/PixDeep/MHS-VM, commit be64b6fa, models/vmunet. No trained weights are published.

New in this family: the scan, here `MultiHeadScan`, whose heads walk routes of different shapes in their own channels.
The original reads its routes from a file made for one image size; here they are computed for any. The threshold of the
route attention is no parameter: `mhsvm_4h` has the one of ISIC18, `mhsvm_4h_isic17` that of ISIC17.
"""

from typing import Any

from ..backbones.family import register_family
from ..backbones.official import official_settings
from ..scans.multi_head import convert_multi_heads
from .vmunet import VMUNet, has_form, has_heads

_HEADS = ("snake_pair", "diagonal_pair", "spiral_pair", "raster_pair")


class MHSVM(VMUNet):
    """MHS-VM: `VMUNet`, with all its keywords, and `MultiHeadScan` in its blocks.

    ``scan=dict(threshold=0.4)``, say, changes the threshold of the route attention alone.
    """

    family = "mhsvm"
    default_scan = dict(type="multi_head", heads=_HEADS, state_dim=16, threshold=0.0)
    convert_scans = staticmethod(convert_multi_heads)

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return has_form(keys) and has_heads(keys)

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings("MHS-VM", config, _OFFICIAL_DEFAULTS, _WITHOUT_EFFECT)
        scan = dict(
            cls.default_scan,
            heads=_HEADS[: given["head_num"]],
            state_dim=given["d_state"],
            threshold=given["gfu_t"],
            mix=given["with_proj"],
        )
        return dict(cls.official_sizes(given), scan=scan)


_WITHOUT_EFFECT = {"load_ckpt_path"}  # of the original's hyperparameters, on what the weights compute
_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    num_classes=1,
    input_channels=3,
    depths=[2, 2, 2, 2],
    depths_decoder=[2, 2, 2, 1],
    dims=[96, 192, 384, 768],
    dims_decoder=[768, 384, 192, 96],
    d_state=16,
    drop_path_rate=0.2,
    head_num=3,
    gfu_t=0.0,
    with_proj=True,
)


def _scan(**options: Any) -> dict[str, Any]:
    return dict(scan={**MHSVM.default_scan, **options})


VARIANTS: dict[str, dict[str, Any]] = {
    "mhsvm_4h": dict(num_classes=1, **_scan(threshold=0.5)),
    "mhsvm_4h_isic17": dict(num_classes=1, **_scan()),
    "mhsvm_4h_unmixed": dict(num_classes=1, **_scan(threshold=0.5, mix=False)),
    "mhsvm_3h": dict(num_classes=1, **_scan(heads=_HEADS[:3])),
    "mhsvm_micro": dict(
        num_classes=1,
        depths=(1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1),
        dims=24,
        drop_path_rate=0.0,
        **_scan(state_dim=2),
    ),
}

MHSVM.variants = VARIANTS
MHSVM.published = {name: dict(input_size=(3, 256, 256)) for name in VARIANTS if name != "mhsvm_micro"}
globals().update(register_family(MHSVM))

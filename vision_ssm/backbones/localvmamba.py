"""LocalVMamba: four-stage backbone whose blocks scan rows, columns and windows of the map, in searched directions.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv 2403.09338.
Source: github.com/hunto/LocalMamba (Apache-2.0), commit 75e5d1f0, classification/lib/models/local_vmamba.py. Weights:
see `PUBLISHED`. The plain LocalVim of the same family is in localvim.py.

New in this family: `WindowedScan` as a token mixer, with directions of its own in every block. The rest is the first
version of VMamba: patches of 4 x 4, patch merging between stages, blocks without an MLP.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..layers import PatchMerging, PatchStem
from ..scans.windowed import FIXED
from .base import Backbone, ScanBlock, Stage, drop_path_rates, register_family, resolve_scan, stage_widths
from .localmamba import (
    WITHOUT_EFFECT,
    Directions,
    convert_gates,
    official_directions,
    published,
    scans_of_blocks,
    searched_directions,
)
from .official import official_settings
from .vmamba import VMamba

_SCAN = dict(type="windowed", expand=2.0, state_dim=16)


class LocalVMamba(Backbone):
    """LocalVMamba of any size and switch.

    Args:
        depths: blocks per stage.
        dims: width of each stage, or of the first one (doubled from stage to stage).
        directions: of the scan, see `Directions` and `WindowedScan`; lists for each block count through all stages.
        scan: strategy of the blocks, or options that replace some of the variant's own (see `resolve_scan`);
            False leaves the mixers out.
        patch_size: side of a patch.
        remainder: ``"pad"`` keeps every pixel of sizes that a patch does not divide, ``"drop"`` cuts the rest off as
            the original does.
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
        **common: in_chans, num_classes, features_only, out_indices, out_norm, drop_rate; see `Backbone`.
    """

    family = "localmamba"

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        directions: Directions = FIXED,
        scan: str | dict | Literal[False] | None = None,
        patch_size: int = 4,
        remainder: str = "pad",
        drop_path_rate: float = 0.0,
        **common: Any,
    ):
        super().__init__(**common)
        dims = stage_widths(dims, depths)
        self.stem = PatchStem(self.in_chans, dims[0], patch_size, remainder=remainder)
        scans = iter(scans_of_blocks(resolve_scan(scan, _SCAN), directions, sum(depths)))
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = [ScanBlock(dims[i], next(scans), mlp_ratio=0.0, drop_path=rate) for rate in rates]
            self.stages.append(Stage(blocks, PatchMerging(dims[i - 1], dims[i]) if i else None))
        self.finish(dims, [patch_size * 2**i for i in range(len(depths))])

    @classmethod
    def recognises(cls, keys: set[str]) -> bool:
        return any(_BLOCK_KEY.match(key) for key in keys)

    @classmethod
    def official_keys(cls, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert_gates(VMamba.official_keys(state_dict))

    @classmethod
    def from_official_config(cls, config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
        given = official_settings(cls.__name__, config, _OFFICIAL_DEFAULTS, WITHOUT_EFFECT)
        if given["ssm_act_layer"] != "silu":
            raise ValueError(f"ssm_act_layer of an original LocalVMamba is 'silu', got {given['ssm_act_layer']!r}")
        dense = not any(key.startswith("classifier.") for key in keys)
        return dict(
            depths=given["depths"],
            dims=stage_widths(given["dims"], given["depths"]),
            directions=official_directions(given["directions"]),
            scan=dict(
                expand=given["ssm_ratio"],
                state_dim=given["ssm_d_state"],
                dt_rank=given["ssm_dt_rank"],
                conv_kernel=given["ssm_conv"],
                conv_bias=given["ssm_conv_bias"],
                inverse="official",
            ),
            patch_size=given["patch_size"],
            remainder="drop",
            drop_path_rate=given["drop_path_rate"],
            in_chans=given["in_chans"],
            num_classes=given["num_classes"] if "classifier.head.weight" in keys else 0,
            features_only=dense,
            out_indices=given["out_indices"] if dense else None,
            out_norm=any(key.startswith("outnorm") for key in keys),
        )


_BLOCK_KEY = re.compile(r"layers\.\d+\.blocks\.\d+\.op\.multi_scan\.|stages\.\d+\.blocks\.\d+\.mixer\.core\.gate\.")

_OFFICIAL_DEFAULTS: dict[str, Any] = dict(
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    ssm_d_state=16,
    ssm_ratio=2.0,
    ssm_dt_rank="auto",
    ssm_act_layer="silu",
    ssm_conv=3,
    ssm_conv_bias=True,
    directions=None,
    drop_path_rate=0.2,
    out_indices=(0, 1, 2, 3),
)

_SEARCHED_TINY = searched_directions(
    "h h_flip w7 w7_flip",
    "h_flip v_flip w2 w2_flip",
    "h_flip v_flip w2_flip w7",
    "h_flip v v_flip w2",
    "h h_flip v_flip w2_flip",
    "h_flip v_flip w2 w2_flip",
    "h w2_flip w7 w7_flip",
    "h h_flip v v_flip",
    "h v_flip w7 w7_flip",
    "h_flip v w2 w7_flip",
    "v v_flip w2 w7_flip",
    "h h_flip v_flip w2_flip",
    "v_flip w2_flip w7 w7_flip",
    "h_flip v_flip w2_flip w7_flip",
    "h_flip v w7 w7_flip",
)
_SEARCHED_SMALL = searched_directions(
    "h v v_flip w7_flip",
    "h h_flip v w7",
    "h_flip v v_flip w7",
    *["h_flip v w2_flip w7"] * 2,
    "h_flip v_flip w2 w7_flip",
    "h_flip v v_flip w7",
    *["h v v_flip w7"] * 2,
    "h v v_flip w7_flip",
    "h h_flip v v_flip",
    "h v v_flip w2",
    "v v_flip w2_flip w7",
    "h h_flip v w2",
    "h_flip v v_flip w7_flip",
    "h h_flip v v_flip",
    *["h v v_flip w7_flip"] * 2,
    "h h_flip v_flip w7",
    "h_flip v_flip w2_flip w7",
    "h_flip v v_flip w7_flip",
    "v v_flip w7 w7_flip",
    "h v v_flip w7_flip",
    "h_flip v v_flip w2",
    "h v v_flip w2_flip",
    "h h_flip v w7",
    "h h_flip w7 w7_flip",
    "h v_flip w2 w2_flip",
    "h v_flip w2 w7",
    "h v v_flip w7_flip",
    "h_flip v w2_flip w7",
    "h_flip v_flip w7 w7_flip",
    "h v w7 w7_flip",
)

VARIANTS: dict[str, dict[str, Any]] = {
    "localvmamba_tiny": dict(scan=_SCAN, directions=_SEARCHED_TINY, drop_path_rate=0.2),
    "localvmamba_small": dict(scan=_SCAN, depths=(2, 2, 27, 2), directions=_SEARCHED_SMALL, drop_path_rate=0.2),
    "localvmamba_micro": dict(
        scan=_SCAN,
        depths=(1, 1, 1, 1),
        dims=(16, 32, 48, 64),
        directions=searched_directions(
            "h h_flip w7 w7_flip", "h_flip v_flip w2 w2_flip", "h_flip v v_flip w2", "h w2_flip w7 w7_flip"
        ),
    ),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "localvmamba_tiny": published(82.7),  # the weights were withdrawn
    "localvmamba_small": published(83.7, "local_vssm_small.ckpt"),
}

LocalVMamba.variants = VARIANTS
LocalVMamba.published = PUBLISHED
globals().update(register_family(LocalVMamba))

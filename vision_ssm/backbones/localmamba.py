"""What the plain LocalVim and the hierarchical LocalVMamba share: directions of blocks, and the originals' names.

Paper: LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv 2403.09338.
Source: github.com/hunto/LocalMamba (Apache-2.0), commit 75e5d1f0. The models are in localvim.py and localvmamba.py.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..registry import SCANS
from ..scans.windowed import WindowedScan, WindowedSequenceScan
from .official import rename

Directions = Sequence[str] | Sequence[Sequence[str]] | None
"""One list of directions for all blocks, one list for each block, or None: a search among all."""


def scans_of_blocks(
    spec: dict[str, Any] | Literal[False], directions: Directions, depth: int
) -> list[dict[str, Any] | Literal[False]]:
    """The scan of every block. Directions are those of the blocks, where `spec` is a windowed scan and names none.

    Raises:
        ValueError: a list for each block, but not as many as blocks.
    """
    own = (WindowedScan, WindowedSequenceScan)
    if spec is False or "directions" in spec or SCANS.module_dict.get(spec["type"], spec["type"]) not in own:
        return [spec] * depth
    if directions is None or all(isinstance(direction, str) for direction in directions):
        return [{**spec, "directions": directions}] * depth
    if len(directions) != depth:
        raise ValueError(f"directions are given for {len(directions)} blocks, but the model has {depth}")
    return [{**spec, "directions": chosen} for chosen in directions]


_WALKS = {"h": "raster", "v": "column"}
_CODE = re.compile(r"(?:(h|v)|w([1-9]\d*))(_flip)?")


def official_directions(codes: Sequence[Any] | None) -> Any:
    """Our names for the originals' codes (``h``, ``v``, ``w7``, each with or without ``_flip``), in lists of any depth.

    Raises:
        ValueError: a code that the originals do not know.
    """
    if codes is None:
        return None
    names = []
    for code in codes:
        if not isinstance(code, str):
            names.append(official_directions(code))
            continue
        match = _CODE.fullmatch(code)
        if match is None:
            raise ValueError(
                f"unknown direction {code!r} of an original LocalMamba: h, v or w7 and the like, or h_flip"
            )
        walk = _WALKS[match[1]] if match[1] else f"window{match[2]}"
        names.append(f"{walk}_reversed" if match[3] else walk)
    return tuple(names)


def searched_directions(*blocks: str) -> tuple[tuple[str, ...], ...]:
    """Directions of all blocks from the originals' codes, one string per block."""
    return official_directions([codes.split() for codes in blocks])


_GATE_KEYS = (
    (r"\.mixer\.(?:multi_scan\.)?attn\.norm\.", ".mixer.core.gate.norm."),
    (r"\.mixer\.(?:multi_scan\.)?attn\.global_reduce\.", ".mixer.core.gate.reduce."),
    (r"\.mixer\.(?:multi_scan\.)?attn\.channel_select\.", ".mixer.core.gate.expand."),
    (r"\.mixer\.multi_scan\.weights$", ".mixer.core.direction_weights"),
)


def convert_gates(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names of channel gates and weights of a search as `WindowedCore` has them; other entries are kept."""
    converted = {}
    for key, value in state_dict.items():
        key = rename(key, _GATE_KEYS)
        converted[key] = value.flatten() if key.endswith(".direction_weights") else value
    return converted


# of the originals' hyperparameters: these change nothing, or nothing that the state dict does not say
WITHOUT_EFFECT = {
    *("use_checkpoint", "pretrained", "residual_in_fp32", "fused_add_norm"),
    *("if_abs_pos_embed", "if_cls_token", "bimamba_type", "ssm_simple_init", "mlp_ratio", "mlp_act_layer"),
    *("patch_norm", "drop_rate", "ssm_drop_rate", "mlp_drop_rate", "initializer_cfg", "device", "dtype"),
}


_PAPER = dict(license="apache-2.0", paper="arXiv:2403.09338")
_RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"


def published(top1: float, file: str | None = None) -> dict[str, Any]:
    """Entry of a table of published weights: the reported accuracy and, where they are published, the weights."""
    origin = {} if file is None else dict(url=f"{_RELEASE}/{file}", file=file)
    return dict(_PAPER, top1_reported=top1, **origin)

"""GPU kernels. Imported as ``vision_ssm.kernels`` and called by `vision_ssm.ops` alone.

Importing this package imports neither Triton nor a kernel and does not touch a GPU.
"""

import importlib
from typing import Any

# Operator -> module of this package with the functions `forward` and `backward`, see `vision_ssm.ops.registration`.
MODULES: dict[str, str] = {
    "scan_2d": "scan_2d",
    "selective_scan": "selective_scan",
    "ssd": "ssd",
    "layer_norm": "layer_norm",
    "depthwise_conv": "depthwise_conv",
    "state_fusion": "state_fusion",
    "dcnv4": "dcnv4",
    "plstm2d": "plstm",
}


def find(op: str) -> Any | None:
    """The kernel module of operator `op`, imported now, or None if there is none."""
    name = MODULES.get(op)
    return None if name is None else importlib.import_module(f"{__name__}.{name}")

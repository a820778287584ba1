"""Differentiable operators, independent of the device: each with a reference twin that defines it."""

from .backend import Backend, select_backend
from .depthwise_conv import depthwise_conv
from .layer_norm import layer_norm
from .local_selective_scan import local_selective_scan
from .scan_2d import scan_2d
from .selective_scan import selective_scan
from .ssd import ssd

__all__ = [
    "Backend",
    "depthwise_conv",
    "layer_norm",
    "local_selective_scan",
    "scan_2d",
    "select_backend",
    "selective_scan",
    "ssd",
]

"""Differentiable operators, independent of the device: each with a reference twin that defines it."""

from .backend import Backend, select_backend
from .dcnv4 import dcnv4
from .depthwise_conv import depthwise_conv
from .hidden_state_mixer import hidden_state_mixer
from .layer_norm import layer_norm
from .local_selective_scan import local_selective_scan
from .noncausal_ssd import noncausal_ssd
from .plstm import plstm2d
from .scan_2d import scan_2d
from .selective_scan import selective_scan
from .ssd import ssd
from .state_fusion import state_fusion

__all__ = [
    "Backend",
    "dcnv4",
    "depthwise_conv",
    "hidden_state_mixer",
    "layer_norm",
    "local_selective_scan",
    "noncausal_ssd",
    "plstm2d",
    "scan_2d",
    "select_backend",
    "selective_scan",
    "ssd",
    "state_fusion",
]

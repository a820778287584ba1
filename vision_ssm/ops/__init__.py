"""Differentiable operators, independent of the device: each with a reference twin that defines it."""

from .backend import Backend, select_backend
from .scan_2d import scan_2d
from .selective_scan import selective_scan
from .ssd import ssd

__all__ = ["Backend", "scan_2d", "select_backend", "selective_scan", "ssd"]

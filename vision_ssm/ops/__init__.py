"""Differentiable operators, independent of the device."""
from .backend import Backend, select_backend
from .reference import scan_2d_reference as scan_2d
from .reference import selective_scan_reference as selective_scan
from .reference import ssd_reference as ssd

__all__ = ["Backend", "scan_2d", "select_backend", "selective_scan", "ssd"]

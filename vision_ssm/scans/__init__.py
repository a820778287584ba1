"""The registry of 2D scan strategies: token mixers from (B, H, W, C) to (B, H, W, C).

Every module of this folder registers its strategies when it is imported; a new strategy is one new file.
"""

import importlib
import inspect
import pkgutil

from torch import nn

from ..registry import SCANS, build
from .routes import Routes, RouteTable, build_routes, describe_routes, list_routes

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .multi_direction import MultiDirectionScan  # noqa: E402  (after discovery, which finds it like any other)

__all__ = [
    "MultiDirectionScan",
    "RouteTable",
    "Routes",
    "build_routes",
    "build_scan",
    "describe_routes",
    "describe_scan",
    "list_routes",
    "list_scans",
]


def build_scan(spec: str | dict, dim: int, **defaults) -> nn.Module:
    """A token mixer of width `dim` from a strategy's name or from ``dict(type=name, **options)``."""
    return build(SCANS, spec, dim, **defaults)


def list_scans() -> list[str]:
    """Names of all scan strategies."""
    return sorted(name for name in SCANS.module_dict if name == name.lower())


def describe_scan(name: str) -> str:
    """First line of a strategy's documentation."""
    return (inspect.getdoc(SCANS.module_dict[name]) or "").splitlines()[0]

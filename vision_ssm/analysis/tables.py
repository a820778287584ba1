"""Markdown tables made from the registries, so that no page can disagree with the code."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..backbones.base import Backbone
from ..factory import create_model, find_family, list_models
from ..registry import SCANS
from ..scans import build_routes, describe_routes, describe_scan, list_routes, list_scans
from .macs import count_macs


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *rows)]
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.1f} {letter}"
    return f"{count / 1e3:.0f} k"


def model_table() -> str:
    """Every variant: input size, parameters, multiply-accumulates, the reported top-1, and where its weights are."""
    rows = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        published = find_family(name).published.get(name, {})
        file = published.get("file", "download page")
        weights = f"[{file}]({published['url']})" if "url" in published else "none published"
        top1 = str(published.get("top1_reported", "-"))
        height, width = model.pretrained_cfg["input_size"][1:]
        side = str(height) if height == width else f"{height} x {width}"
        macs = count_macs(partial(create_model, name), (height, width))
        rows.append((f"`{name}`", model.family, side, _size(parameters), _size(macs), top1, weights))
    headings = (
        *("model", "family", "input size", "parameters", "MACs"),
        *("ImageNet top-1, reported by the paper", "official weights"),
    )
    return _table(headings, rows)


def _strategies(model: Backbone) -> set[type]:
    return {type(mixer) for module in model.modules() if isinstance(mixer := getattr(module, "mixer", None), nn.Module)}


def pair_table() -> str:
    """Every family with every scan strategy: its own, another, another with pooling in place of class tokens, or none.

    Under the table stands why a pair was refused.
    """
    scans, rows, refused = list_scans(), [], []
    for name in list_models("*_micro"):
        with torch.device("meta"):
            own = create_model(name)
        cells = []
        for scan in scans:
            try:
                with torch.device("meta"):
                    model = create_model(name, scan=scan)
            except ValueError as error:
                cells.append("no")
                refused.append(f"`{name}` with `{scan}`: {error}")
                continue
            if SCANS.module_dict[scan] in _strategies(own):
                cells.append("own")
            elif getattr(own, "class_tokens", "none") != getattr(model, "class_tokens", "none"):
                cells.append("pools")
            else:
                cells.append("yes")
        rows.append((f"`{name}`", *cells))
    table = _table(("model", *(f"`{scan}`" for scan in scans)), rows)
    return "\n\n".join([table, *refused])


def scan_table() -> str:
    """Every scan strategy with the first line of its documentation."""
    return _table(("scan", "what it is"), [(f"`{name}`", describe_scan(name)) for name in list_scans()])


def route_table() -> str:
    """Every route family with its number of routes and the first line of its documentation."""
    rows = []
    for name in list_routes():
        count = "any" if name == "compose" else str(build_routes(name).num_routes)
        rows.append((f"`{name}`", count, describe_routes(name)))
    return _table(("routes", "number", "what they are"), rows)


_TABLES: dict[str, Callable[[], str]] = {
    "models": model_table,
    "scans": scan_table,
    "routes": route_table,
    "pairs": pair_table,
}


def fill_tables(page: str) -> str:
    """`page` with what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` replaced by that table.

    Raises:
        KeyError: a table that nothing generates.
    """

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{_TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)

"""Markdown tables made from the registries, so that no page can disagree with the code."""

import re
from collections.abc import Callable, Sequence

import torch

from ..factory import create_model, find_family, list_models
from ..scans import build_routes, describe_routes, describe_scan, list_routes, list_scans


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *rows)]
    return "\n".join(lines)


def model_table() -> str:
    """Every variant: family, parameters, the top-1 its authors report, and where their weights are."""
    rows = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        published = find_family(name).published.get(name, {})
        weights = f"[{published['file']}]({published['url']})" if published else "none published"
        top1 = f"{published['top1_reported']}" if published else "-"
        size = f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"
        rows.append((f"`{name}`", model.family, size, top1, weights))
    return _table(("model", "family", "parameters", "ImageNet top-1, reported by the paper", "official weights"), rows)


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


_TABLES: dict[str, Callable[[], str]] = {"models": model_table, "scans": scan_table, "routes": route_table}


def fill_tables(page: str) -> str:
    """`page` with what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` replaced by that table.

    Raises:
        KeyError: a table that nothing generates.
    """

    def table(match: re.Match) -> str:
        return f"{match[1]}\n{_TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)

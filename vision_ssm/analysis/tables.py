"""Markdown tables made from the registries, so that no page can disagree with the code."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..backbones.base import Backbone
from ..factory import create_model, families, find_family, list_models
from ..registry import SCANS
from ..scans import build_routes, describe_routes, describe_scan, list_routes, list_scans
from .cards import read_card
from .marked import fill_marked, markdown_table, short_size


def model_table(cards: Path) -> str:
    """Every variant: input size, parameters, multiply-accumulates, the reported top-1, and where its weights are.

    All of it stands in the front matter of the model cards, in the folder `cards`, and is counted there alone.

    Raises:
        KeyError: a model that its card does not know yet.
    """
    known = {}
    for family in families():
        path = cards / f"{family}.md"
        entries = read_card(path.read_text())[0].get("variants", []) if path.is_file() else []
        known.update({entry["name"]: (family, entry) for entry in entries})
    rows = []
    for name in list_models():
        if name not in known:
            raise KeyError(f"no card in {cards} knows {name}: run tools/make_cards.py {find_family(name).family}")
        family, entry = known[name]
        weights = f"[{entry.get('file', 'download page')}]({entry['url']})" if "url" in entry else "none published"
        height, width = entry["input"][1:]
        side = str(height) if height == width else f"{height} x {width}"
        counts = (short_size(entry["parameters"]), short_size(entry["macs"]))
        rows.append((f"`{name}`", family, side, *counts, str(entry.get("top1_reported", "-")), weights))
    headings = (
        *("model", "family", "input size", "parameters", "MACs"),
        *("ImageNet top-1, reported by the paper", "official weights"),
    )
    return markdown_table(headings, rows)


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
    table = markdown_table(("model", *(f"`{scan}`" for scan in scans)), rows)
    return "\n\n".join([table, *refused])


def scan_table() -> str:
    """Every scan strategy with the first line of its documentation."""
    return markdown_table(("scan", "what it is"), [(f"`{name}`", describe_scan(name)) for name in list_scans()])


def route_table() -> str:
    """Every route family with its number of routes and the first line of its documentation."""
    rows = []
    for name in list_routes():
        count = "any" if name == "compose" else str(build_routes(name).num_routes)
        rows.append((f"`{name}`", count, describe_routes(name)))
    return markdown_table(("routes", "number", "what they are"), rows)


_TABLES: dict[str, Callable[[], str]] = {
    "scans": scan_table,
    "routes": route_table,
    "pairs": pair_table,
}


def fill_tables(page: str, cards: Path) -> str:
    """`page` with what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` replaced by that table.

    `cards` is the folder of the model cards.

    Raises:
        KeyError: a table that nothing generates.
    """
    return fill_marked(page, {**_TABLES, "models": partial(model_table, cards)})

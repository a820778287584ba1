"""The generated parts of the model cards: front matter, tables of variants and recipes, pictures of routes."""

import io
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..backbones.family import ModelFamily
from ..factory import create_model, families, unet_families
from ..integrations.official_models import OFFICIAL_MODELS
from ..registry import suggest
from .macs import count_operations
from .marked import fill_marked, markdown_table, short_size
from .reported import Comparison
from .route_figures import RouteFigure, figures_of

SECTIONS = (
    *("Models", "Idea", "Routes", "Use", "Recipes", "Paper and code", "MACs", "Limits", "Speed", "Citation", "Licence"),
)
"""Headings of every card, in order."""
WITHOUT_CARD = ("plain_unet", "encoder_unet")
"""Families of this library's own, which have no paper to describe."""
_COLOURS = 48  # of a picture, so that it is small
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")


def card_families() -> dict[str, list[type[ModelFamily]]]:
    """The families that have a card, with their classes."""
    known: dict[str, list[type[ModelFamily]]] = {**families(), **unet_families()}
    return {name: classes for name, classes in known.items() if name not in WITHOUT_CARD}


def describe_variants(family: str) -> list[dict[str, Any]]:
    """Front matter of every variant of a family: what is counted here, and what is known of its weights.

    Raises:
        KeyError: no such family, or one without a card.
    """
    known = card_families()
    if family not in known:
        raise KeyError(f"there is no card for a family {family!r}.{suggest(family, known)}")
    return [_describe(cls, name) for cls in known[family] for name in cls.variants]


def _describe(cls: type[ModelFamily], name: str) -> dict[str, Any]:
    image = {**cls.common_cfg, **cls.published.get(name, {})}["input_size"]
    count = count_operations(partial(create_model, name), tuple(image[1:]))
    entry = dict(name=name, parameters=count.parameters, macs=count.macs, input=_plain(image))
    known = {key: _plain(value) for key, value in cls.published.get(name, {}).items() if value not in ((), [], None)}
    return {**entry, **{key: value for key, value in known.items() if key not in _PREPROCESSING}}


def _plain(value: Any) -> Any:
    """Lists in place of tuples, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def front_matter(family: str, variants: list[dict[str, Any]]) -> str:
    """The card's head, YAML between two lines of dashes."""
    head = dict(family=family, paper=paper_id(family), source=source_of(family), variants=variants)
    text = yaml.safe_dump(head, sort_keys=False, width=10_000, allow_unicode=True)
    return f"---\n# written by tools/make_cards.py\n{text}---\n"


def read_card(page: str) -> tuple[dict[str, Any], str]:
    """Front matter, and what follows it; a card without one has an empty one."""
    match = re.match(r"---\n(.*?)\n---\n", page, flags=re.DOTALL)
    return (yaml.safe_load(match[1]), page[match.end() :]) if match else ({}, page)


def _documentation(family: str) -> str:
    modules = [sys.modules[cls.__module__] for cls in card_families()[family]]
    return " ".join((modules[0].__doc__ or "").split())


def paper_id(family: str) -> str:
    """The arXiv number of a family's paper, from the head of its module."""
    match = re.search(r"arXiv (\d{4}\.\d{5})", _documentation(family))
    assert match is not None  # every family's module names its paper
    return match[1]


def source_of(family: str) -> str:
    """The repository that a family follows, from the head of its module."""
    match = re.search(r"github\.com/[\w.-]+/[\w-]+", _documentation(family))
    assert match is not None
    return f"https://{match[0]}"


def variant_table(variants: list[dict[str, Any]]) -> str:
    """Size, cost, reported accuracy and weights of every variant."""
    rows = []
    for entry in variants:
        comparison = Comparison.of(entry["name"], entry["macs"])
        reported = "-" if comparison is None else f"{comparison.gmacs} G ({comparison.difference:+.1f} %)"
        height, width = entry["input"][1:]
        side = str(height) if height == width else f"{height} x {width}"
        counts = (short_size(entry["parameters"]), short_size(entry["macs"]))
        weights = [_weights(entry), *(_weights(other) for other in entry.get("also", []))]
        licence = entry.get("license", "see the repository" if "url" in entry else "-")
        rows.append((f"`{entry['name']}`", side, *counts, reported, _scores(entry), "<br>".join(weights), licence))
    headings = (
        *("model", "input", "parameters", "MACs", "reported MACs (ours is)"),
        *("reported by the paper or repository", "weights of the authors", "licence of the weights"),
    )
    return markdown_table(headings, rows)


_SCORES = {
    "top1_reported": "top-1",
    "coco_ap_reported": "COCO AP",
    "crowdpose_ap_reported": "CrowdPose AP",
    "ade20k_miou_reported": "ADE20K mIoU",
}


def _scores(entry: dict[str, Any]) -> str:
    found = [f"{label} {entry[key]}" for key, label in _SCORES.items() if key in entry]
    return ", ".join(found) or "-"


def _weights(entry: dict[str, Any]) -> str:
    if "url" in entry:
        scores = f" ({_scores(entry)})" if "name" not in entry and _scores(entry) != "-" else ""
        return f"[{entry.get('file', 'download page')}]({entry['url']}){scores}"
    if "encoder_weights" in entry:
        return f"none; encoder: those of `{entry['encoder_weights']}`"
    return "none published"


def transform_line(family: str) -> str:
    """How images are prepared for a family's weights, in words; those of dense models are prepared by their configs."""
    classifiers: dict[str, list[str]] = {}
    for cls in card_families()[family]:
        for name, settings in cls.variants.items():
            cfg = {**cls.common_cfg, **cls.published.get(name, {})}
            if "mean" not in cfg:
                return (
                    "Images are prepared as the config of the data set says. Height and width are padded inside the"
                    " model to a\nmultiple of the coarsest stride, and scores cropped."
                )
            if not settings.get("features_only") and not name.endswith("_micro"):
                mean, deviation = (", ".join(map(str, cfg[key])) for key in ("mean", "std"))
                line = (
                    f"shorter side resized to input / {cfg['crop_pct']:.3g} ({cfg['interpolation']}), centre crop,"
                    f" RGB in [0, 1], mean {mean}, standard deviation {deviation}."
                )
                classifiers.setdefault(line, []).append(f"`{name}`")
    if len(classifiers) == 1:
        return f"Input: {next(iter(classifiers))}"
    return "\n".join(f"- {', '.join(names)}: {line}" for line, names in classifiers.items())


def recipe_list(family: str, configs: Path) -> str:
    """Links to every config that names a variant of the family, by task, and to weights that are published for it."""
    known = card_families()
    owners = {name: owner for owner, classes in known.items() for cls in classes for name in cls.variants}
    by_task: dict[str, list[str]] = {}
    for path in sorted(configs.glob("*/*.py")):
        task, stem = path.parent.name, f"_{path.stem}_"
        if task != "_base_":
            named = [name for name in owners if f"_{name}_" in stem]
            owner = owners[max(named, key=len)] if named else path.stem.split("_")[0]
            if owner == family:
                url, _ = OFFICIAL_MODELS.get(path.stem, (None, None))
                link = "" if url is None else f" ([weights]({url}))"
                by_task.setdefault(task, []).append(f"[{path.stem}](../configs/{task}/{path.name}){link}")
    if not by_task:
        return "No config names a model of this family."
    return "\n".join(f"- {task}: {', '.join(links)}" for task, links in by_task.items())


def route_pictures(page: str) -> str:
    """The pictures that a card asks for."""
    return "\n\n".join(f"![{figure.caption}](figures/{key}.png)" for key, figure in figures_of(page).items())


def fill_card(family: str, page: str, configs: Path) -> str:
    """`page` with its front matter and its generated parts made anew.

    Raises:
        KeyError: no such family, or a mark or picture that nothing makes.
    """
    variants = describe_variants(family)
    parts = {
        "variants": partial(variant_table, variants),
        "input": partial(transform_line, family),
        "routes": partial(route_pictures, page),
        "recipes": partial(recipe_list, family, configs),
    }
    return front_matter(family, variants) + fill_marked(read_card(page)[1], parts)


def draw_figure(figure: RouteFigure) -> bytes:
    """A small PNG picture, with what it shows in its description."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer, note, out = io.BytesIO(), PngInfo(), io.BytesIO()
    figure.draw().savefig(buffer, format="png", dpi=100)
    note.add_text("Description", figure.description)
    picture = Image.open(buffer).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    picture.save(out, format="png", optimize=True, pnginfo=note)
    return out.getvalue()


def figure_is_current(figure: RouteFigure, path: Path) -> bool:
    """Whether a picture is there and shows what its description says it should."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get("Description") == figure.description

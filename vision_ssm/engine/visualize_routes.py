"""Which walks a name on the command line stands for, and their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vision_ssm.analysis.route_pictures import save_animated_svg, save_gif
from vision_ssm.analysis.scan_attention import find_mixer, named_mixers
from vision_ssm.factory import create_model, list_models, list_unets
from vision_ssm.registry import suggest
from vision_ssm.scans import build_routes, build_scan, list_routes, list_scans
from vision_ssm.scans.drawing import draw_walks
from vision_ssm.scans.walks import NoRouteError, Walk, Wave, walks_of

from .commands import describe_scan
from .config import UsageError

KINDS = dict(routes="route family", scan="scan strategy", model="model")
MOST_PANELS = 32
_DIM = 64  # of a strategy whose geometry alone is looked at: a multiple of what strategies ask for


@dataclass
class Found:
    """Walks to draw.

    Attributes:
        title: line above.
        walks: at most `MOST_PANELS`.
        left_out: number of all walks, where not all are drawn; 0 otherwise.
        remarks: what else there is to say.
    """

    title: str
    walks: list[Walk | Wave]
    left_out: int = 0
    remarks: list[str] = field(default_factory=list)


def collect_walks(
    name: str, grid: tuple[int, int], kind: str | None = None, options: Mapping[str, Any] | None = None,
    block: str | None = None,
) -> Found:  # fmt: skip
    """The walks of a route family, a scan strategy or a model, looked for in this order.

    Args:
        name: its name.
        grid: rows and columns of the map.
        kind: ``"routes"``, ``"scan"`` or ``"model"``, for a name that several have.
        options: keywords of what is built.
        block: of a model; None: all blocks whose walks differ.

    Raises:
        UsageError: an unknown name, or a strategy that follows no route.
    """
    options = dict(options or {})
    names = dict(routes=list_routes(), scan=list_scans(), model=[*list_models(), *list_unets()])
    owners = [key for key, known in names.items() if name in known]
    if kind is not None and kind not in owners:
        raise UsageError(f"no {KINDS[kind]} is called {name!r}.{suggest(name, names[kind])}")
    if not owners:
        known = [entry for entries in names.values() for entry in entries]
        raise UsageError(f"no route family, scan strategy or model is called {name!r}.{suggest(name, known)}")
    kind = kind or owners[0]
    if block is not None and kind != "model":
        raise UsageError(f"--block belongs to a model; {name} is a {KINDS[kind]}")
    title = f"{name} on {grid[0]} x {grid[1]} cells"
    others = [f"{name} is also a {KINDS[other]}: --kind {other}" for other in owners if other != kind]
    if kind == "routes":
        return _found(title, build_routes({"type": name, **options}).walks(*grid), others)
    if kind == "scan":
        try:
            return _found(title, walks_of(build_scan({"type": name, **options}, _DIM), *grid), others)
        except NoRouteError as error:
            raise UsageError(_no_route(name, error)) from None
    with torch.device("meta"):
        model = create_model(name, **options)
    return _of_model(name, model, grid, block)


def _no_route(name: str, error: NoRouteError) -> str:
    return f"{name} follows no route: {error}. `visualize.py attn {name}` draws what a cell reads."


def _of_model(name: str, model: Any, grid: tuple[int, int], block: str | None) -> Found:
    mixers = named_mixers(model) if block is None else dict([find_mixer(model, block)])
    alike: dict[tuple, tuple[str, list[Walk | Wave], list[str]]] = {}
    problem = None
    for place, mixer in mixers.items():
        try:
            walks = walks_of(mixer, *grid)
        except NoRouteError as error:
            problem = error
            continue
        key = tuple((walk.title, *_geometry(walk).flatten().tolist()) for walk in walks)
        alike.setdefault(key, (describe_scan(mixer), walks, []))[2].append(place)
    if not alike:
        raise UsageError(_no_route(name, problem) if problem else f"{name} has no token mixer")
    remarks = [f"{what}: {', '.join(places)}" for what, _, places in alike.values()]
    if problem is not None:
        remarks.append(f"the other blocks follow no route: {problem}")
    drawn = []
    for _, walks, places in alike.values():
        heading = "" if len(alike) == 1 else f"{places[0]}: "
        drawn += [replace(walk, title=f"{heading}{walk.title}") for walk in walks]
    return _found(f"{name}{f', {block},' if block else ''} on {grid[0]} x {grid[1]} cells", drawn, remarks)


def _geometry(walk: Walk | Wave) -> torch.Tensor:
    return walk.order if isinstance(walk, Walk) else walk.steps


def _found(title: str, walks: Sequence[Walk | Wave], remarks: list[str]) -> Found:
    return Found(title, list(walks[:MOST_PANELS]), len(walks) if len(walks) > MOST_PANELS else 0, remarks)


def draw_still(found: Found, path: Path, dpi: int) -> None:
    """A picture of all walks as png or svg."""
    draw_walks(found.walks, found.title).savefig(path, dpi=dpi)


def animate(found: Found, path: Path, seconds: float, frames: int) -> None:
    """An animation of all walks as gif or svg."""
    if path.suffix.lower() == ".gif":
        save_gif(found.walks, path, found.title, seconds, frames)
    else:
        save_animated_svg(found.walks, path, found.title, seconds)

"""Write the generated parts of model_cards/*.md and their pictures, or check that they are up to date.

    python tools/make_cards.py
    python tools/make_cards.py vmamba vssd
    python tools/make_cards.py --check

Front matter and what stands between the marks is counted and read from the registry; the text around it is written by
hand and stays.
"""

import argparse
import difflib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from vision_ssm.analysis.cards import card_families, draw_figure, figure_is_current, fill_card
from vision_ssm.analysis.route_figures import figures_of
from vision_ssm.registry import suggest

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None, cards: Path = ROOT / "model_cards") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families; all by default")
    parser.add_argument("--check", action="store_true", help="change nothing; show what is out of date and exit with 1")
    arguments = parser.parse_args(argv)
    known = card_families()
    for name in arguments.families:
        if name not in known:
            parser.error(f"there is no card for a family {name!r}.{suggest(name, known)}")
    families = arguments.families or sorted(known)
    paths = [cards / f"{family}.md" for family in families]
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} is missing: write its text, with the marks of another card in it, and run this again")
    pages = [path.read_text() for path in paths]
    stale = 0
    for path, before, after in zip(paths, pages, _filled(families, pages)):
        pictures = {cards / "figures" / f"{key}.png": figure for key, figure in figures_of(before).items()}
        old = [file for file, figure in pictures.items() if not figure_is_current(figure, file)]
        if arguments.check:
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), str(path), "generated", lineterm="")
            print(*lines, *(f"{file} is missing or shows something else" for file in old), sep="\n", end="")
            stale += before != after or bool(old)
            continue
        path.write_text(after)
        for file in old:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(draw_figure(pictures[file]))
    if stale:
        print(f"\n{stale} model cards are out of date: run tools/make_cards.py")
    return int(stale > 0)


def _filled(families: Sequence[str], pages: Sequence[str]) -> list[str]:
    """The pages with their generated parts; counting takes a core seconds for a family, so cores share them."""
    fill = partial(fill_card, configs=ROOT / "configs")
    workers = min(len(families), os.cpu_count() or 1)
    if workers == 1:
        return list(map(fill, families, pages))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(fill, families, pages))


if __name__ == "__main__":
    sys.exit(main())

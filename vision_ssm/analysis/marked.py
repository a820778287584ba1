"""Pages whose tables are generated between marks, and how such tables are written."""

import re
from collections.abc import Callable, Mapping, Sequence


def markdown_table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table of text cells."""
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *rows)]
    return "\n".join(lines)


def short_size(count: int) -> str:
    """A number with one decimal in G or M, or in whole k."""
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.1f} {letter}"
    return f"{count / 1e3:.0f} k"


def fill_marked(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """`page` with what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` replaced by that part.

    Raises:
        KeyError: a part that nothing generates.
    """

    def part(match: re.Match) -> str:
        return f"{match[1]}\n{parts[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", part, page, flags=re.DOTALL)

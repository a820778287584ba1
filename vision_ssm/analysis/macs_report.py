"""What tools/get_flops.py prints and writes about one model."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..factory import create_model
from .macs import CONVENTION, SCAN_FORMULAS, Count, count_operations
from .reported import Comparison, paper_formula

if TYPE_CHECKING:
    from rich.table import Table


def big(count: float) -> str:
    """A number with three decimals and its unit: k, M or G."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3f} {letter}"
    return f"{count:.0f}"


@dataclass
class Report:
    """One counted model.

    Attributes:
        name, family: of the model.
        size: height and width of the image.
        in_chans: channels of the image.
        scan_formula: the entry of `SCAN_FORMULAS`.
        count: what was counted.
        comparison: the reported figure beside it; None if there is none for this model at this size.
        overrides: keywords that the variant was changed by.
    """

    name: str
    family: str
    size: tuple[int, int]
    in_chans: int
    scan_formula: str
    count: Count
    comparison: Comparison | None
    overrides: dict[str, Any]

    def title(self) -> str:
        """The model and its image in words."""
        changes = "".join(f", {key}={value!r}" for key, value in self.overrides.items())
        return f"{self.name}{changes}, one image of {self.in_chans} x {self.size[0]} x {self.size[1]}"

    def sentences(self) -> list[str]:
        """The convention, the totals, and the comparison with the reported figure."""
        count = self.count
        lines = [
            f"{CONVENTION}; {SCAN_FORMULAS[self.scan_formula]}.",
            f"{count.parameters:,} parameters, {big(count.macs)} MACs.",
        ]
        if self.comparison is not None:
            reason = f": {self.comparison.reason}" if self.comparison.reason and self.scan_formula == "9BLDN" else ""
            difference = f"{self.comparison.difference:+.1f} %"
            lines.append(f"Reported by the paper or repository: {self.comparison.gmacs} G, ours {difference}{reason}.")
        return lines

    def module_table(self, depth: int) -> "Table":
        """Parameters and MACs of modules, down to `depth` names below the model."""
        from rich.table import Table

        table = Table("module", "parameters", "MACs", "share", title=self.title())
        for name, macs in self.count.modules.items():
            level = name.count(".") + 1 if name else 0
            if level <= depth:
                label = "  " * level + (name.rsplit(".", 1)[-1] or self.name)
                share = f"{macs / max(self.count.macs, 1):.1%}"
                table.add_row(label, f"{self.count.sizes[name]:,}", big(macs), share)
        return table

    def operator_table(self) -> "Table":
        """Every operator that was counted."""
        from rich.table import Table

        table = Table("counted operator", "calls", "MACs", "share")
        for name, macs in self.count.operators.items():
            share = f"{macs / max(self.count.macs, 1):.1%}"
            table.add_row(name, str(self.count.calls[name]), big(macs), share)
        return table

    def uncounted_table(self) -> "Table":
        """Every operator that ran and has no formula."""
        from rich.table import Table

        table = Table("operator without a formula: not counted", "calls")
        for name, calls in self.count.uncounted.items():
            table.add_row(name, str(calls))
        return table

    def as_dict(self, depth: int) -> dict[str, Any]:
        """Everything, for JSON."""
        modules = [
            dict(name=name, parameters=self.count.sizes[name], macs=macs)
            for name, macs in self.count.modules.items()
            if not name or name.count(".") < depth
        ]
        return dict(
            model=self.name,
            family=self.family,
            overrides=self.overrides,
            image=[self.in_chans, *self.size],
            convention=CONVENTION,
            scan_formula=SCAN_FORMULAS[self.scan_formula],
            parameters=self.count.parameters,
            macs=self.count.macs,
            reported=None if self.comparison is None else vars(self.comparison),
            operators=[
                dict(name=name, calls=self.count.calls[name], macs=macs) for name, macs in self.count.operators.items()
            ],
            uncounted=[dict(name=name, calls=calls) for name, calls in self.count.uncounted.items()],
            modules=modules,
        )


def report_model(
    name: str, size: tuple[int, int] | None = None, *, scan_formula: str = "default", **overrides: Any
) -> Report:
    """Count a backbone or a U-Net.

    Args:
        name: its variant.
        size: height and width of the image; by default those that the variant is published for.
        scan_formula: ``"default"``, or ``"paper"`` for the way the paper or repository says that it counts.
        **overrides: keywords of `create_model`.

    Raises:
        KeyError, TypeError, ValueError: there is no such model, or it cannot be built or run so; or no ``"paper"``
            formula is known for it.
    """
    build = partial(create_model, name, **overrides)
    with torch.device("meta"):
        model = build()
    formula = {"default": "9BLDN"}.get(scan_formula) or paper_formula(model.family)
    published = tuple(model.pretrained_cfg["input_size"][1:])
    height, width = size or published
    count = count_operations(build, (height, width), model.in_chans, formula)
    unchanged = not overrides and (height, width) == published
    comparison = Comparison.of(name, count.macs) if unchanged else None
    return Report(name, model.family, (height, width), model.in_chans, formula, count, comparison, overrides)

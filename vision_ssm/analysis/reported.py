"""Multiply-accumulates that papers and repositories report, and how they counted them where they say so."""

from dataclasses import dataclass

from ..registry import suggest

REPORTED_GMACS: dict[str, float] = {
    "efficientvim_m1": 0.239,
    "efficientvim_m2": 0.355,
    "efficientvim_m3": 0.656,
    "efficientvim_m4": 1.111,
    "efficientvmamba_base": 4.0,
    "efficientvmamba_small": 1.3,
    "efficientvmamba_tiny": 0.8,
    "hrvmamba_base": 15.8,
    "hrvmamba_base_pose": 14.2,
    "hrvmamba_nano": 1.9,
    "hrvmamba_small": 5.8,
    "hrvmamba_small_pose": 3.3,
    "hrvmamba_tiny": 2.8,
    "hrvmamba_tiny_pose": 1.1,
    "localvim_small": 4.8,
    "localvim_tiny": 1.5,
    "localvim_tiny_middle_cls_token": 1.5,
    "localvmamba_small": 11.4,
    "localvmamba_tiny": 5.7,
    "msvmamba_micro_d64": 1.53,
    "msvmamba_nano": 0.88,
    "msvmamba_tiny": 4.6,
    "msvmambav3_base": 16.3,
    "msvmambav3_small": 8.8,
    "msvmambav3_tiny": 5.0,
    "plainmamba_l1": 3.0,
    "plainmamba_l2": 8.1,
    "plainmamba_l3": 14.4,
    "spatialmamba_base": 15.8,
    "spatialmamba_small": 7.1,
    "spatialmamba_tiny": 4.5,
    "vanilla_vmamba_base": 18.0,
    "vanilla_vmamba_small": 11.2,
    "vanilla_vmamba_tiny": 5.6,
    "vcmamba_b": 4.0,
    "vcmamba_m": 2.3,
    "vcmamba_s": 1.1,
    "vim_small": 5.1,
    "vim_tiny": 1.5,
    "vmamba_base_s1l20": 15.2,
    "vmamba_base_s2l15": 15.4,
    "vmamba_small_s1l20": 8.6,
    "vmamba_small_s2l15": 8.7,
    "vmamba_tiny_s1l8": 4.9,
    "vmamba_tiny_s2l5": 4.9,
    "vmunet_isic": 4.1,
    "vssd_base": 16.1,
    "vssd_micro_d48": 2.3,
    "vssd_small": 7.4,
    "vssd_tiny": 4.5,
}
"""G, for an image of the variant's published size; called FLOPs where they are published. Vim's are those that other
papers cite."""

COUNTED_OTHERWISE: dict[str, str] = {
    **dict.fromkeys(
        ("plainmamba_l2", "plainmamba_l3"),
        "ours expands the step sizes once per route, the original once for all four",
    ),
    **dict.fromkeys(
        ("vssd_base", "vssd_small", "vssd_tiny"),
        "ours without one of the two products of the non-causal SSD comes to about the reported figure",
    ),
    "vmunet_isic": "the reported figure leaves out the core of every scan",
    **dict.fromkeys(
        (
            *("efficientvmamba_base", "efficientvmamba_small", "efficientvmamba_tiny"),
            *("localvim_small", "localvim_tiny", "localvim_tiny_middle_cls_token", "vim_small", "vim_tiny"),
        ),
        "how the reported figure was counted is not known",
    ),
}
"""Why the default count of a variant is more than 2 percent away from the reported figure."""

PAPER_FORMULAS: dict[str, str] = {
    "efficientvim": "products",
    "vmamba": "9BLDN",
    "vmunet": "modules",
    "vssd": "products",
}
"""The entry of `SCAN_FORMULAS` that a family's paper or repository says it counts by."""


def paper_formula(family: str) -> str:
    """How the paper or repository of `family` counts scans.

    Raises:
        ValueError: it does not say.
    """
    if family not in PAPER_FORMULAS:
        raise ValueError(
            f"the paper and the repository of {family} do not say how they count scans, so there is no 'paper' formula"
            f" for it; use the default.{suggest(family, PAPER_FORMULAS)}"
        )
    return PAPER_FORMULAS[family]


@dataclass
class Comparison:
    """A count beside the reported one.

    Attributes:
        gmacs: reported, in G.
        difference: how much larger ours is, in percent of the reported figure.
        reason: why they differ by more than 2 percent and the rounding of the reported figure; "" where they do not.
    """

    gmacs: float
    difference: float
    reason: str

    @classmethod
    def of(cls, name: str, macs: int) -> "Comparison | None":
        """The comparison of variant `name`, counted at its published size; None if nothing is reported."""
        if name not in REPORTED_GMACS:
            return None
        reported = REPORTED_GMACS[name]
        return cls(reported, 100 * (macs / 1e9 / reported - 1), COUNTED_OTHERWISE.get(name, ""))


def agrees(reported: float, macs: int) -> bool:
    """Whether a count is the reported figure, within 2 percent and the rounding of the figure."""
    digits = len(str(reported).split(".")[1])
    return abs(macs / 1e9 - reported) <= 0.02 * reported + 0.5 * 10**-digits

"""What all families need to read hyperparameters and state dicts of original repositories."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ..registry import suggest


def official_settings(
    original: str,
    config: dict[str, Any],
    defaults: dict[str, Any],
    without_effect: Collection[str] = (),
    constants: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An original's hyperparameters, with its defaults for what `config` leaves out.

    Args:
        original: what messages call the original.
        config: hyperparameters as the original's constructor takes them.
        defaults: all that matter, with the original's defaults.
        without_effect: names that may be given and say nothing about what the weights compute.
        constants: names that may be given with the one value that originals have.

    Raises:
        ValueError: a hyperparameter that the original does not have, or another value of a constant.
    """
    constants = constants or {}
    for name, value in constants.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} of an original {original} is {value!r}, got {config[name]!r}")
    known = {*defaults, *without_effect, *constants}
    unknown = sorted(set(config) - known)
    if unknown:
        hints = "".join(suggest(key, known, 1) for key in unknown)
        raise ValueError(f"unknown hyperparameters of an original {original}: {', '.join(unknown)}.{hints}")
    return {**defaults, **config}


def rename(key: str, patterns: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    """A key of a state dict after all substitutions of regular expressions by replacements, in their order."""
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def stage_key(key: str) -> str:
    """``layers.I.`` as ``stages.I.``, with the downsampling that originals put behind a stage in front of the next."""
    key = re.sub(r"^(?:layers|stages)\.(\d+)\.downsample", lambda match: f"stages.{int(match[1]) + 1}.downsample", key)
    return re.sub(r"^layers\.", "stages.", key)

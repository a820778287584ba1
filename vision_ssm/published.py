"""From what a user says of pretrained weights to a file of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .backbones.family import ModelFamily
from .download import fetch
from .registry import suggest
from .weights import load_weights


@dataclass
class Weights:
    """Weights that a model starts from: their file (None: none) and, if they are published ones, their entry.

    Attributes:
        file: a file that exists, or is to be read anyway.
        tag: which of several published ones.
        ema: whether averaged weights are wanted where the file has both; None: as `load_weights` decides.
    """

    file: str | os.PathLike | None = None
    tag: str = ""
    ema: bool | None = None

    def load(self, model: ModelFamily, reset_head: bool, **options: Any) -> None:
        """Load them into `model`, if there are any; other `options` are those of `load_weights`."""
        if self.file is not None:
            load_weights(model, self.file, reset_head=reset_head, ema=self.ema, adapt_input=True, **options)


def split_tag(name: str) -> tuple[str, str]:
    """Variant and tag of ``"variant.tag"``; no tag is an empty one."""
    variant, _, tag = name.partition(".")
    return variant, tag


def fetch_weights(cls: type[ModelFamily], name: str, tag: str = "", cache_dir: str | os.PathLike | None = None) -> Path:
    """The file of the weights `tag` of variant `name`, by default the first ones, from the cache or the net.

    Raises:
        ValueError: none are published. KeyError: not under that tag. DownloadError: see `fetch`.
    """
    entry = published_entry(cls, name, tag)
    return fetch(entry["url"], entry["file"], cache_dir=cache_dir, sha256=entry.get("sha256"))


def published_entry(cls: type[ModelFamily], name: str, tag: str = "") -> dict[str, Any]:
    """What is published under `tag`; see `fetch_weights`."""
    known = cls.weights_of(name)
    if not known:
        raise ValueError(f"pretrained takes a file: no official weights are published for it (model {name})")
    if tag and tag not in known:
        if known.keys() == {""}:
            raise KeyError(f"{name} has no weights {tag!r}: only one training of it is published; leave the tag out")
        raise KeyError(f"{name} has no weights {tag!r}.{suggest(tag, known)}")
    return known[tag] if tag else next(iter(known.values()))


def find_weights(
    cls: type[ModelFamily],
    name: str,
    tag: str,
    pretrained: bool | str | os.PathLike | None,
    cache_dir: str | os.PathLike | None,
) -> Weights:
    """The weights that `pretrained` of `create_model` names.

    Args:
        cls: the family.
        name: the variant.
        tag: tag in the name of the model, or an empty one.
        pretrained: True, a tag, a file, or nothing.
        cache_dir: see `fetch`.

    Raises:
        ValueError, KeyError, DownloadError: see `fetch_weights`. FileNotFoundError: later, when the file is read.
    """
    if isinstance(pretrained, str) and (pretrained in cls.weights_of(name) or _looks_like_tag(pretrained)):
        if tag and tag != pretrained:
            raise ValueError(f"{name}.{tag} and pretrained={pretrained!r} name two trainings: give one of them")
        tag, pretrained = pretrained, True
    if pretrained is not True and not tag:
        return Weights(pretrained or None)
    entry = published_entry(cls, name, tag)  # a misspelt tag is an error in any case
    file = fetch_weights(cls, name, tag, cache_dir) if pretrained is True else pretrained or None
    return Weights(file, entry.get("tag", ""), entry.get("ema", True))


def _looks_like_tag(text: str) -> bool:
    return bool(text) and "." not in text and Path(text).name == text and not Path(text).exists()

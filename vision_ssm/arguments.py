"""Values of keywords against the annotations of the constructors that take them."""

import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

SIZES = frozenset({"depth", "dim", "img_size", "patch_size", "state_dim"})
"""Keywords whose numbers are at least 1, in whatever class."""
WORDS: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("True or False", "booleans"),
    str: ("a string", "strings"),
    dict: ("a dict", "dicts"),
    type(None): ("None", "None"),
}


def check_values(functions: Iterable[Callable], values: Mapping[str, Any], name: str) -> None:
    """Compare values with what `functions` say of them in their annotations.

    Args:
        functions: constructors that together take the keywords, the one that is asked first in front.
        values: keywords and their values.
        name: of what is built, for the message.

    Raises:
        TypeError: a value of another type. ValueError: a size below 1 or a rate outside of 0 to 1.
    """
    hints: dict[str, Any] = {}
    for function in functions:
        hints = {**_hints(function), **hints}
    for key, value in values.items():
        hint = hints.get(key, Any)
        if not _fits(value, hint):
            raise TypeError(f"{name}: {key} takes {_in_words(hint)}, got {value!r}")
        numbers = [number for number in _flat(value) if _is(number, Real)]
        if key in SIZES and any(number < 1 for number in numbers):
            raise ValueError(f"{name}: {key} must be 1 or more, got {value!r}")
        if key.endswith(("_rate", "dropout")) and not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"{name}: {key} must be between 0 and 1, got {value!r}")


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that is imported for type checkers only
        return {}


def _flat(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is(value: Any, kind: type) -> bool:
    """Whether it is a number of this kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple and Ellipsis not in parts:
        return _is_series(value) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (Sequence, Iterable, list, tuple):
        return _is_series(value) and all(_fits(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is int:
        return _is(value, Integral)
    if hint is float:
        return _is(value, Real)
    if hint is bool:  # 0 and 1 too, as a command line may give them
        return isinstance(value, (bool, np.bool_)) or (_is(value, Integral) and value in (0, 1))
    return isinstance(value, hint) if isinstance(hint, type) else True


def _is_series(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _in_words(hint: Any, several: bool = False) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(part, several) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and Ellipsis not in parts:
        return f"{len(parts)} {_in_words(parts[0], True)}"
    if origin in (Sequence, Iterable, list, tuple):
        return f"{'sequences' if several else 'a sequence'} of {_in_words(parts[0], True)}"
    if origin is Mapping:
        hint = dict
    return WORDS[hint][several] if hint in WORDS else getattr(hint, "__name__", str(hint))

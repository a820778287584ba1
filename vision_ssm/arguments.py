"""Values of keywords against the annotations of the constructors that take them."""

import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

LEAST = dict(depth=1, dim=1, dims=1, img_size=1, patch_size=1, state_dim=1, depths=0, mlp_ratio=0)
"""Smallest numbers of some keywords, in whatever class."""
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
        if key in LEAST and not all(number >= LEAST[key] for number in numbers):
            raise ValueError(f"{name}: {key} must be {LEAST[key]} or more, got {value!r}")
        if key.endswith(("drop_rate", "drop_path_rate", "dropout")) and not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"{name}: {key} must be between 0 and 1, got {value!r}")


def without_numpy(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with Python's numbers and lists in the place of NumPy's, which a class need not know."""
    numpy = np.generic, np.ndarray
    return {key: value.tolist() if isinstance(value, numpy) else value for key, value in values.items()}


def _hints(function: Callable) -> dict[str, Any]:
    try:
        return _read_hints(function)
    except Exception:  # a name for type checkers only, a callable object, a partial: nothing is said of its keywords
        return {}


_read_hints = functools.cache(typing.get_type_hints)


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
        return (isinstance(value, str) or not hasattr(value, "__len__")) and value in parts
    if hint in (list, tuple) or origin in (Sequence, Iterable, list, tuple) and not parts:
        return _is_series(value)
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
    try:
        return isinstance(value, hint) if isinstance(hint, type) else True
    except TypeError:  # a protocol or a typed dict
        return True


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

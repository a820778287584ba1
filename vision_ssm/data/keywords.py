"""Unknown keywords of this room's functions and classes raise an error that names the valid ones."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

from vision_ssm.registry import check_keywords

Function = TypeVar("Function", bound=Callable)


def strict_keywords(function: Function) -> Function:
    """Decorator: an unknown keyword raises `TypeError` with a suggestion and the list of valid keywords."""
    parts = function.__qualname__.split(".")
    name = parts[-2] if parts[-1] == "__init__" else parts[-1]

    @functools.wraps(function)
    def call(*args, **keywords):
        if keywords:
            check_keywords(function, keywords, name)
        return function(*args, **keywords)

    return cast(Function, call)

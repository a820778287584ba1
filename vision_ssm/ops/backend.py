"""Which implementation of an operator runs."""
from typing import NamedTuple

from torch import Tensor


class Backend(NamedTuple):
    name: str
    reason: str


def select_backend(tensor: Tensor, op: str) -> Backend:
    return Backend("reference", "")

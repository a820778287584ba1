"""Activation functions by name."""

from torch import nn

from ..registry import suggest

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def get_activation(name: str) -> nn.Module:
    """A new activation module. GELU is the exact (erf) one.

    Raises:
        ValueError: `name` is not one of the known activations.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}.{suggest(str(name), _ACTIVATIONS)}")
    return _ACTIVATIONS[name]()

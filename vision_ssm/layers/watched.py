"""Layers that are computed together with their neighbours are not called: those who watch them must not notice."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is what `kind` computes and nothing else: no subclass, no hook."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

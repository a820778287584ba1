"""Layers that are computed together with their neighbours are not called: those who watch them must not notice."""

from torch import nn


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` is what one of `kinds` computes and nothing else: no subclass, no hook."""
    return type(module) in kinds and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )

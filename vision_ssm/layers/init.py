"""Initial values, which take no time on the meta device: there a model is built for its names and shapes alone."""

import torch
from timm.layers import trunc_normal_ as _trunc_normal_


def trunc_normal_(tensor: torch.Tensor, std: float, a: float = -2.0, b: float = 2.0) -> torch.Tensor:
    """timm's `trunc_normal_` of mean 0, values in [a, b]; on the meta device, where none are set, `tensor` as it is."""
    return tensor if tensor.is_meta else _trunc_normal_(tensor, std=std, a=a, b=b)

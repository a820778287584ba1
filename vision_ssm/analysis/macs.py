"""Multiply-accumulates of a model, counted as the papers of this field count them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops import flops


def _scan_2d(*shapes: Any, **_: Any) -> int:
    rank = 0 if shapes[8] is None else shapes[8][2]
    batch, (routes, steps), dim = shapes[0][0], shapes[6], shapes[0][-1]
    expansion = flops.scan_2d_flops(batch, steps, routes, dim, 0, rank=rank, skip=False)
    return 2 * (flops.scan_2d_shapes(*shapes) - expansion) + expansion


def _local_selective_scan(*shapes: Any, **_: Any) -> int:
    (batch, length, groups, dim), rank = shapes[0], 0 if shapes[6] is None else shapes[6][2]
    expansion = 2 * batch * length * groups * dim * rank
    return 2 * (flops.local_selective_scan_shapes(*shapes) - expansion) + expansion


def _doubled(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *shapes, **_: 2 * formula(*shapes)


# What these give is halved with everything else, so the operations of a scan count once each, not half.
_OPERATORS: dict[str, Callable[..., int]] = {
    "scan_2d": _scan_2d,
    "local_selective_scan": _local_selective_scan,
    "selective_scan": _doubled(flops.selective_scan_shapes),
    "ssd": _doubled(flops.ssd_shapes),
    "layer_norm": lambda *_, **__: 0,
}


def count_macs(build: Callable[[], nn.Module], size: int | tuple[int, int] = 224, in_chans: int = 3) -> int:
    """Multiply-accumulates of one forward pass for one image. Nothing is computed and no memory is taken.

    Matrix products and convolutions count one per multiply-accumulate. A scan adds 9 operations per step, channel and
    state, and one for its skip connection, as in the tables of VMamba and its successors. Norms, activations,
    additions and the copies along routes are not counted.

    Args:
        build: makes the model, which takes images (B, in_chans, H, W); called where tensors have no data.
        size: height and width of the image, or one number for both.
        in_chans: channels of the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    mapping = {getattr(torch.ops.vision_ssm, name): formula for name, formula in _OPERATORS.items()}
    with FakeTensorMode(), torch.no_grad():
        model = build().eval()
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(torch.empty(1, in_chans, height, width))
    return counter.get_total_flops() // 2

"""Samples to a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from vision_ssm.registry import FUNCTIONS


@FUNCTIONS.register_module()
def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of `ImageFolder` to a batch.

    Args:
        samples: dicts with ``image`` (C, H, W) float tensor, ``label`` int and ``path`` str.

    Returns:
        dict with ``image`` (B, C, H, W) float, ``label`` (B,) int64 and ``path``, a list of B strings.

    Raises:
        ValueError: The images differ in shape; two of them are named.
    """
    first = samples[0]
    for sample in samples:
        if sample["image"].shape != first["image"].shape:
            raise ValueError(
                "images of one batch must have the same shape: "
                f"{first['path']!r} is {tuple(first['image'].shape)}, {sample['path']!r} is"
                f" {tuple(sample['image'].shape)}. Give the dataset a transform with a fixed input_size."
            )
    return dict(
        image=default_collate([sample["image"] for sample in samples]),
        label=torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        path=[sample["path"] for sample in samples],
    )

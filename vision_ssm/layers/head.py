"""Classifiers of more than one linear layer."""

import torch
from torch import nn


class DistilledHead(nn.Module):
    """Two linear classifiers on the same vector: one learns from the labels, one from a teacher (DeiT's distillation).

    Parameters are named ``label`` and ``teacher``. In training the two logits are returned as a pair, for a
    distillation loss; in evaluation their average.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.label = nn.Linear(dim, num_classes)
        self.teacher = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x: (B, dim). Returns (B, num_classes), or a pair of these in training."""
        label, teacher = self.label(x), self.teacher(x)
        return (label, teacher) if self.training else (label + teacher) / 2

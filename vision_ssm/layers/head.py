"""Classifiers of more than one linear layer."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .init import trunc_normal_
from .norm import LayerNorm


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


class FusedClassifier(nn.Module):
    """Sum of the logits of several vectors in learned shares ``softmax(weights)``.

    ``map`` classifies the pooled map and ``hidden`` the pooled hidden states; without these there are no ``weights``.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int], num_classes: int):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(len(hidden_dims) + 1)) if hidden_dims else None
        self.hidden = nn.ModuleList(nn.Linear(width, num_classes) for width in hidden_dims)
        self.map = nn.Linear(dim, num_classes)

    def forward(self, hidden: Sequence[torch.Tensor], pooled: torch.Tensor) -> torch.Tensor:
        """hidden: vectors (B, dim) of the stages; pooled: (B, dim). Returns (B, num_classes)."""
        logits = self.map(pooled)
        if self.weights is None:
            return logits
        shares = self.weights.softmax(0)
        terms = [classify(vector) for classify, vector in zip(self.hidden, hidden, strict=True)] + [logits]
        return sum(share * term for share, term in zip(shares, terms))


class HiddenStateHead(nn.Module):
    """Classifier on the hidden states of the stages and the pooled map; a second one where there was a teacher.

    Head of EfficientViM (arXiv 2411.15241). Parameters: ``norms`` of the hidden states, the `FusedClassifier` ``label``
    and, if `distilled`, ``teacher``. In training the two logits of a distilled head are returned as a pair; in
    evaluation their average.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int], num_classes: int, distilled: bool = False):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(width, eps=1e-5) for width in hidden_dims)
        self.label = FusedClassifier(dim, hidden_dims, num_classes)
        self.teacher = FusedClassifier(dim, hidden_dims, num_classes) if distilled else None

    def forward(
        self, hidden: Sequence[torch.Tensor], pooled: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden: (B, N, dim) of every stage; pooled: (B, dim). Returns (B, num_classes), or a pair of these."""
        dtype = self.label.map.weight.dtype  # hidden states are float32, whatever the weights are
        vectors = [norm(states).mean(1).to(dtype) for norm, states in zip(self.norms, hidden, strict=True)]
        label = self.label(vectors, pooled)
        if self.teacher is None:
            return label
        teacher = self.teacher(vectors, pooled)
        return (label, teacher) if self.training else (label + teacher) / 2


class AttentionHead(nn.Module):
    """A linear classifier behind attention of one learned query over all tokens.

    The query, ``latent``, and the attended values are not projected; keys and values are (``kv``), and the result is
    normalised (``norm``). The classifier is ``fc``.

    Args:
        dim: width of the tokens.
        num_classes: outputs.
        num_heads: heads of the attention; must divide `dim`.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"the number of heads must divide the width: {num_heads} heads for {dim} channels")
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        std = dim**-0.5
        trunc_normal_(self.latent, std=std, a=-2 * std, b=2 * std)
        self.kv = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.kv.bias)
        self.norm = LayerNorm(dim, eps=1e-5)
        self.fc = nn.Linear(dim, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (B, T, dim). Returns the vector that the classifier sees, (B, dim)."""
        keys, values = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, P)
        query = self.latent.to(keys.dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (1, heads, 1, P)
        attended = F.scaled_dot_product_attention(query.expand(len(tokens), -1, -1, -1), keys, values)
        return self.norm(attended.flatten(1))  # (B, heads, 1, P) -> (B, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, dim) of `pool`. Returns (B, num_classes)."""
        return self.fc(x)

"""Losses of medical segmentation: cross-entropy and Dice, as the recipes of VM-UNet, MHS-VM and MSVM-UNet have them.

VM-UNet (arXiv:2402.02491), MHS-VM (arXiv:2406.05992), MSVM-UNet (arXiv:2408.13735). MONAI's ``DiceLoss`` has options
with which it is the same formula, but takes the sums of squares from norms, whose float32 rounding over a whole batch
moves a class's loss by 1e-3; here sums are summed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vision_ssm.ops.autocast import without_autocast
from vision_ssm.registry import suggest

KINDS = {"dice_ce": "ce", "dice_bce": "bce"}
SMOOTH = 1e-5
BINARY_SMOOTH = 1.0


def dice_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean over all K classes, background included, of ``1 - (2 sum(p t) + 1e-5) / (sum(p^2) + sum(t^2) + 1e-5)``.

    Args:
        scores: raw (B, K, H, W); p is their softmax. The sums go over all pixels of the batch.
        mask: (B, H, W) integers in 0 .. K - 1; t is 1 where it names the class.
    """
    probabilities = scores.softmax(1)
    classes = torch.arange(scores.shape[1], device=scores.device)
    target = mask[:, None] == classes[:, None, None]  # (B, K, H, W)
    pixels = (0, 2, 3)
    overlap = (probabilities * target).sum(pixels)  # (K,)
    sizes = probabilities.square().sum(pixels) + target.sum(pixels)
    return 1 - ((2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean()


def binary_dice_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over images of ``1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)``.

    Args:
        scores: raw (B, 1, H, W); p is their sigmoid. The sums go over the pixels of an image.
        target: t, like scores, 0 to 1.
    """
    probabilities = scores.sigmoid()
    pixels = (1, 2, 3)
    overlap = (probabilities * target).sum(pixels)  # (B,)
    sizes = probabilities.sum(pixels) + target.sum(pixels)
    return 1 - ((2 * overlap + BINARY_SMOOTH) / (sizes + BINARY_SMOOTH)).mean()


class SegmentationLoss(nn.Module):
    """Weighted cross-entropy and Dice loss of raw scores, computed in float32 also under autocast.

    ``dice_ce``, K classes: mean cross-entropy of the softmax, and `dice_loss`.
    ``dice_bce``, one class: mean binary cross-entropy of the sigmoid, and `binary_dice_loss`. Masks may be soft.

    Args:
        kind: ``"dice_ce"`` or ``"dice_bce"``.
        weights: of the cross-entropy and of Dice, in this order, or ``dict(ce=0.4, dice=0.6)`` (``bce`` for
            ``dice_bce``).
        deep_supervision: weights of the auxiliary scores that the model gives in training, in its order. The mask is
            resized to each of them by nearest neighbour, and their losses are added to those of the main scores.

    Raises:
        ValueError: an unknown kind, or weights that are negative, all zero, or not two.
    """

    def __init__(
        self,
        kind: str = "dice_ce",
        weights: Sequence[float] | Mapping[str, float] = (1.0, 1.0),
        deep_supervision: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown loss {kind!r}.{suggest(str(kind), KINDS)}")
        self.kind = kind
        self.entropy_name = KINDS[kind]
        if isinstance(weights, Mapping):
            if set(weights) != {self.entropy_name, "dice"}:
                raise ValueError(f"weights of {kind} are dict({self.entropy_name}=..., dice=...), got {dict(weights)}")
            weights = (weights[self.entropy_name], weights["dice"])
        if len(weights) != 2 or min(weights) < 0 or not max(weights) > 0:
            raise ValueError(f"weights are two numbers, for {self.entropy_name} and dice, not negative; got {weights}")
        if any(weight < 0 for weight in deep_supervision):
            raise ValueError(f"deep_supervision: weights of auxiliary scores are not negative; got {deep_supervision}")
        self.weights = tuple(float(weight) for weight in weights)
        self.deep_supervision = tuple(float(weight) for weight in deep_supervision)

    def forward(self, scores: Tensor | Sequence[Tensor], mask: Tensor) -> dict[str, Tensor]:
        """``loss_ce`` or ``loss_bce``, and ``loss_dice``, each times its weight.

        Args:
            scores: raw scores (B, K, H, W), or a tuple: these, then auxiliary ones (B, K, h, w).
            mask: (B, H, W): int64 in 0 .. K - 1 for ``dice_ce``, 0 to 1 of any dtype for ``dice_bce``.

        Raises:
            ValueError: shapes that do not fit, values of the mask out of range (looked at on the CPU only, as a GPU
                would have to wait), or auxiliary scores without weights for them.
            TypeError: a soft mask for ``dice_ce``.
        """
        main, *others = [scores] if isinstance(scores, Tensor) else list(scores)
        if others and len(others) != len(self.deep_supervision):
            raise ValueError(
                f"the model gives {len(others)} auxiliary scores, deep_supervision has {len(self.deep_supervision)} "
                "weights: give one for each, or build the model with deep_supervision=False"
            )
        self._check(main, mask)
        with without_autocast(main):
            entropy, dice = self._parts(main.float(), mask)
            for weight, auxiliary in zip(self.deep_supervision, others, strict=False):
                part_entropy, part_dice = self._parts(auxiliary.float(), _resized(mask, auxiliary))
                entropy, dice = entropy + weight * part_entropy, dice + weight * part_dice
            return {f"loss_{self.entropy_name}": self.weights[0] * entropy, "loss_dice": self.weights[1] * dice}

    def _check(self, scores: Tensor, mask: Tensor) -> None:
        expected = (scores.shape[0], *scores.shape[2:])
        if scores.ndim != 4 or tuple(mask.shape) != expected:
            raise ValueError(
                f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} do not fit: (B, K, H, W) and (B, H, W)"
            )
        classes = scores.shape[1]
        if (classes == 1) != (self.kind == "dice_bce"):
            raise ValueError(
                f"{self.kind} got scores of {classes} class{'es' * (classes > 1)}: dice_bce is for num_classes=1, "
                "dice_ce for two and more (background included)"
            )
        if self.kind == "dice_ce" and (mask.is_floating_point() or mask.dtype == torch.bool):
            raise TypeError(f"dice_ce needs a mask of class numbers (int64), got {mask.dtype}")
        if mask.is_cuda or not mask.numel():
            return
        least, most, bound = mask.min().item(), mask.max().item(), max(classes - 1, 1)
        if not 0 <= least <= most <= bound:
            raise ValueError(
                f"the mask has values from {least:g} to {most:g}, the model has num_classes={classes}, which allows 0 "
                f"to {bound}"
            )

    def _parts(self, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Dice loss, without weights."""
        if self.kind == "dice_bce":
            target = mask[:, None].to(scores.dtype)  # (B, 1, H, W)
            return functional.binary_cross_entropy_with_logits(scores, target), binary_dice_loss(scores, target)
        return functional.cross_entropy(scores, mask.long()), dice_loss(scores, mask)


def _resized(mask: Tensor, scores: Tensor) -> Tensor:
    """`mask` (B, H, W) at the size of `scores` (B, K, h, w), each pixel from the middle of its place."""
    sampled = functional.interpolate(mask[:, None].float(), scores.shape[2:], mode="nearest-exact")
    return sampled[:, 0].to(mask.dtype)

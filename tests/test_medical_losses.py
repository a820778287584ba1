"""Losses of medical segmentation against the papers' formulas in NumPy."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from vision_ssm.engine import SegmentationLoss
from vision_ssm.engine.medical_losses import binary_dice_loss, dice_loss

CLASSES = 5


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def formula_ce(scores: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Cross-entropy and Dice loss of K classes, pixel by pixel and class by class."""
    p = softmax(scores)  # (B, K, H, W)
    picked = np.take_along_axis(p, mask[:, None], 1)
    losses = []
    for c in range(scores.shape[1]):
        t = (mask == c).astype(np.float64)
        losses.append(1 - (2 * (p[:, c] * t).sum() + 1e-5) / ((p[:, c] ** 2).sum() + (t**2).sum() + 1e-5))
    return -np.log(picked).mean(), float(np.mean(losses))


def formula_bce(scores: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    p = 1 / (1 + np.exp(-scores[:, 0]))
    bce = -(mask * np.log(p) + (1 - mask) * np.log(1 - p)).mean()
    dice = [(2 * (a * t).sum() + 1) / (a.sum() + t.sum() + 1) for a, t in zip(p, mask, strict=True)]
    return bce, 1 - float(np.mean(dice))


def batch(kind: str, size=(3, 9, 14), seed: int = 0, spread: float = 3.0):
    """Scores and mask; the last class does not occur."""
    rng = np.random.default_rng(seed)
    if kind == "dice_ce":
        return rng.normal(0, spread, (size[0], CLASSES, *size[1:])), rng.integers(0, CLASSES - 1, size)
    return rng.normal(0, spread, (size[0], 1, *size[1:])), rng.random(size).round(2)


FORMULAS = {"dice_ce": formula_ce, "dice_bce": formula_bce}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("size", [(3, 9, 14), (1, 1, 1), (4, 64, 64)])
def test_formula(kind, size):
    scores, mask = batch(kind, size)
    loss = SegmentationLoss(kind)(torch.from_numpy(scores).float(), torch.from_numpy(mask))
    assert list(loss) == [f"loss_{kind.removeprefix('dice_')}", "loss_dice"]
    assert [value.item() for value in loss.values()] == pytest.approx(FORMULAS[kind](scores, mask), rel=2e-6)


def test_hand_computed():
    scores = torch.zeros(1, 2, 1, 2)  # probabilities 1/2
    loss = SegmentationLoss("dice_ce")(scores, torch.tensor([[[0, 1]]]))
    assert loss["loss_ce"].item() == pytest.approx(np.log(2), rel=1e-6)
    assert loss["loss_dice"].item() == pytest.approx(1 - 1 / 1.5, rel=1e-4)  # 2 * 0.5 / (2 * 0.25 + 1)
    loss = SegmentationLoss("dice_bce")(torch.zeros(2, 1, 1, 2), torch.tensor([[[1, 1]], [[0, 0]]]))
    assert loss["loss_dice"].item() == pytest.approx(1 - (3 / 4 + 1 / 2) / 2)  # (2+1)/(1+2+1), then 1/(1+0+1)


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradient_is_that_of_the_formula(kind):
    """Along random directions, by differences of the formula in float64."""
    scores, mask = batch(kind, (2, 6, 7), seed=1, spread=1.0)
    tensor = torch.from_numpy(scores).float().requires_grad_()
    sum(SegmentationLoss(kind, weights=(0.4, 0.6))(tensor, torch.from_numpy(mask)).values()).backward()
    for seed in range(4):
        direction = np.random.default_rng(seed).normal(size=scores.shape)
        values = [np.dot((0.4, 0.6), FORMULAS[kind](scores + step * direction, mask)) for step in (1e-5, -1e-5)]
        along = float((tensor.grad.numpy() * direction).sum())
        assert along == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_a_certain_prediction_of_absent_classes_has_finite_gradients():
    scores = torch.full((1, 3, 4, 4), -1e4)
    scores[:, 0] = 1e4
    scores.requires_grad_()
    sum(SegmentationLoss()(scores, torch.zeros(1, 4, 4, dtype=torch.long)).values()).backward()
    assert scores.grad.isfinite().all()
    binary = torch.full((1, 1, 4, 4), -1e4, requires_grad=True)
    loss = SegmentationLoss("dice_bce")(binary, torch.ones(1, 4, 4))
    sum(loss.values()).backward()
    assert loss["loss_bce"].isfinite() and binary.grad.isfinite().all()


def test_weights_by_order_and_by_name():
    scores, mask = (torch.from_numpy(part) for part in batch("dice_ce"))
    plain = SegmentationLoss()(scores, mask)
    for weights in ((0.4, 0.6), dict(dice=0.6, ce=0.4)):
        weighted = SegmentationLoss(weights=weights)(scores, mask)
        assert weighted["loss_ce"].item() == pytest.approx(0.4 * plain["loss_ce"].item())
        assert weighted["loss_dice"].item() == pytest.approx(0.6 * plain["loss_dice"].item())


@pytest.mark.parametrize("kind", FORMULAS)
def test_deep_supervision_adds_losses_at_lower_resolution(kind):
    scores, mask = batch(kind, (2, 12, 8))
    small, _ = batch(kind, (2, 6, 4), seed=1)
    tiny, _ = batch(kind, (2, 3, 2), seed=2)
    every = [torch.from_numpy(part).float() for part in (scores, small, tiny)]
    loss = SegmentationLoss(kind, deep_supervision=(0.5, 0.25))(tuple(every), torch.from_numpy(mask))
    # the pixel at the middle of each place, downwards and to the right of it where the middle lies between pixels
    expected = np.array(FORMULAS[kind](scores, mask))
    expected += 0.5 * np.array(FORMULAS[kind](small, mask[:, 1::2, 1::2]))
    expected += 0.25 * np.array(FORMULAS[kind](tiny, mask[:, 2::4, 2::4]))
    assert [value.item() for value in loss.values()] == pytest.approx(expected.tolist(), rel=2e-6)
    alone = SegmentationLoss(kind, deep_supervision=(0.5, 0.25))(every[0], torch.from_numpy(mask))  # in evaluation
    assert [value.item() for value in alone.values()] == pytest.approx(FORMULAS[kind](scores, mask), rel=2e-6)


@pytest.mark.parametrize("kind", FORMULAS)
def test_float32_under_autocast(kind):
    scores, mask = batch(kind, (2, 40, 40))
    mask = torch.from_numpy(mask)
    if kind == "dice_bce":
        mask = mask.float()
    net = nn.Conv2d(scores.shape[1], scores.shape[1], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(torch.from_numpy(scores).float())
        loss = SegmentationLoss(kind)(half, mask)
    assert half.dtype == torch.bfloat16 and all(value.dtype == torch.float32 for value in loss.values())
    exact = FORMULAS[kind](half.detach().double().numpy(), mask.numpy())
    assert [value.item() for value in loss.values()] == pytest.approx(exact, rel=2e-6)


def test_hard_masks_of_one_class_may_have_any_dtype():
    scores, mask = batch("dice_bce")
    hard = torch.from_numpy(mask > 0.5)
    values = {
        dtype: SegmentationLoss("dice_bce")(torch.from_numpy(scores).float(), hard.to(dtype))["loss_dice"].item()
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32)
    }
    assert len(set(values.values())) == 1


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD_INPUT = [
    ("dice_ce", zeros(2, 3, 4, 4), zeros(2, 5, 4, dtype=torch.long), ValueError, r"scores \(2, 3, 4, 4\) and mask \(2, 5, 4\) do not fit"),
    ("dice_ce", zeros(2, 3, 4, 4), zeros(2, 1, 4, 4, dtype=torch.long), ValueError, r"mask \(2, 1, 4, 4\) do not fit"),
    ("dice_ce", zeros(2, 3, 4, 4), zeros(2, 4, 4), TypeError, "class numbers.*got torch.float32"),
    ("dice_ce", zeros(2, 3, 4, 4), zeros(2, 4, 4, dtype=torch.long) + 3, ValueError, "from 3 to 3, the model has num_classes=3, which allows 0 to 2"),
    ("dice_ce", zeros(2, 3, 4, 4), zeros(2, 4, 4, dtype=torch.long) - 1, ValueError, "values from -1 to -1"),
    ("dice_ce", zeros(2, 1, 4, 4), zeros(2, 4, 4, dtype=torch.long), ValueError, "scores of 1 class: dice_bce is for num_classes=1"),
    ("dice_bce", zeros(2, 2, 4, 4), zeros(2, 4, 4), ValueError, "scores of 2 classes: dice_bce is for num_classes=1"),
    ("dice_bce", zeros(2, 1, 4, 4), zeros(2, 4, 4) + 255, ValueError, "values from 255 to 255.*allows 0 to 1"),
    ("dice_bce", zeros(2, 1, 4, 4), zeros(2, 4, 4) + float("nan"), ValueError, "values from nan"),
    ("dice_ce", (zeros(2, 3, 4, 4), zeros(2, 3, 2, 2)), zeros(2, 4, 4, dtype=torch.long), ValueError, "1 auxiliary scores, deep_supervision has 0"),
]  # fmt: skip


@pytest.mark.parametrize("kind, scores, mask, error, message", BAD_INPUT)
def test_bad_input(kind, scores, mask, error, message):
    with pytest.raises(error, match=message):
        SegmentationLoss(kind)(scores, mask)


@pytest.mark.parametrize("keywords, message", [
    (dict(kind="dice_cee"), "unknown loss 'dice_cee'. Did you mean 'dice_ce'"),
    (dict(weights=(1.0,)), "two numbers, for ce and dice"),
    (dict(weights=(-1.0, 1.0)), "not negative"),
    (dict(weights=(0.0, 0.0)), "two numbers"),
    (dict(weights=dict(bce=1.0, dice=1.0)), "dict(ce=..., dice=...)"),
    (dict(deep_supervision=(-1.0,)), "not negative"),
])  # fmt: skip
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SegmentationLoss(**keywords)


@pytest.mark.parametrize("kind", FORMULAS)
def test_monai_has_the_same_formula(kind):
    """In float64, where its way through norms does not cost digits."""
    dice = pytest.importorskip("monai.losses.dice").DiceLoss
    scores, mask = (torch.from_numpy(part) for part in batch(kind, (2, 20, 30)))
    if kind == "dice_ce":
        expected = dice(softmax=True, to_onehot_y=True, squared_pred=True, batch=True)(scores, mask[:, None])
        assert dice_loss(scores, mask).item() == pytest.approx(expected.item(), rel=1e-7)  # its one-hot mask is float32
    else:
        expected = dice(sigmoid=True, smooth_nr=1, smooth_dr=1)(scores, mask[:, None])
        assert binary_dice_loss(scores, mask[:, None]).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_whole_batch_keeps_its_digits():
    scores, mask = batch("dice_ce", (16, 128, 128))
    loss = SegmentationLoss()(torch.from_numpy(scores).float(), torch.from_numpy(mask))
    assert [value.item() for value in loss.values()] == pytest.approx(formula_ce(scores, mask), rel=2e-6)

"""Scores of segmented volumes, per foreground class: DSC, IoU, HD95, ASD, sensitivity and specificity.

One rule for empty masks, the same for every class (``rule="defined"``): what would be 0/0 is not defined, is NaN and
stays out of the means. So, for one class of one volume:

=========  ========  ==========  ========  =========  ===========  ===========
outcome    mask      prediction  DSC, IoU  HD95, ASD  sensitivity  specificity
=========  ========  ==========  ========  =========  ===========  ===========
both       has it    has it      value     value      value        value
missed     has it    empty       0         NaN        0            1
false      empty     has it      0         NaN        NaN          value
absent     empty     empty       NaN       NaN        NaN          1
=========  ========  ==========  ========  =========  ===========  ===========

(Specificity is NaN where a class fills the whole volume.) Missed, false and absent ones are counted and shown beside
the means, since a mean distance over fewer volumes says less. MONAI 1.6 agrees, except that its DSC and IoU of a false
class are NaN with ``ignore_empty=True``, those of an absent one 1 with ``ignore_empty=False``, and that its ASD of a
missed or false class is inf.

``rule="paper"`` is the convention of TransUNet's evaluation code, which the tables of VM-UNet (arXiv:2402.02491) and
MSVM-UNet (arXiv:2408.13735) follow, so that published numbers can be compared: a false class scores DSC 1, HD95 0,
IoU 1 and ASD 0, a missed or absent one 0 in all four; distances are in voxels (the spacing is not used); HD95 is the
95th percentile of the distances of both directions together (by default: the larger one of the two directions'
percentiles, as in MONAI); ASD is the mean of the two directions' means (by default: the mean over the distances of
both, as MONAI's symmetric one).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vision_ssm.data.progress import tracked_map
from vision_ssm.registry import suggest

from .medical_surface import surface_distances, surface_voxels

SCORES = ("dice", "iou", "hd95", "asd", "sensitivity", "specificity")
OUTCOMES = ("both", "missed", "false", "absent")
"""Where a class is in a volume: in mask and prediction, in the mask alone, predicted alone, nowhere."""
RULES = ("defined", "paper")
PERCENTILE = 95
MAX_THREADS = 4  # each may hold the surfaces and the feature transform of a whole volume


@dataclass(frozen=True)
class VolumeScores:
    """Scores of one volume, arrays with one entry per foreground class.

    Attributes:
        dice, iou, sensitivity, specificity: float64, 0 to 1; NaN where not defined.
        hd95, asd: float64, in mm; NaN where not defined, or where distances were not asked for.
        reference, predicted: int64, voxels of the class in the mask and in the prediction.
    """

    dice: np.ndarray
    iou: np.ndarray
    hd95: np.ndarray
    asd: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray
    reference: np.ndarray
    predicted: np.ndarray

    @property
    def outcomes(self) -> list[str]:
        """One of `OUTCOMES` per class."""
        return [OUTCOMES[index] for index in 2 * (self.reference == 0) + (self.predicted == 0)]


def check_rule(rule: str) -> None:
    """Raise `ValueError` if there is no such rule for empty masks."""
    if rule not in RULES:
        raise ValueError(f"unknown rule for empty masks {rule!r}.{suggest(str(rule), RULES)}")


def check_spacing(spacing: Sequence[float], case: str = "the volume") -> tuple[float, ...]:
    """The spacing as three numbers; `ValueError` unless they are positive."""
    given = tuple(float(value) for value in spacing)
    if len(given) != 3 or not all(np.isfinite(given)) or min(given) <= 0:
        raise ValueError(
            f"the spacing of {case} is {given}: distances need three positive numbers, mm along depth, height and "
            "width. Correct the file's header, or score without distances."
        )
    return given


def confusion_matrix(prediction: np.ndarray, target: np.ndarray, num_classes: int, case: str = "") -> np.ndarray:
    """Voxels of class (row) that were predicted as class (column).

    Args:
        prediction, target: integers (D, H, W) in 0 .. C - 1.
        num_classes: C, background included.
        case: named in errors.

    Returns:
        (C, C) int64.

    Raises:
        ValueError: different shapes, no voxels, values that are not integers, or labels out of range.
    """
    of_case = f" of {case}" if case else ""
    if prediction.shape != target.shape or prediction.ndim != 3 or not prediction.size:
        raise ValueError(
            f"prediction{of_case} has shape {prediction.shape} and its mask {target.shape}: both must be one (D, H, W)"
        )
    for name, labels in (("prediction", prediction), ("mask", target)):
        if labels.dtype.kind not in "iub":
            raise ValueError(f"the {name}{of_case} holds {labels.dtype}, labels are integers")
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= num_classes:
            raise ValueError(
                f"the {name}{of_case} has labels from {least} to {most}, but num_classes={num_classes} allows 0 to "
                f"{num_classes - 1}: give the right num_classes, or map the labels"
            )
    counts = np.zeros(num_classes * num_classes, dtype=np.int64)
    for truth, found in zip(target, prediction, strict=True):  # slices, so that the sums of indices stay small
        index = truth.ravel().astype(np.int64) * num_classes + found.ravel()
        counts += np.bincount(index, minlength=len(counts))
    return counts.reshape(num_classes, num_classes)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole`` as float64, NaN for 0/0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def region_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """DSC, IoU, sensitivity and specificity of every class from a confusion matrix (C, C); 0/0 is NaN."""
    hits = confusion.diagonal()
    reference, predicted = confusion.sum(1), confusion.sum(0)
    negatives = confusion.sum() - reference
    return dict(
        dice=share(2 * hits, reference + predicted),
        iou=share(hits, reference + predicted - hits),
        sensitivity=share(hits, reference),
        specificity=share(negatives - (predicted - hits), negatives),
    )


def _distances(
    prediction: np.ndarray, target: np.ndarray, count: int, spacing: Sequence[float], rule: str
) -> np.ndarray:
    """HD95 and ASD (2, count), NaN for classes that one of the two does not have."""
    if len(prediction) == 1:  # an image: the surface of a region is its outline in the plane
        prediction, target, spacing = prediction[0], target[0], spacing[1:]
    pairs = list(zip(surface_voxels(prediction, count), surface_voxels(target, count), strict=True))

    def measure(pair: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        if not len(pair[0]) or not len(pair[1]):
            return np.nan, np.nan
        there, back = surface_distances(*pair, spacing)
        both = np.concatenate([there, back])
        if rule == "paper":
            return float(np.percentile(both, PERCENTILE)), float((there.mean() + back.mean()) / 2)
        return max(float(np.percentile(way, PERCENTILE)) for way in (there, back)), float(both.mean())

    threads = max(1, min(torch.get_num_threads(), MAX_THREADS, count))
    return np.array(list(tracked_map(measure, pairs, threads))).reshape(count, 2).T


def score_volume(
    prediction: np.ndarray,
    target: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    distances: bool = True,
    rule: str = "defined",
    case: str = "",
) -> VolumeScores:
    """Scores of each foreground class over a whole volume; the module's text says how empty masks count.

    Args:
        prediction, target: integer labels (D, H, W), 0 for background. In a single slice (D = 1) surfaces are outlines
            in the plane.
        num_classes: classes with the background; 1 and 2 both mean background and one foreground class.
        spacing: mm along D, H and W.
        distances: compute HD95 and ASD, which takes most of the time; else they are NaN.
        rule: ``"defined"`` or ``"paper"``.
        case: named in errors.

    Raises:
        ValueError: different shapes, labels out of range, a spacing that is not positive, an unknown rule.
    """
    check_rule(rule)
    classes = max(num_classes, 2)
    confusion = confusion_matrix(prediction, target, classes, case)
    scores = {name: values[1:] for name, values in region_scores(confusion).items()}
    reference, predicted = confusion.sum(1)[1:], confusion.sum(0)[1:]
    scores["hd95"] = scores["asd"] = np.full(classes - 1, np.nan)
    if distances:
        given = check_spacing(spacing, case or "the volume")
        scores["hd95"], scores["asd"] = _distances(
            prediction, target, classes - 1, (1.0, 1.0, 1.0) if rule == "paper" else given, rule
        )
    if rule == "paper":
        empty = (reference == 0) | (predicted == 0)
        false = (reference == 0) & (predicted > 0)
        for name in ("dice", "iou"):
            scores[name] = np.where(empty, false.astype(np.float64), scores[name])
        if distances:
            for name in ("hd95", "asd"):
                scores[name] = np.where(empty, 0.0, scores[name])
    return VolumeScores(**scores, reference=reference, predicted=predicted)

"""Metrics of medical segmentation on the Runner: volume by volume, or one confusion matrix over the whole set.

`medical_scores` says what the scores are and how empty masks count.
"""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from rich.box import SIMPLE
from rich.table import Table

from vision_ssm.registry import METRICS, suggest

from .checkpoint import write_text
from .medical_scores import (
    OUTCOMES,
    SCORES,
    VolumeScores,
    check_rule,
    confusion_matrix,
    region_scores,
    score_volume,
)

HEADINGS = dict(
    dice="DSC", iou="IoU", hd95="HD95, mm", asd="ASD, mm", sensitivity="sensitivity", specificity="specificity"
)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Means over the first axis without the NaNs; NaN where nothing else is there."""
    defined = ~np.isnan(values)
    count = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


@dataclass
class VolumeEvaluation:
    """Result of one evaluation.

    Attributes:
        classes: names of the foreground classes.
        cases: names of the volumes.
        scores: one `VolumeScores` per volume.
        rule: how empty masks counted.
    """

    classes: tuple[str, ...]
    cases: list[str]
    scores: list[VolumeScores]
    rule: str

    def class_means(self) -> dict[str, np.ndarray]:
        """Per score the mean of each class over the volumes where it is defined; NaN where it never is."""
        return {name: mean_of_defined(np.stack([getattr(row, name) for row in self.scores])) for name in SCORES}

    def means(self) -> dict[str, float]:
        """Per score the mean of `class_means` over the classes where it is defined."""
        return {name: float(mean_of_defined(values)) for name, values in self.class_means().items()}

    def outcome_counts(self) -> dict[str, np.ndarray]:
        """Volumes of each outcome per class, see `medical_scores`."""
        outcomes = np.array([row.outcomes for row in self.scores])  # (volumes, classes)
        return {name: (outcomes == name).sum(0) for name in OUTCOMES}

    def rows(self) -> list[dict[str, Any]]:
        """One dict per volume and class: ``case``, ``class``, ``outcome``, the six scores, ``reference`` and
        ``predicted`` (voxels)."""
        return [
            {
                "case": case,
                "class": name,
                "outcome": scores.outcomes[index],
                **{score: float(getattr(scores, score)[index]) for score in SCORES},
                "reference": int(scores.reference[index]),
                "predicted": int(scores.predicted[index]),
            }
            for case, scores in zip(self.cases, self.scores, strict=True)
            for index, name in enumerate(self.classes)
        ]

    def write_csv(self, path: str | os.PathLike) -> None:
        """Write `rows` into a file; a score that is not defined is an empty field."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            undefined = [name for name in SCORES if np.isnan(row[name])]
            writer.writerow({**row, **dict.fromkeys(undefined, "")})
        write_text(text.getvalue(), Path(path))

    def table(self, title: str = "Segmentation") -> Table:
        """Scores per class, their mean, and in how many volumes each class was missed, false or absent."""
        means, counts, overall = self.class_means(), self.outcome_counts(), self.means()
        shown = [name for name in SCORES if not np.isnan(means[name]).all()]
        in_voxels = self.rule == "paper"
        table = Table(title=f"{title}, {len(self.cases)} volumes", title_justify="left", box=SIMPLE)
        table.add_column("class")
        for name in shown:
            table.add_column(HEADINGS[name].replace("mm", "voxels") if in_voxels else HEADINGS[name], justify="right")
        for name in OUTCOMES[1:]:
            table.add_column(name, justify="right")
        for index, name in enumerate(self.classes):
            numbers = [_number(score, means[score][index]) for score in shown]
            table.add_row(name, *numbers, *(str(counts[outcome][index]) for outcome in OUTCOMES[1:]))
        table.add_section()
        totals = [str(counts[outcome].sum()) for outcome in OUTCOMES[1:]]
        table.add_row("mean", *(_number(score, overall[score]) for score in shown), *totals)
        return table


def _number(score: str, value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{value:.2f}" if score in ("hd95", "asd") else f"{value:.4f}"


def class_names(meta: dict | None, num_classes: int | None, metric: str) -> tuple[str, ...]:
    """Names of all classes, background first, from a dataset's metainfo or as numbers.

    Raises:
        ValueError: neither is known, or they contradict each other.
    """
    named = tuple((meta or {}).get("classes", ()))
    if num_classes is None and not named:
        raise ValueError(f"{metric} does not know the classes: set num_classes, or give the dataset metainfo classes")
    count = max(num_classes or len(named), 2)
    if named and len(named) != count:
        raise ValueError(
            f"{metric} has num_classes={num_classes}, the dataset names {len(named)} classes ({', '.join(named)}): "
            "background counts as one"
        )
    return named or ("background", *map(str, range(1, count)))


def labels_of(sample: dict, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and mask of a sample; `ValueError` naming the case where it has no mask."""
    if sample.get("target") is None:
        raise ValueError(f"{metric}: volume {sample['case']} has no mask, so its prediction cannot be scored")
    return np.asarray(sample["prediction"]), np.asarray(sample["target"])


@METRICS.register_module()
class VolumeMetric(BaseMetric):
    """Scores of whole volumes: mean over volumes per class, then over the foreground classes.

    Gives ``dice``, ``iou``, ``sensitivity``, ``specificity`` (0 to 1), ``hd95``, ``asd`` (mm), the same per class as
    ``dice/liver`` where there are several, and ``missed``, ``false`` and ``absent``, how many pairs of volume and class
    were so. What is not defined is left out. Every volume counts once, also when several processes share the work.
    After `evaluate`, the attribute `evaluation` of the main process holds a `VolumeEvaluation`.

    Args:
        num_classes: classes with the background; by default those that the dataset names.
        distances: compute ``hd95`` and ``asd``.
        rule: how empty masks count, ``"defined"`` or ``"paper"``; `medical_scores` states both.
        per_class: scores that are also given per class; all of them are in `evaluation`.
        out_file: also write a csv with one line per volume and class.
        prefix: put before the names, with a slash.
    """

    default_prefix = ""

    def __init__(
        self,
        num_classes: int | None = None,
        distances: bool = True,
        rule: str = "defined",
        per_class: Sequence[str] = ("dice", "hd95"),
        out_file: str | None = None,
        prefix: str | None = None,
    ) -> None:
        # Results travel through the process group; mmengine's other way leaves a folder of pickles where it runs.
        super().__init__(collect_device="gpu", prefix=prefix)
        check_rule(rule)
        unknown = [name for name in per_class if name not in SCORES]
        if unknown:
            raise ValueError(f"per_class names no score with {unknown[0]!r}.{suggest(str(unknown[0]), SCORES)}")
        self.num_classes = num_classes
        self.distances = distances
        self.rule = rule
        self.per_class = tuple(per_class)
        self.out_file = out_file
        self.evaluation: VolumeEvaluation | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Score ``dict(case, prediction (D, H, W), target (D, H, W), spacing in mm)`` samples.

        Raises:
            ValueError: a volume that cannot be scored, see `score_volume`; it is named.
        """
        count = len(class_names(self.dataset_meta, self.num_classes, type(self).__name__))
        for sample in data_samples:
            prediction, target = labels_of(sample, type(self).__name__)
            scores = score_volume(
                prediction, target, count, sample["spacing"], self.distances, self.rule, sample["case"]
            )
            self.results.append(dict(case=sample["case"], scores=vars(scores)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics over the volumes of all processes; called in the main process.

        Raises:
            ValueError: no mask of any volume has a foreground class.
        """
        names = class_names(self.dataset_meta, self.num_classes, type(self).__name__)[1:]
        cases = [result["case"] for result in results]
        evaluation = VolumeEvaluation(names, cases, [VolumeScores(**row["scores"]) for row in results], self.rule)
        check_any_reference(sum(int(row.reference.sum()) for row in evaluation.scores), cases)
        metrics = evaluation.means()
        if len(names) > 1:
            for score, values in evaluation.class_means().items():
                if score in self.per_class:
                    metrics |= {f"{score}/{name}": float(value) for name, value in zip(names, values, strict=True)}
        metrics = {name: value for name, value in metrics.items() if not np.isnan(value)}
        counts = evaluation.outcome_counts()
        metrics |= {name: float(counts[name].sum()) for name in OUTCOMES[1:]}
        self.evaluation = evaluation
        if self.out_file is not None:
            evaluation.write_csv(self.out_file)
        return metrics


def check_any_reference(voxels: int, cases: Sequence[str]) -> None:
    """Raise `ValueError` if all masks together have no foreground voxel."""
    if not voxels:
        listed = ", ".join(cases[:4]) + (", ..." if len(cases) > 4 else "")
        raise ValueError(
            f"the masks of all {len(cases)} volumes ({listed}) are empty, so nothing can be scored: are these the "
            "right files, and are the labels those of this data set?"
        )


@METRICS.register_module()
class GlobalMetric(BaseMetric):
    """The rule of ISIC papers (VM-UNet, arXiv:2402.02491): one confusion matrix over all pixels of the set.

    Gives ``miou``, ``dice``, ``sensitivity``, ``specificity`` and ``accuracy``, 0 to 1. The first four are those of the
    foreground; with several foreground classes, their means over the classes that occur. Large images weigh more. After
    `evaluate`, the attribute `confusion` of the main process holds the matrix (C, C) int64, rows for the mask.

    Args:
        num_classes: classes with the background; by default those that the dataset names.
        prefix: put before the names, with a slash.
    """

    default_prefix = ""

    def __init__(self, num_classes: int | None = None, prefix: str | None = None) -> None:
        super().__init__(collect_device="gpu", prefix=prefix)
        self.num_classes = num_classes
        self.confusion: np.ndarray | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count ``dict(case, prediction (D, H, W), target (D, H, W))`` samples.

        Raises:
            ValueError: labels out of range, no mask, or different shapes; the case is named.
        """
        count = len(class_names(self.dataset_meta, self.num_classes, type(self).__name__))
        for sample in data_samples:
            prediction, target = labels_of(sample, type(self).__name__)
            counts = confusion_matrix(prediction, target, count, sample["case"])
            self.results.append(dict(case=sample["case"], confusion=counts))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics over the pixels of all processes; called in the main process.

        Raises:
            ValueError: no mask has a foreground class.
        """
        confusion = np.sum([result["confusion"] for result in results], axis=0)
        check_any_reference(int(confusion[1:].sum()), [result["case"] for result in results])
        scores = region_scores(confusion)
        means = {name: float(mean_of_defined(values[1:])) for name, values in scores.items()}
        metrics = {"miou" if name == "iou" else name: value for name, value in means.items()}
        metrics["accuracy"] = float(confusion.trace() / confusion.sum())
        self.confusion = confusion
        return {name: value for name, value in metrics.items() if not np.isnan(value)}

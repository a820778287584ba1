"""Classification metrics: top-1, top-5, mean per-class accuracy, cross-entropy; and what tables and pictures need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.evaluator import BaseMetric
from torch.nn import functional

from vision_ssm.registry import METRICS


class Prediction(NamedTuple):
    """What is kept of one image: its file, label, predicted class, the label's rank (0: top-1 correct), the predicted
    class's probability, and the cross-entropy of the label."""

    path: str
    label: int
    predicted: int
    rank: int
    confidence: float
    loss: float


def format_metric(value: float) -> str:
    """A metric for reading: two digits for percentages, four for shares."""
    return f"{value:.2f}" if abs(value) > 1 else f"{value:.4f}"


@dataclass
class Evaluation:
    """Result of one evaluation.

    Attributes:
        classes: names of the C classes.
        predictions: one per image, in the order of the dataset.
        confusion: (C, C) int64, images of class (row) that were predicted as class (column).
    """

    classes: tuple[str, ...]
    predictions: list[Prediction]
    confusion: torch.Tensor

    def per_class(self) -> list[dict[str, Any]]:
        """Per class: name, images, correct, accuracy in % (NaN without images), and the class it is most taken for."""
        rows = []
        for index, name in enumerate(self.classes):
            row = self.confusion[index].clone()
            images, correct = int(row.sum()), int(row[index])
            row[index] = 0
            mistaken = self.classes[int(row.argmax())] if row.any() else ""
            accuracy = 100 * correct / images if images else float("nan")
            rows.append(dict(name=name, images=images, correct=correct, accuracy=accuracy, mistaken_for=mistaken))
        return rows


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """``top1``, ``top5`` (with more than five classes), ``mean_class_accuracy`` (all in %) and ``cross_entropy``.

    Every image counts once, also when several processes share the work. After `evaluate`, the attribute `evaluation`
    of the main process holds an `Evaluation`.

    Args:
        topk: the k of the top-k accuracies.
        prefix: put before the names, with a slash.
    """

    default_prefix = ""

    def __init__(self, topk: Sequence[int] = (1, 5), prefix: str | None = None) -> None:
        # Results travel through the process group; mmengine's other way leaves a folder of pickles where it runs.
        super().__init__(collect_device="gpu", prefix=prefix)
        self.topk = tuple(topk)
        self.evaluation: Evaluation | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Reduce a batch of ``dict(logits (C,), label, path)`` to one `Prediction` per image.

        Raises:
            ValueError: a label outside of 0 .. C - 1; its file is named.
        """
        logits = torch.stack([sample["logits"] for sample in data_samples]).float()  # (B, C)
        count = logits.shape[1]
        for sample in data_samples:
            if not 0 <= sample["label"] < count:
                raise ValueError(
                    f"label {sample['label']} of {sample['path']} is out of range: the model has {count} classes"
                )
        label = torch.tensor([sample["label"] for sample in data_samples], device=logits.device)[:, None]  # (B, 1)
        own = logits.gather(1, label)
        before = torch.arange(count, device=logits.device) < label  # equal logits rank in the order of the classes
        rank = ((logits > own) | ((logits == own) & before)).sum(1)
        rank[~logits.isfinite().all(1)] = count  # NaN compares as no class being better
        confidence, predicted = logits.softmax(1).max(1)
        loss = functional.cross_entropy(logits, label[:, 0], reduction="none")
        columns = (label[:, 0].tolist(), predicted.tolist(), rank.tolist(), confidence.tolist(), loss.tolist())
        self.class_count = count
        self.results += [Prediction(sample["path"], *row) for sample, *row in zip(data_samples, *columns, strict=True)]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics over the images of all processes; called in the main process."""
        results = [Prediction(*result) for result in results]  # mmengine has made plain tuples of them
        count = self.class_count
        label = torch.tensor([result.label for result in results])
        predicted = torch.tensor([result.predicted for result in results])
        rank = torch.tensor([result.rank for result in results])
        confusion = torch.bincount(label * count + predicted, minlength=count * count).view(count, count)
        names = tuple((self.dataset_meta or {}).get("classes", ()))
        names += tuple(f"class {index}" if names else str(index) for index in range(len(names), count))
        self.evaluation = Evaluation(names, results, confusion)
        present = confusion.sum(1) > 0
        accuracies = confusion.diagonal()[present] / confusion.sum(1)[present]
        metrics = {f"top{k}": (rank < k).float().mean().item() * 100 for k in self.topk if k == 1 or k < count}
        metrics["mean_class_accuracy"] = accuracies.mean().item() * 100
        metrics["cross_entropy"] = sum(result.loss for result in results) / len(results)
        return metrics


def find_evaluation(evaluator: Any) -> Evaluation | None:
    """The `Evaluation` of an mmengine evaluator's `ClassificationMetric`, where there is one."""
    for metric in evaluator.metrics:
        if isinstance(metric, ClassificationMetric):
            return metric.evaluation
    return None

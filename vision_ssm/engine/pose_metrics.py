"""COCO's average precision of keypoints, and a picture of the predictions.

Definitions: https://cocodataset.org/#keypoints-eval. The score of a person is its box's score times the mean score of
its clear keypoints, and of persons found twice the better one is kept, as Papandreou et al. (arXiv:1701.01779) and Xiao
et al. (arXiv:1804.06208) do.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner

from vision_ssm.data import KeypointSet
from vision_ssm.registry import HOOKS, METRICS

from .checkpoint import write_text
from .hooks import finished, position_in_words
from .pose_figures import draw_pose_grid

NUMBERS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")
"""The ten numbers of COCO's evaluation, in its order: mean over OKS 0.50 .. 0.95, at 0.50, at 0.75, and the mean for
persons of medium (32^2 to 96^2 pixels) and of large area; precision, then recall."""


class PosePrediction(NamedTuple):
    """What is kept of one person: its number in the dataset, image, file, keypoints (K, 2) in pixels, their scores
    (K,), the box's score and the area of its region in pixels."""

    number: int
    image_id: int
    path: str
    keypoints: np.ndarray
    scores: np.ndarray
    box_score: float
    area: float


@dataclass
class PoseEvaluation:
    """Result of one evaluation.

    Attributes:
        definition: the keypoints.
        images: file and persons of each image, best person first; a person is a dict with ``keypoints`` (K, 2),
            ``scores`` (K,) and ``score``.
        metrics: the numbers.
    """

    definition: KeypointSet
    images: list[tuple[str, list[dict[str, Any]]]]
    metrics: dict[str, float]


def object_keypoint_similarity(
    keypoints: np.ndarray, reference: np.ndarray, area: np.ndarray | float, sigmas: Sequence[float]
) -> np.ndarray:
    """COCO's OKS: the mean over keypoints of ``exp(-d^2 / (2 area (2 sigma)^2))``, d being their distances.

    Args:
        keypoints: (..., K, 2). reference: (K, 2). area: (...) or one number, of the object. sigmas: K.

    Returns:
        (...), 1 for equal keypoints.
    """
    distance = ((keypoints - reference) ** 2).sum(-1)  # (..., K)
    spread = 2 * np.asarray(area, dtype=np.float64)[..., None] * (2 * np.asarray(sigmas)) ** 2
    return np.exp(-distance / np.maximum(spread, np.finfo(np.float64).tiny)).mean(-1)


def oks_nms(
    keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: Sequence[float], threshold: float
) -> list[int]:
    """Numbers of the persons to keep, best first: each drops the worse ones whose OKS with it exceeds `threshold`.

    Args:
        keypoints: (N, K, 2). scores, areas: (N,); the area of a pair is the mean of both.
        sigmas: K. threshold: between 0 and 1.
    """
    waiting = np.argsort(-scores, kind="stable")
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        area = (areas[best] + areas[waiting]) / 2
        similarity = object_keypoint_similarity(keypoints[waiting], keypoints[best], area, sigmas)
        waiting = waiting[similarity <= threshold]
    return kept


def person_score(prediction: PosePrediction, threshold: float) -> float:
    """The box's score times the mean score of the keypoints above `threshold`; 0 if there are none."""
    clear = prediction.scores[prediction.scores > threshold]
    return float(prediction.box_score * clear.mean()) if len(clear) else 0.0


@METRICS.register_module()
class CocoKeypointMetric(BaseMetric):
    """``coco/AP``, ``coco/AP50`` and so on, see `NUMBERS`; all between 0 and 1, and left out where no annotated person
    has such a size.

    Every person counts once, also when several processes share the work. After `evaluate`, the attribute `evaluation`
    of the main process holds a `PoseEvaluation`.

    Args:
        ann_file: annotation file with the truth; by default that of the dataset.
        keypoint_threshold: keypoints of a lower score do not count in a person's score.
        nms: OKS above which two predictions are one person; None: all are kept.
        out_file: also write the predictions in COCO's format, as its evaluation server takes them.
        prefix: put before the names, with a slash.

    Raises:
        ImportError: pycocotools is not installed.
    """

    default_prefix = "coco"

    def __init__(
        self,
        ann_file: str | None = None,
        keypoint_threshold: float = 0.2,
        nms: float | None = 0.9,
        out_file: str | None = None,
        prefix: str | None = None,
    ) -> None:
        # Results travel through the process group; mmengine's other way leaves a folder of pickles where it runs.
        super().__init__(collect_device="gpu", prefix=prefix)
        try:
            import pycocotools  # noqa: F401
        except ImportError as error:
            raise ImportError("the evaluation of keypoints needs pycocotools: pip install pycocotools") from error
        if nms is not None and not 0 < nms <= 1:
            raise ValueError(f"nms is an object keypoint similarity above 0 and at most 1, or None, got {nms!r}")
        self.ann_file = ann_file
        self.keypoint_threshold = keypoint_threshold
        self.nms = nms
        self.out_file = out_file
        self.evaluation: PoseEvaluation | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep the results of `TopDownPose` on a batch."""
        self.results += [
            PosePrediction(
                sample["index"], sample["image_id"], sample["path"], np.asarray(sample["keypoints"], dtype=np.float64),
                np.asarray(sample["scores"], dtype=np.float64), sample["box_score"], sample["area"],
            )
            for sample in data_samples
        ]  # fmt: skip

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics over the persons of all processes; called in the main process.

        Raises:
            ValueError: no annotation file is known, or the model's keypoints are not those of the dataset.
        """
        meta = dict(self.dataset_meta or {})
        ann_file = self.ann_file or meta.get("ann_file")
        if ann_file is None:
            raise ValueError("CocoKeypointMetric knows no annotation file: set ann_file, or let the dataset name one")
        names = KeypointSet.__dataclass_fields__
        given = {key: value for key, value in meta.items() if key in names}
        definition = KeypointSet.build(given or None)
        # mmengine has made plain tuples of them; a sampler may repeat the first persons at the end of an epoch
        persons = list({result[0]: PosePrediction(*result) for result in results}.values())
        if persons[0].keypoints.shape[0] != len(definition):
            raise ValueError(
                f"the model gives {persons[0].keypoints.shape[0]} keypoints, the dataset has {len(definition)}: give "
                "the model the same keypoints=..."
            )
        groups: dict[int, list[PosePrediction]] = {}
        for person in persons:
            groups.setdefault(person.image_id, []).append(person)
        category = meta.get("category_id", 1)
        images, rows = [], []
        for image_id, group in groups.items():
            found = self._ranked(group, definition)
            images.append((group[0].path, found))
            rows += [_coco_row(image_id, category, person) for person in found]
        if self.out_file is not None:
            write_text(json.dumps(rows) + "\n", Path(self.out_file))
        metrics = evaluate_keypoints(ann_file, rows, definition, category)
        self.evaluation = PoseEvaluation(definition, images, metrics)
        return metrics

    def _ranked(self, group: list[PosePrediction], definition: KeypointSet) -> list[dict[str, Any]]:
        """The persons of one image, each once, best first."""
        scores = np.array([person_score(person, self.keypoint_threshold) for person in group])
        if self.nms is None:
            kept = np.argsort(-scores, kind="stable").tolist()
        else:
            points = np.stack([person.keypoints for person in group])
            areas = np.array([person.area for person in group])
            kept = oks_nms(points, scores, areas, definition.sigmas, self.nms)
        return [
            dict(keypoints=group[number].keypoints, scores=group[number].scores, score=float(scores[number]))
            for number in kept
        ]


def _coco_row(image_id: int, category: int, person: dict[str, Any]) -> dict[str, Any]:
    values = np.column_stack([person["keypoints"], person["scores"]])  # (K, 3)
    return dict(image_id=image_id, category_id=category, keypoints=values.ravel().tolist(), score=person["score"])


def evaluate_keypoints(
    ann_file: str | Path, rows: list[dict[str, Any]], definition: KeypointSet, category: int = 1
) -> dict[str, float]:
    """COCO's numbers for predictions in COCO's format, see `NUMBERS`.

    Args:
        ann_file: annotation file with the truth.
        rows: dicts with ``image_id``, ``category_id``, ``keypoints`` (x, y, score of each) and ``score``.
        definition: the keypoints, for their sigmas.
        category: id of the category that has them.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = json.loads(Path(ann_file).read_text(encoding="utf-8"))
    for number, annotation in enumerate(truth.dataset["annotations"], start=1):
        annotation["id"] = number  # the evaluation takes a match with number 0 for none
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("num_keypoints", int(np.count_nonzero(annotation.get("keypoints", ())[2::3])))
    with contextlib.redirect_stdout(io.StringIO()):  # progress that nobody asked for
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(rows), "keypoints")
        evaluator.params.catIds = [category]
        evaluator.params.kpt_oks_sigmas = np.array(definition.sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    values = zip(NUMBERS, evaluator.stats.tolist(), strict=True)
    return {name: value for name, value in values if value >= 0}  # -1: no such person


@HOOKS.register_module()
class PosePicturesHook(Hook):
    """Draws poses.png, images with the skeletons found on them, after the last validation and after a test.

    Args:
        every_epochs: also after every so many epochs; None for the end only.
        count: images in the grid, spread over the data set.
        least: persons of a lower score are not drawn.
    """

    priority = "LOW"

    def __init__(self, every_epochs: int | None = None, count: int = 16, least: float = 0.2) -> None:
        self.every_epochs = every_epochs
        self.count = count
        self.least = least

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if finished(runner) or (self.every_epochs is not None and runner.epoch % self.every_epochs == 0):
            self.draw(runner.val_evaluator, Path(runner.work_dir), f"Validation after {position_in_words(runner)}")

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.draw(runner.test_evaluator, Path(runner.work_dir), "Test")

    def draw(self, evaluator: Any, folder: Path, title: str) -> None:
        """Write the picture of the evaluation that `evaluator` has just done."""
        found = (metric.evaluation for metric in evaluator.metrics if isinstance(metric, CocoKeypointMetric))
        evaluation = next(found, None)
        if evaluation is None or not is_main_process():
            return
        count = len(evaluation.images)
        shown = min(self.count, count)
        pictures = [evaluation.images[(2 * place + 1) * count // (2 * shown)] for place in range(shown)]
        kept = [(file, [person for person in persons if person["score"] >= self.least]) for file, persons in pictures]
        heading = f"{title}: AP {evaluation.metrics['AP']:.3f}" if "AP" in evaluation.metrics else title
        draw_pose_grid(kept, folder / "poses.png", heading, evaluation.definition)

"""Segmentation and detection models of mmseg and mmdet: predictions for image files, and pictures of them."""

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization import BaseVisBackend, Visualizer
from PIL import Image

from vision_ssm.data import UnreadableImageError, load_image
from vision_ssm.registry import HOOKS
from vision_ssm.weights import unwrap

from . import figures
from .checkpoint import read_training
from .config import UsageError, checked_device
from .hooks import finished, position_in_words
from .whole_model import has_heads, load_whole_model, short_misfits

LEAST_SIDE = 512
"""Longer side, in pixels, from which a picture is drawn as large as it is."""
TASKS = {"mmseg": "segmentation", "mmdet": "detection"}


def dense_task(cfg: Config) -> str | None:
    """``"segmentation"`` or ``"detection"`` for configs of mmseg and mmdet, None for others."""
    return TASKS.get(cfg.get("default_scope", ""))


class _KeptPicture(BaseVisBackend):
    """Back end of a visualizer that holds the last picture instead of storing it."""

    picture: np.ndarray

    def __init__(self) -> None:
        super().__init__("")

    @property
    def experiment(self) -> "_KeptPicture":
        return self

    def _init_env(self) -> None:
        """Nothing to set up."""

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        self.picture = image


def _local_visualizer(task: str) -> type[Visualizer]:
    if task == "segmentation":
        from mmseg.visualization import SegLocalVisualizer

        class Quick(SegLocalVisualizer):
            """Puts the names of classes where mmseg does, which sorts all pixels of a class as a list for that."""

            def _get_center_loc(self, mask: np.ndarray) -> np.ndarray:
                inside = mask == 1  # (H, W)
                row = inside.sum(1).argmax()
                columns = np.flatnonzero(inside[row])
                return np.array([columns[len(columns) // 2], row])

        return Quick
    from mmdet.visualization import DetLocalVisualizer

    return DetLocalVisualizer


def enlarged(sample: Any, factor: int) -> Any:
    """A copy of a data sample for its image enlarged `factor` times: maps, boxes and masks with it."""
    if factor == 1:
        return sample
    copied = sample.clone()
    for name in copied.keys():
        part = getattr(copied, name)
        if name.endswith("_sem_seg"):
            data = part.data.repeat_interleave(factor, -2).repeat_interleave(factor, -1)  # (1, H, W), both larger
            setattr(copied, name, PixelData(data=data))
        elif name.endswith("_instances"):
            values = dict(part.items())
            if "bboxes" in values:
                values["bboxes"] = values["bboxes"] * factor
            masks = values.get("masks")
            if isinstance(masks, torch.Tensor):  # (N, H, W), both larger
                values["masks"] = masks.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
            elif masks is not None:
                values["masks"] = masks.resize((masks.height * factor, masks.width * factor))
            setattr(copied, name, InstanceData(**values))
    return copied


class SampleDrawer:
    """Draws results over their images: class colours, or boxes, instance masks, names and scores.

    Small images are enlarged, so that there is room for names.

    Args:
        task: ``"segmentation"`` or ``"detection"``.
        dataset_meta: dict with ``classes`` and, where colours are given, ``palette``.
        threshold: lowest score of a drawn instance.
    """

    def __init__(self, task: str, dataset_meta: dict, threshold: float = 0.3) -> None:
        self.kept = _KeptPicture()
        self.options = {} if task == "segmentation" else {"pred_score_thr": threshold}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a visualizer without a folder warns; this one writes nothing
            self.visualizer = _local_visualizer(task)(vis_backends=[self.kept], save_dir="")
        meta = dict(dataset_meta)
        if isinstance(meta.get("palette"), (list, tuple)):
            meta["palette"] = [tuple(colour) for colour in meta["palette"]]  # mmdet takes no lists
        self.visualizer.dataset_meta = meta

    def __call__(self, image: np.ndarray, sample: Any, truth: bool = False) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB; sample: a data sample. Returns the picture; with `truth`, truth left of it."""
        factor = max(1, math.ceil(LEAST_SIDE / max(image.shape[:2])))
        image, sample = image.repeat(factor, 0).repeat(factor, 1), enlarged(sample, factor)
        self.visualizer.add_datasample("sample", image, sample, draw_gt=truth, show=False, **self.options)
        return self.kept.picture


def summarise(task: str, sample: Any, classes: Sequence[str], threshold: float = 0.3) -> list[tuple[str, str]]:
    """What a prediction holds: classes by the share of the image they cover, or by number and best score."""
    if task == "segmentation":
        labels = sample.pred_sem_seg.data.flatten()
        counts = torch.bincount(labels.clamp_max(len(classes)), minlength=len(classes))[: len(classes)].tolist()
        shares = sorted(((count / labels.numel(), name) for count, name in zip(counts, classes)), reverse=True)
        return [(name, f"{100 * share:.1f} %") for share, name in shares if share > 0]
    found = sample.pred_instances
    scores: dict[str, list[float]] = {}
    for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True):
        if score >= threshold:
            scores.setdefault(classes[label], []).append(score)
    ranked = sorted(scores.items(), key=lambda item: -max(item[1]))
    return [(name, f"{len(values)} x, best {max(values):.2f}") for name, values in ranked]


def _metainfo(dataset: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """What a data set of a config says of its classes: the config, or else its class."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        own = registry.get(dataset["type"])
    return {**getattr(own, "METAINFO", {}), **(dataset.get("metainfo") or {})}


class DensePredictor:
    """A segmentor or detector in eval mode with the test pipeline of its config.

    Args:
        cfg: config with ``default_scope`` mmseg or mmdet and a test data set.
        checkpoint: checkpoint of a training run of that config, or official weights of its model.
        device: where to compute; a GPU if there is one by default.

    Raises:
        UsageError: the config is not one of mmseg or mmdet. CheckpointError: the checkpoint does not fit.
    """

    def __init__(self, cfg: Config, checkpoint: str | Path, device: str | None = None) -> None:
        task = dense_task(cfg)
        if task is None:
            raise UsageError(f"a config of mmseg or mmdet is needed, this one is of {cfg.get('default_scope')!r}")
        self.task = task
        state = read_training(checkpoint)
        options = copy.deepcopy(cfg.model)
        if isinstance(options.get("backbone"), dict):
            options["backbone"]["init_cfg"] = None  # every weight comes from the checkpoint
        dataset = (cfg.get("test_dataloader") or cfg.val_dataloader).dataset
        steps = cfg.get("test_pipeline") or dataset.pipeline
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.model = MODELS.build(options)
            self.pipeline = Compose([step for step in steps if step["type"].split(".")[-1] != "LoadAnnotations"])
        if has_heads(self.model):
            load_whole_model(self.model, unwrap(state, str(checkpoint)), str(checkpoint))
        else:  # a backbone of mmseg, mmdet or timm
            with short_misfits(checkpoint):
                self.model.load_state_dict(state["state_dict"])
        self.device = checked_device(device)
        self.model.eval().to(self.device)
        meta = (state.get("meta") or {}).get("dataset_meta") or {}
        self.dataset_meta = meta if meta.get("classes") else _metainfo(dataset, cfg.default_scope)
        if not self.dataset_meta.get("classes"):
            raise UsageError(f"neither {checkpoint} nor the config's test data set (metainfo) names the classes")
        self.classes = tuple(self.dataset_meta["classes"])

    @torch.inference_mode()
    def __call__(self, files: Sequence[str | Path]) -> dict[str, Any]:
        """The data sample of each image, by file. Unreadable images are left out with a warning each."""
        results = {}
        for file in files:
            try:
                load_image(str(file), 3)
            except UnreadableImageError as error:
                warnings.warn(f"{error}; left out", stacklevel=2)
                continue
            data = self.pipeline(dict(img_path=str(file), img_id=0))
            data = {key: [value] for key, value in data.items()}
            results[str(file)] = self.model.test_step(data)[0].cpu()
        return results


def picture_of(file: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8."""
    return np.asarray(load_image(str(file), 3).convert("RGB"))


@HOOKS.register_module()
class DensePicturesHook(Hook):
    """Draws predictions.png, truth beside prediction, after the last validation and after a test.

    Args:
        count: images in the picture.
        threshold: lowest score of a drawn instance.
        every: also after every so many validations; None for the end only.
    """

    priority = "LOW"

    def __init__(self, count: int = 8, threshold: float = 0.5, every: int | None = None) -> None:
        if count < 1 or (every is not None and every < 1):
            raise ValueError(f"count and every must be at least 1, got {count} and {every}")
        self.count = count
        self.threshold = threshold
        self.every = every
        self.validations = 0
        self.samples: list[Any] = []

    def _wanted(self, runner: Runner) -> bool:
        due = self.every is not None and (self.validations + 1) % self.every == 0
        return is_main_process() and (finished(runner) or due)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._wanted(runner):
            self._keep(outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if is_main_process():
            self._keep(outputs)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.draw(runner, runner.val_dataloader.dataset, f"Validation after {position_in_words(runner)}")
        self.validations += 1

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.draw(runner, runner.test_dataloader.dataset, "Test")

    def _keep(self, outputs: Sequence[Any]) -> None:
        room = self.count - len(self.samples)
        self.samples += [sample.cpu() for sample in list(outputs)[: max(room, 0)]]

    def draw(self, runner: Runner, dataset: Any, title: str) -> None:
        """Write predictions.png of the samples that were kept, and forget them."""
        samples, self.samples = self.samples, []
        if not samples:
            return
        task = dense_task(runner.cfg)
        if task is None:
            runner.logger.log(logging.WARNING, "DensePicturesHook draws for mmseg and mmdet configs only")
            return
        drawer = SampleDrawer(task, dataset.metainfo, self.threshold)
        pictures = [(Path(item.img_path).name, drawer(picture_of(item.img_path), item, truth=True)) for item in samples]
        note = "truth left, prediction right"
        figures.draw_pictures(pictures, Path(runner.work_dir) / "predictions.png", f"{title}: {note}")


def save_pictures(pictures: Sequence[tuple[str, np.ndarray]], folder: str | Path) -> None:
    """One png per picture into `folder`, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    width = len(str(len(pictures)))
    taken: set[str] = set()
    for number, (name, picture) in enumerate(pictures):
        stem = Path(name).stem
        if stem in taken:  # equal names from different folders
            stem = f"{stem}_{number:0{width}}"
        taken.add(stem)
        Image.fromarray(picture).save(folder / f"{stem}.png")

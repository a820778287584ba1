"""What can be wrong with a segmentation or detection config and its data, found before anything is trained."""

import logging
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope

from vision_ssm.data.check_dense import DenseReport, check_coco, check_segmentation, raise_for_problems

from .dense import dense_task

_UNEVEN = ("AspectRatioBatchSampler", "mmdet.AspectRatioBatchSampler")


def _inner(dataset: dict) -> list[dict]:
    """The data sets inside of wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    if "datasets" in dataset:
        return [found for part in dataset["datasets"] for found in _inner(part)]
    return _inner(dataset["dataset"]) if "dataset" in dataset else [dataset]


def _report(dataset: dict, label: str) -> DenseReport | None:
    """Report on the files of one data set, or None for a kind that has no check."""
    # Not read yet: the class itself says which folders, suffixes and class names its options amount to.
    unread = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True})
    folders, classes = unread.data_prefix, unread.metainfo.get("classes")
    if "seg_map_path" in folders:
        return check_segmentation(
            folders["img_path"],
            folders["seg_map_path"],
            image_suffix=unread.img_suffix,
            map_suffix=unread.seg_map_suffix,
            num_classes=len(unread.label_map or classes),
            reduce_zero_label=unread.reduce_zero_label,
            ignore_index=unread.ignore_index,
            names_file=unread.ann_file or None,
            label=label,
        )
    if unread.ann_file.endswith(".json"):
        return check_coco(unread.ann_file, folders.get("img", ""), classes=classes, label=label)
    return None


def check_dense_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check the files that the data sets of these loaders name, quickly; warnings are logged.

    Raises:
        DenseDataError: files are missing or contradict each other; the first problems are named.
    """
    datasets: dict[str, tuple[str, dict]] = {}  # validation and test often read the same
    for loader in loaders:
        if cfg.get(loader) is not None:
            for dataset in _inner(cfg[loader].dataset.to_dict()):
                label = f"{loader.removesuffix('_dataloader')} data"
                files = [dataset.get(key) for key in ("data_root", "data_prefix", "ann_file")]
                datasets.setdefault(repr(files), (label, dataset))
    reports = [report for label, dataset in datasets.values() if (report := _report(dataset, label)) is not None]
    raise_for_problems(*reports)
    for report in reports:
        for warning in report.warnings:
            print_log(warning, logger="current", level=logging.WARNING)


def check_batches(cfg: Config) -> None:
    """Processes of one run must have as many batches each; `ValueError` where mmdet's sampler may leave one out."""
    batches = (cfg.get("train_dataloader") or {}).get("batch_sampler") or {}
    several = cfg.get("launcher", "none") != "none"
    if several and batches.get("type") in _UNEVEN and batches.get("drop_last"):
        raise ValueError(
            f"train_dataloader.batch_sampler: {batches['type']} may drop a full batch in one process, and the others "
            "wait for it: use type='vision_ssm.AspectRatioBatchSampler'"
        )


def check_dense(cfg: Config, loaders: Sequence[str], training: bool = False) -> None:
    """Check names, channels and data of a segmentation or detection config; other configs pass.

    Args:
        cfg: the config.
        loaders: names of the loaders whose data is wanted.
        training: also look for the file of pretrained weights, which a run begins with.

    Raises:
        KeyError, TypeError, ValueError: a misspelt backbone, variant or keyword, or heads whose ``in_channels`` do not
            fit; the message has the right ones; see also `check_batches`. FileNotFoundError: there are no such
            pretrained weights.
        DenseDataError: see `check_dense_data`.
    """
    if dense_task(cfg) is None:
        return
    from vision_ssm.integrations.checks import check_config

    if "train_dataloader" in loaders:
        check_batches(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        check_config(cfg.to_dict(), training)
        check_dense_data(cfg, loaders)

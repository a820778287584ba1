"""Training and evaluation on mmengine: classifier, optimizer groups, exact resume, hooks, metrics."""

from .checkpoint import read_training, write_checkpoint
from .classifier import ImageBatch, ImageClassifier, build_loss
from .dense import DensePicturesHook, DensePredictor, SampleDrawer
from .distillation import Distillation, distillation_loss
from .graphs import GraphedCall
from .hooks import (
    CheckpointHook,
    NonFiniteError,
    NonFiniteHook,
    PicturesHook,
    ProgressHook,
    RecordHook,
    find_non_finite,
)
from .loops import EpochTrainLoop, IterTrainLoop
from .metrics import ClassificationMetric, Evaluation, Prediction
from .optim import MixedPrecisionOptimWrapper, ParameterGroups, parameter_groups
from .runner import Runner

__all__ = [
    "CheckpointHook",
    "ClassificationMetric",
    "DensePicturesHook",
    "DensePredictor",
    "Distillation",
    "EpochTrainLoop",
    "Evaluation",
    "GraphedCall",
    "ImageBatch",
    "ImageClassifier",
    "IterTrainLoop",
    "MixedPrecisionOptimWrapper",
    "NonFiniteError",
    "NonFiniteHook",
    "ParameterGroups",
    "PicturesHook",
    "Prediction",
    "ProgressHook",
    "RecordHook",
    "Runner",
    "SampleDrawer",
    "build_loss",
    "distillation_loss",
    "find_non_finite",
    "parameter_groups",
    "read_training",
    "write_checkpoint",
]

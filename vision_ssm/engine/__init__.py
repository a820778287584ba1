"""Training and evaluation on mmengine: classifier, poses, medical volumes, optimizer groups, resume, hooks, metrics."""

from .checkpoint import read_training, write_checkpoint
from .classifier import ImageBatch, ImageClassifier, build_loss
from .dense import DensePicturesHook, DensePredictor, SampleDrawer
from .distillation import Distillation, distillation_loss
from .evaluation_sets import SeveralTestLoop, SeveralValLoop
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
from .medical import IntensityScale, MedicalBatch, MedicalSegmentor
from .medical_figures import draw_montage, overlay
from .medical_hooks import FreezeEncoderHook, MedicalPicturesHook, StopOnPlateauHook
from .medical_inference import keep_largest, predict_volume
from .medical_losses import SegmentationLoss
from .medical_metrics import GlobalMetric, VolumeEvaluation, VolumeMetric
from .medical_predict import MedicalPredictor
from .medical_scores import VolumeScores, score_volume
from .metrics import ClassificationMetric, Evaluation, Prediction
from .optim import MixedPrecisionOptimWrapper, ParameterGroups, parameter_groups
from .pose import HeatmapHead, PosePredictor, TopDownPose, load_pose_weights
from .pose_figures import draw_pose_grid, draw_poses
from .pose_metrics import CocoKeypointMetric, PosePicturesHook, object_keypoint_similarity, oks_nms
from .runner import Runner

__all__ = [
    "CheckpointHook",
    "ClassificationMetric",
    "CocoKeypointMetric",
    "DensePicturesHook",
    "DensePredictor",
    "Distillation",
    "EpochTrainLoop",
    "Evaluation",
    "FreezeEncoderHook",
    "GlobalMetric",
    "GraphedCall",
    "HeatmapHead",
    "ImageBatch",
    "ImageClassifier",
    "IntensityScale",
    "IterTrainLoop",
    "MedicalBatch",
    "MedicalPicturesHook",
    "MedicalPredictor",
    "MedicalSegmentor",
    "MixedPrecisionOptimWrapper",
    "NonFiniteError",
    "NonFiniteHook",
    "ParameterGroups",
    "PicturesHook",
    "PosePicturesHook",
    "PosePredictor",
    "Prediction",
    "ProgressHook",
    "RecordHook",
    "Runner",
    "SampleDrawer",
    "StopOnPlateauHook",
    "SegmentationLoss",
    "SeveralTestLoop",
    "SeveralValLoop",
    "TopDownPose",
    "VolumeEvaluation",
    "VolumeMetric",
    "VolumeScores",
    "build_loss",
    "distillation_loss",
    "draw_montage",
    "draw_pose_grid",
    "draw_poses",
    "find_non_finite",
    "keep_largest",
    "load_pose_weights",
    "object_keypoint_similarity",
    "oks_nms",
    "overlay",
    "parameter_groups",
    "predict_volume",
    "read_training",
    "score_volume",
    "write_checkpoint",
]

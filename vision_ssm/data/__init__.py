"""Data sets, transforms, samplers and collation for image classification and pose estimation."""

from vision_ssm.data.coco_keypoints import CocoKeypoints, collate_poses
from vision_ssm.data.collate import collate
from vision_ssm.data.decode import EXTENSIONS, UnreadableImageError, load_image, read_header, to_eight_bit
from vision_ssm.data.image_folder import ImageFolder, check_same_classes
from vision_ssm.data.randomness import Draw, SeededDataset, seeded
from vision_ssm.data.samplers import EpochSampler, RepeatedAugmentSampler
from vision_ssm.data.top_down import COCO_PERSON, KeypointSet, TopDownTransform
from vision_ssm.data.transforms import (
    build_transform,
    eval_transform,
    plain_transform,
    small_image_transform,
    train_transform,
    transform_settings,
)

__all__ = [
    "COCO_PERSON",
    "EXTENSIONS",
    "CocoKeypoints",
    "Draw",
    "EpochSampler",
    "ImageFolder",
    "KeypointSet",
    "RepeatedAugmentSampler",
    "SeededDataset",
    "TopDownTransform",
    "UnreadableImageError",
    "build_transform",
    "check_same_classes",
    "collate",
    "collate_poses",
    "eval_transform",
    "load_image",
    "plain_transform",
    "read_header",
    "seeded",
    "small_image_transform",
    "to_eight_bit",
    "train_transform",
    "transform_settings",
]

"""Data sets, transforms, samplers and collation for image classification."""

from vision_ssm.data.collate import collate
from vision_ssm.data.decode import EXTENSIONS, UnreadableImageError, load_image, read_header, to_eight_bit
from vision_ssm.data.image_folder import ImageFolder, check_same_classes
from vision_ssm.data.randomness import Draw, SeededDataset, seeded
from vision_ssm.data.samplers import EpochSampler, RepeatedAugmentSampler
from vision_ssm.data.transforms import (
    build_transform,
    eval_transform,
    plain_transform,
    small_image_transform,
    train_transform,
    transform_settings,
)

__all__ = [
    "EXTENSIONS",
    "Draw",
    "EpochSampler",
    "ImageFolder",
    "RepeatedAugmentSampler",
    "SeededDataset",
    "UnreadableImageError",
    "build_transform",
    "check_same_classes",
    "collate",
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

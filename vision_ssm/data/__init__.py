"""Data sets, transforms, samplers and collation for classification, pose estimation and medical segmentation."""

from vision_ssm.data.arrows import ArrowPointing
from vision_ssm.data.check_medical import check_dataset
from vision_ssm.data.coco_keypoints import CocoKeypoints, collate_poses
from vision_ssm.data.collate import collate
from vision_ssm.data.decode import EXTENSIONS, UnreadableImageError, load_image, read_header, to_eight_bit
from vision_ssm.data.image_folder import ImageFolder, check_same_classes
from vision_ssm.data.medical_arrays import AcdcSlices, AcdcVolumes, SynapseSlices, SynapseVolumes
from vision_ssm.data.medical_cases import find_cases
from vision_ssm.data.medical_files import read_nifti, read_volume, write_nifti
from vision_ssm.data.medical_folders import IsicImages, IsicVolumes, MaskFolder, MaskFolderVolumes
from vision_ssm.data.medical_intensity import scale_intensities
from vision_ssm.data.medical_nifti import NiftiSlices, NiftiVolumes
from vision_ssm.data.medical_splits import draw_folds, draw_split, fixed_split
from vision_ssm.data.medical_transforms import medical_transform
from vision_ssm.data.medical_volume import MedicalDataError, Volume
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
    "AcdcSlices",
    "AcdcVolumes",
    "ArrowPointing",
    "CocoKeypoints",
    "Draw",
    "EpochSampler",
    "ImageFolder",
    "IsicImages",
    "IsicVolumes",
    "KeypointSet",
    "MaskFolder",
    "MaskFolderVolumes",
    "MedicalDataError",
    "NiftiSlices",
    "NiftiVolumes",
    "RepeatedAugmentSampler",
    "SeededDataset",
    "SynapseSlices",
    "SynapseVolumes",
    "TopDownTransform",
    "UnreadableImageError",
    "Volume",
    "build_transform",
    "check_dataset",
    "check_same_classes",
    "collate",
    "collate_poses",
    "draw_folds",
    "draw_split",
    "eval_transform",
    "find_cases",
    "fixed_split",
    "load_image",
    "medical_transform",
    "plain_transform",
    "read_header",
    "read_nifti",
    "read_volume",
    "scale_intensities",
    "seeded",
    "small_image_transform",
    "to_eight_bit",
    "train_transform",
    "transform_settings",
    "write_nifti",
]

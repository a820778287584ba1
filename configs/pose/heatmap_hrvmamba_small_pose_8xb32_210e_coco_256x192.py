# HRVMamba-S (arXiv 2410.03174) on COCO keypoints at 256x192: reported AP 74.6 % with the boxes of a detector (see the
# data set's base). Weights of ImageNet as a start: model.pretrained=FILE.
_base_ = [
    "../_base_/pose_runtime.py",
    "../_base_/models/heatmap_pose.py",
    "../_base_/datasets/coco_keypoints_256x192.py",
    "../_base_/schedules/pose_210e.py",
]
model = dict(backbone=dict(name="hrvmamba_small_pose", drop_path_rate=0.1))

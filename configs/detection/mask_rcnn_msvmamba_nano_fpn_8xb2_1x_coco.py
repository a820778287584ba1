# Mask R-CNN with msvmamba_nano on COCO, 12 epochs (arXiv 2405.14174); its code reports no figure.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.MSVMamba", variant="msvmamba_nano", drop_path_rate=0.2, init_cfg=None),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

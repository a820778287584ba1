# Mask R-CNN with msvmamba_tiny on COCO, 12 epochs: reported AP 46.9 % of boxes and 42.2 % of masks (arXiv
# 2405.14174).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.MSVMamba", variant="msvmamba_tiny", drop_path_rate=0.2, init_cfg=None),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

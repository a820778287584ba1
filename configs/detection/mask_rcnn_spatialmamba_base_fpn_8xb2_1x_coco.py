# Mask R-CNN with spatialmamba_base on COCO, 12 epochs: reported AP 50.4 % of boxes and 45.1 % of masks (arXiv
# 2410.15091).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.SpatialMamba", variant="spatialmamba_base", drop_path_rate=0.5, init_cfg=None),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# Mask R-CNN with spatialmamba_tiny on COCO, 12 epochs: reported AP 47.6 % of boxes and 42.9 % of masks (arXiv
# 2410.15091).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.SpatialMamba", variant="spatialmamba_tiny", drop_path_rate=0.2, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

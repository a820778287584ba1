# Mask R-CNN with spatialmamba_tiny on COCO, 36 epochs: reported AP 49.3 % of boxes and 43.6 % of masks (arXiv
# 2410.15091).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.SpatialMamba", variant="spatialmamba_tiny", drop_path_rate=0.2, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

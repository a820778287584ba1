# Mask R-CNN with vssd_micro_d48 on COCO, 36 epochs: reported AP 47.7 % of boxes and 42.8 % of masks (arXiv
# 2407.18559).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_micro_d48", drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_micro_best.pth"),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

# Mask R-CNN with vssd_tiny on COCO, 36 epochs: reported AP 48.8 % of boxes and 43.6 % of masks (arXiv 2407.18559).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_tiny", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_tiny_best_ema.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

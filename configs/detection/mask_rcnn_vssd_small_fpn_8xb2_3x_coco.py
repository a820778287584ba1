# Mask R-CNN with vssd_small on COCO, 36 epochs: reported AP 50.0 % of boxes and 44.6 % of masks (arXiv 2407.18559).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_small", drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_small_best_ema.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

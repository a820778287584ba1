# Mask R-CNN with vssd_small on COCO, 12 epochs: reported AP 48.4 % of boxes and 43.5 % of masks (arXiv 2407.18559).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_small", drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_small_best_ema.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

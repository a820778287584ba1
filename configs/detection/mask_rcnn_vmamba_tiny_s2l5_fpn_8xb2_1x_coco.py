# Mask R-CNN with vmamba_tiny_s2l5 on COCO, 12 epochs: reported AP 47.4 % of boxes and 42.7 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_tiny_s2l5", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_tiny_0230_ckpt_epoch_262.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

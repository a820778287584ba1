# Mask R-CNN with vanilla_vmamba_tiny on COCO, 12 epochs: reported AP 46.5 % of boxes and 42.1 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vanilla_vmamba_tiny", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssmtiny_dp01_ckpt_epoch_292.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

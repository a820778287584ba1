# Mask R-CNN with vmamba_base_s2l15 on COCO, 12 epochs: reported AP 49.2 % of boxes and 44.1 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_base_s2l15", drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_base_0229_ckpt_epoch_237.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

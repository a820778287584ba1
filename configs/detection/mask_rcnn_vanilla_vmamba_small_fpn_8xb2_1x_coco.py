# Mask R-CNN with vanilla_vmamba_small on COCO, 12 epochs: reported AP 48.2 % of boxes and 43.0 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vanilla_vmamba_small", drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssmsmall_dp03_ckpt_epoch_238.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# Mask R-CNN with vanilla_vmamba_base on COCO, 12 epochs: reported AP 48.6 % of boxes and 43.3 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vanilla_vmamba_base", drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssmbase_dp06_ckpt_epoch_241.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

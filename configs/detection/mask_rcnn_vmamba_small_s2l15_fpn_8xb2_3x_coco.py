# Mask R-CNN with vmamba_small_s2l15 on COCO, 36 epochs: reported AP 49.9 % of boxes and 44.2 % of masks (arXiv
# 2401.10166).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_small_s2l15", drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_small_0229_ckpt_epoch_222.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

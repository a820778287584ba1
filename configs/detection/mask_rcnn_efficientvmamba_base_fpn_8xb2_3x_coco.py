# Mask R-CNN with efficientvmamba_base on COCO, 36 epochs (arXiv 2403.09977); its code reports no figure.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.EfficientVMamba", variant="efficientvmamba_base", drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/efficient_vmamba_base.ckpt"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(precision="fp16")

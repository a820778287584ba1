# Mask R-CNN with efficientvmamba_tiny on COCO, 12 epochs (arXiv 2403.09977); its code reports no figure.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.EfficientVMamba", variant="efficientvmamba_tiny", drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/efficient_vmamba_tiny.ckpt"),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
optim_wrapper = dict(precision="fp16")

# Semantic FPN with efficientvim_m4 on ADE20K: reported mIoU 41.3 % (arXiv 2411.15241).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_40k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.EfficientViM", variant="efficientvim_m4", out_norm=False,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/EfficientViM_M4_e450.pth"),
    ),
    neck=dict(in_channels=[224, 320, 512]),
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=40000, by_epoch=False)]

# UPerNet with vmamba_tiny_s1l8 on Cityscapes (arXiv 2401.10166); its code reports no figure. The recipe is that of
# ADE20K, for half the iterations and images twice as large.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/cityscapes_512x1024.py", "../_base_/schedules/segmentation_80k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_tiny_s1l8", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=19),
    auxiliary_head=dict(in_channels=384, num_classes=19),
    data_preprocessor=dict(size=(512, 1024)),
)

# UPerNet with vmamba_tiny_s1l8 on ADE20K: reported mIoU 47.9 %, over several scales 48.8 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_tiny_s1l8", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)

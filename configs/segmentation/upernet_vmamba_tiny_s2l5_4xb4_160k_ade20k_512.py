# UPerNet with vmamba_tiny_s2l5 on ADE20K: reported mIoU 48.3 %, over several scales 48.6 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_tiny_s2l5", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_tiny_0230_ckpt_epoch_262.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)

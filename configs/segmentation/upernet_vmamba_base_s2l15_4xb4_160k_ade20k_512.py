# UPerNet with vmamba_base_s2l15 on ADE20K: reported mIoU 51.0 %, over several scales 51.6 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_base_s2l15", drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_base_0229_ckpt_epoch_237.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]), auxiliary_head=dict(in_channels=512),
)

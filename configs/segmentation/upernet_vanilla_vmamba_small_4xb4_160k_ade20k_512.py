# UPerNet with vanilla_vmamba_small on ADE20K: reported mIoU 49.5 %, over several scales 50.5 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vanilla_vmamba_small", drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssmsmall_dp03_ckpt_epoch_238.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)

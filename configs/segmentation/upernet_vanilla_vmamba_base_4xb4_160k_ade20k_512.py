# UPerNet with vanilla_vmamba_base on ADE20K: reported mIoU 50.0 %, over several scales 51.3 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vanilla_vmamba_base", drop_path_rate=0.6,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssmbase_dp06_ckpt_epoch_241.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]), auxiliary_head=dict(in_channels=512),
)

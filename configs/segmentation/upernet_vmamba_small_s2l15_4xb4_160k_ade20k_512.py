# UPerNet with vmamba_small_s2l15 on ADE20K: reported mIoU 50.6 %, over several scales 51.2 % (arXiv 2401.10166).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VMamba", variant="vmamba_small_s2l15", drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_small_0229_ckpt_epoch_222.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)

# UPerNet with hrvmamba_base_seg on ADE20K: reported mIoU 51.4 %, over several scales 52.2 % (arXiv 2410.03174).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.HRVMamba", variant="hrvmamba_base_seg", drop_path_rate=0.15,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/hrvmamba_base.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 2048]), auxiliary_head=dict(in_channels=512),
)
train_dataloader = dict(batch_size=2)
param_scheduler = [dict(type="LinearLR", start_factor=1e-5, begin=0, end=1500, by_epoch=False),
                   dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False)]

# UPerNet with vssd_micro_d48 on ADE20K: reported mIoU 45.6 %, over several scales 46.0 % (arXiv 2407.18559).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_micro_d48", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_micro_best.pth"),
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384]), auxiliary_head=dict(in_channels=192),
)
tta_pipeline = {{_base_.three_scales_pipeline}}

# UPerNet with msvmamba_nano on ADE20K (arXiv 2405.14174); its code reports no figure.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.MSVMamba", variant="msvmamba_nano", drop_path_rate=0.2, init_cfg=None),
    decode_head=dict(in_channels=[48, 96, 192, 384]), auxiliary_head=dict(in_channels=192),
)

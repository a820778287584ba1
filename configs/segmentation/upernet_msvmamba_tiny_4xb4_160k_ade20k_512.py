# UPerNet with msvmamba_tiny on ADE20K: reported mIoU 47.8 % (arXiv 2405.14174).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.MSVMamba", variant="msvmamba_tiny", drop_path_rate=0.2, init_cfg=None),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)

# UPerNet with spatialmamba_small on ADE20K: reported mIoU 50.6 %, over several scales 51.4 % (arXiv 2410.15091).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.SpatialMamba", variant="spatialmamba_small", drop_path_rate=0.3, init_cfg=None),
    decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256),
)
tta_pipeline = {{_base_.three_scales_pipeline}}

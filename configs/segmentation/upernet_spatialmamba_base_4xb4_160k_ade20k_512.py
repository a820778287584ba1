# UPerNet with spatialmamba_base on ADE20K: reported mIoU 51.8 %, over several scales 52.6 % (arXiv 2410.15091).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.SpatialMamba", variant="spatialmamba_base", drop_path_rate=0.5, init_cfg=None),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)
tta_pipeline = {{_base_.three_scales_pipeline}}

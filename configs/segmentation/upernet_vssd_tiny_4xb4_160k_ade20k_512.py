# UPerNet with vssd_tiny on ADE20K: reported mIoU 47.9 %, over several scales 48.7 % (arXiv 2407.18559).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_tiny", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_tiny_best_ema.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256),
)
tta_pipeline = {{_base_.three_scales_pipeline}}

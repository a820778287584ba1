# UPerNet with vssd_small on ADE20K (arXiv 2407.18559); its code reports no figure.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VSSD", variant="vssd_small", drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssd_small_best_ema.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256),
)
tta_pipeline = {{_base_.three_scales_pipeline}}

# UPerNet with msvmamba_micro_d64 on ADE20K: reported mIoU 45.1 %, over several scales 45.4 % (arXiv 2405.14174).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.MSVMamba", variant="msvmamba_micro_d64", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_micro_ms_e300.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]), auxiliary_head=dict(in_channels=256),
)

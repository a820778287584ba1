# UPerNet with localvmamba_tiny on ADE20K (arXiv 2403.09338); its code reports no figure.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.LocalVMamba", variant="localvmamba_tiny", drop_path_rate=0.1, init_cfg=None),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)

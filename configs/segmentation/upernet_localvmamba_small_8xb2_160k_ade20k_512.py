# UPerNet with localvmamba_small on ADE20K (arXiv 2403.09338); its code reports no figure.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LocalVMamba", variant="localvmamba_small", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/local_vssm_small.ckpt"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]), auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(precision="fp16")

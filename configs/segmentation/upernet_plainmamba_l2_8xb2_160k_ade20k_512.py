# UPerNet with plainmamba_l2 on ADE20K: reported mIoU 46.8 % (arXiv 2403.17695). No decay of vectors, states and
# directions.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.PlainMamba", variant="plainmamba_l2", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/l2.pth"),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]), auxiliary_head=dict(in_channels=384, in_index=3),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))

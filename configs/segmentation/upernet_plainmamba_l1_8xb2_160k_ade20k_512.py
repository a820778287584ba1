# UPerNet with plainmamba_l1 on ADE20K: reported mIoU 44.1 % (arXiv 2403.17695). No decay of vectors, states and
# directions.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.PlainMamba", variant="plainmamba_l1", drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/l1.pth"),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]), auxiliary_head=dict(in_channels=192, in_index=3),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))

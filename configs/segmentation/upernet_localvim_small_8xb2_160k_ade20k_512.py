# UPerNet with localvim_small on ADE20K (arXiv 2403.09338); its code reports no figure. The original builds the blocks
# of RMS-normed weights with layer norms (norm="layer") here.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LocalVim", variant="localvim_small", feature_source="mixer", drop_path_rate=0.1, init_cfg=None,
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]), auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(no_decay=["*norm*", "*pos_embed*"]))

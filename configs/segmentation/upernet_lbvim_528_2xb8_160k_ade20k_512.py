# UPerNet with lbvim_528 on ADE20K (arXiv 2506.15976); its code reports no figure. The original builds the blocks of
# RMS-normed weights with layer norms (norm="layer") here.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LBVim", variant="lbvim_528", feature_source="mixer", out_dim=384, drop_path_rate=0.05,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]), auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=8)

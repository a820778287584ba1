# UPerNet with localvim_small on ADE20K (arXiv 2403.09338); no figure is published. Norms of the blocks are those of
# the classifier; in the original they lose their kind here.
_base_ = [
    "../_base_/segmentation_runtime.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/segmentation_160k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LocalVim", variant="localvim_small", out_indices=(4, 9, 14, 19), feature_source="mixer",
        drop_path_rate=0.1, init_cfg=None,
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"pos_embed": dict(decay_mult=0.0)}))

# UPerNet with vim_small on ADE20K: reported mIoU 44.9 % (arXiv 2401.09417).
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_60k_adamw_layer_decay.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.Vim", variant="vim_small", class_tokens="none", feature_source="mixer", pyramid=True,
        out_norm=False, init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vim_s_midclstok_80p5acc.pth"),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384), auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=8)

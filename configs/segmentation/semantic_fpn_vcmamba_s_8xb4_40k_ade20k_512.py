# Semantic FPN with vcmamba_s on ADE20K (arXiv 2509.04669); its code reports no figure.
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k_512.py", "../_base_/schedules/segmentation_40k_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.VCMamba", variant="vcmamba_s", stem_act="gelu", img_size=512, out_norm=False,
        drop_path_rate=0.2, init_cfg=dict(type="Pretrained", checkpoint="checkpoints/VCMamba-S.pth"),
    ),
    neck=dict(in_channels=[32, 64, 144, 288]),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
test_pipeline = {{_base_.aligned_test_pipeline}}
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

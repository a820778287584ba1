# Mask R-CNN with localvmamba_tiny on COCO, 12 epochs (arXiv 2403.09338); its code reports no figure.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.LocalVMamba", variant="localvmamba_tiny", drop_path_rate=0.2, init_cfg=None),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(precision="fp16")

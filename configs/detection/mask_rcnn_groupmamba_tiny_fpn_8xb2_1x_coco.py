# Mask R-CNN with groupmamba_tiny on COCO, 12 epochs (arXiv 2407.13772); its code reports no figure. The recipe is
# Swin's: the original has no code for it.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.GroupMamba", variant="groupmamba_tiny", drop_path_rate=0.05, init_cfg=None),
    neck=dict(in_channels=[64, 128, 348, 448]),
)

# Mask R-CNN with plainmamba_l1 on COCO, 12 epochs. The figures of arXiv 2403.17695 are not for this: they are with an
# adapter beside the backbone, in whose place is a pyramid of transposed convolutions.
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py", "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.PlainMamba", variant="plainmamba_l1", pyramid=True, drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/l1.pth"),
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True))

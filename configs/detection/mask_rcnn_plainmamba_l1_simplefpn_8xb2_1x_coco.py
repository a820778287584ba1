# Mask R-CNN with plainmamba_l1 on COCO, 12 epochs (arXiv 2403.17695); no figure is published. The original's figures
# are with an adapter beside the backbone; here its last map alone makes the pyramid.
_base_ = [
    "../_base_/detection_runtime.py",
    "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_1x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.PlainMamba", variant="plainmamba_l1", out_indices=(23,), drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/l1.pth"),
    ),
    neck=dict(_delete_=True, type="vision_ssm.SimpleFeaturePyramid", in_channels=192, out_channels=256, num_outs=5),
)
optim_wrapper = dict(constructor="vision_ssm.ParameterGroups", paramwise_cfg=dict(_delete_=True))

# Drawn shapes in minutes on two CPU cores, validation AP50 of boxes of at least 60 %:
#   tools/prepare_data.py shapes data/shapes_coco --layout coco && tools/train.py CONFIG
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/shapes_coco.py", "../_base_/schedules/detection_short_adamw.py",
]
model = dict(
    backbone=dict(type="vision_ssm.VMamba", variant="vmamba_micro", init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=48), rpn_head=dict(in_channels=48, feat_channels=48),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=48), mask_roi_extractor=dict(out_channels=48),
                  bbox_head=dict(in_channels=48, fc_out_channels=128, num_classes=6),
                  mask_head=dict(in_channels=48, conv_out_channels=32, num_convs=2, num_classes=6)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))))
env_cfg = dict(cpu_threads=1)  # one core computes, the other prepares the images

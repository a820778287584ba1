# Mask R-CNN with msvmamba_micro_d64 on COCO, 36 epochs: reported AP 46.3 % of boxes and 41.8 % of masks (arXiv
# 2405.14174).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/mask_rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms3x.py", "../_base_/schedules/coco_3x_adamw.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.MSVMamba", variant="msvmamba_micro_d64", drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vssm_micro_ms_e300.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

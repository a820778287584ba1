# RetinaNet with efficientvim_m4 on COCO, 12 epochs: reported AP 38.8 % of boxes (arXiv 2411.15241).
_base_ = [
    "../_base_/detection_runtime.py", "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py", "../_base_/schedules/coco_1x_adamw_warmup500.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.EfficientViM", variant="efficientvim_m4", out_norm=False, norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/EfficientViM_M4_e450.pth"),
    ),
    neck=dict(_delete_=True, type="vision_ssm.EfficientViMFPN", in_channels=[224, 320, 512], out_channels=256,
              finer=1, coarser=1),
)

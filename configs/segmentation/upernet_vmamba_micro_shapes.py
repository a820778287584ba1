# Drawn shapes in minutes on two CPU cores, validation mIoU of at least 80 %:
#   tools/prepare_data.py shapes data/shapes_ade20k --layout ade20k && tools/train.py CONFIG
_base_ = [
    "../_base_/segmentation_runtime.py", "../_base_/models/upernet.py",
    "../_base_/datasets/shapes_ade20k.py", "../_base_/schedules/segmentation_short_adamw.py",
]
head = dict(num_classes=7, channels=32, dropout_ratio=0.0)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(type="vision_ssm.VMamba", variant="vmamba_micro", init_cfg=None),
    decode_head=dict(in_channels=[16, 32, 64, 128], **head), auxiliary_head=dict(in_channels=64, **head),
)
default_hooks = dict(checkpoint=dict(every_iterations=400))
env_cfg = dict(cpu_threads=1)  # one core computes, the other prepares the images

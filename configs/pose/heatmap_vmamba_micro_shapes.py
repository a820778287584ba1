# Seventeen keypoints of drawn figures, in minutes on two CPU cores:
#   python tools/prepare_data.py shapes --layout coco-keypoints data/shapes_keypoints
#   python tools/train.py configs/pose/heatmap_vmamba_micro_shapes.py
_base_ = [
    "../_base_/pose_runtime.py",
    "../_base_/models/heatmap_pose.py",
    "../_base_/datasets/shapes_keypoints_128x96.py",
    "../_base_/schedules/short_adamw.py",
]
model = dict(backbone=dict(name="vmamba_micro", out_indices=(2,)), deconv_channels=(64, 64))
train_cfg = dict(max_epochs=40, val_interval=10)
# One core computes, the other prepares the images.
env_cfg = dict(cpu_threads=1)

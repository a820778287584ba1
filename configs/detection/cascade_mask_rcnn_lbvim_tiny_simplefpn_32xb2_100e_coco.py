# Cascade Mask R-CNN with lbvim_tiny on COCO, 100 epochs (arXiv 2506.15976); its code reports no figure.
_base_ = [
    "../_base_/detection_iterations_runtime.py", "../_base_/models/cascade_mask_rcnn_simplefpn.py",
    "../_base_/datasets/coco_lsj_1024.py", "../_base_/schedules/coco_100e_adamw_layer_decay.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LBVim", variant="lbvim_tiny", out_indices=(23,), feature_source="mixer", drop_path_rate=0.1,
        init_cfg=None,
    ),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(clip_grad=dict(max_norm=35))

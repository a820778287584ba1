# Cascade Mask R-CNN with localvim_small on COCO, 100 epochs (arXiv 2403.09338); its code reports no figure.
_base_ = [
    "../_base_/detection_iterations_runtime.py", "../_base_/models/cascade_mask_rcnn_simplefpn.py",
    "../_base_/datasets/coco_lsj_1024.py", "../_base_/schedules/coco_100e_adamw_layer_decay.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.LocalVim", variant="localvim_small", out_indices=(19,), feature_source="mixer",
        drop_path_rate=0.1, init_cfg=None,
    ),
    neck=dict(in_channels=384),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), paramwise_cfg=dict(layer_decay=0.807))

# Cascade Mask R-CNN with vim_tiny on COCO, 100 epochs: reported AP 45.7 % of boxes and 39.2 % of masks (arXiv
# 2401.09417).
_base_ = [
    "../_base_/detection_iterations_runtime.py", "../_base_/models/cascade_mask_rcnn_simplefpn.py",
    "../_base_/datasets/coco_lsj_1024.py", "../_base_/schedules/coco_100e_adamw_layer_decay.py",
]
model = dict(
    backbone=dict(
        type="vision_ssm.Vim", variant="vim_tiny", class_tokens="none", out_indices=(23,), out_norm=False,
        drop_path_rate=0.1, init_cfg=dict(type="Pretrained", checkpoint="checkpoints/vim_t_midclstok_76p1acc.pth"),
    ),
    neck=dict(in_channels=192),
)
train_dataloader = dict(batch_size=8)

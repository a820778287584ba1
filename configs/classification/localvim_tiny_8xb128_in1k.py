# localvim_tiny, LocalVim-T of the paper: reported top-1 76.2 % (arXiv 2403.09338).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_wd004.py",
]
model = dict(backbone=dict(name="localvim_tiny", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5", color_jitter=0.3)))
# The original spares position tables and class tokens from weight decay, and no other parameter of two dimensions.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log"]))

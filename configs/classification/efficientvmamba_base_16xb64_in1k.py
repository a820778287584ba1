# efficientvmamba_base, EfficientVMamba-B of the paper: reported top-1 81.8 % (arXiv 2403.09977).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_wd004_fp16.py",
]
model = dict(backbone=dict(name="efficientvmamba_base", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5", color_jitter=0.3)))
# The logs of this model have the same learning rate at half the batch.
auto_scale_lr = dict(base_batch_size=1024)

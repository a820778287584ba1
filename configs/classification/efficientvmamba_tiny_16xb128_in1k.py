# efficientvmamba_tiny, EfficientVMamba-T of the paper: reported top-1 76.5 % (arXiv 2403.09977).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_wd004_fp16.py",
]
model = dict(backbone=dict(name="efficientvmamba_tiny", drop_path_rate=0.1), mixup=dict(mixup_alpha=0.2))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5", color_jitter=0.3)))

# plainmamba_l1: reported top-1 77.9 %, weights not averaged (arXiv 2403.17695).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_warmup15.py",
]
model = dict(backbone=dict(name="plainmamba_l1", drop_path_rate=0.2))
train_dataloader = dict(batch_size=256)

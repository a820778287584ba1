# adventurer_small_patch16_224: reported top-1 81.8 % (arXiv 2410.07599) behind three stages.
# The first: 300 epochs at 128 x 128. Drop path is published for Base alone.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_128_3augment.py",
    "../_base_/schedules/imagenet_300e_adamw_warm5_bf16.py",
]
model = dict(
    backbone=dict(name="adventurer_small_patch16_224", img_size=128),
    mixup=dict(label_smoothing=0.0),
)

# lbvim_300. Neither weights nor an accuracy are published with the code (arXiv 2506.15976).
# All matrices are decayed, as there.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_fp32_warmup5.py",
]
model = dict(backbone=dict(name="lbvim_300", drop_path_rate=0.05))
train_dataloader = dict(
    batch_size=128,
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler"),
    dataset=dict(transform=dict(color_jitter=0.3)),
)
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log"]))

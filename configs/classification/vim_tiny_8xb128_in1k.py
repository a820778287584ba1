# vim_tiny: reported top-1 76.1 %, weights not averaged (arXiv 2401.09417). All matrices are decayed, as there.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_fp32_warmup5_b512.py",
]
model = dict(backbone=dict(name="vim_tiny"))
train_dataloader = dict(
    batch_size=128,
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler"),
    dataset=dict(transform=dict(color_jitter=0.3)),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(decay=["*.A_log"]))
auto_scale_lr = dict(base_batch_size=1024)

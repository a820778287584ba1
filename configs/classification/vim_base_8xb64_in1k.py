# vim_base: reported top-1 81.9 %, weights not averaged (arXiv 2401.09417). All matrices are decayed, as there.
# The recipe is that of vim_small without drop path; this size has none of its own here.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_fp32_warmup5_b512.py",
]
model = dict(backbone=dict(name="vim_base"))
train_dataloader = dict(
    batch_size=64,
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler"),
    dataset=dict(transform=dict(color_jitter=0.3)),
)
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log"]))

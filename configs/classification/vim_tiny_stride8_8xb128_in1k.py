# vim_tiny_stride8: reported top-1 78.3 %, weights not averaged (arXiv 2401.09417). All matrices are decayed, as there.
# Fine-tunes vim_tiny, whose table of positions is resampled: --cfg-options model.pretrained=FILE.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_30e_adamw_fp32_constant.py",
]
model = dict(backbone=dict(name="vim_tiny_stride8"))
train_dataloader = dict(
    batch_size=128,
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler"),
    dataset=dict(transform=dict(color_jitter=0.3)),
)
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log"]))

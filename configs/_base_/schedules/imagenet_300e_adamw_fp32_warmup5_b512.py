# 300 epochs of AdamW for a batch of 512, float32, not clipped: 5 epochs of warm-up from 1e-6, then a cosine to 1e-5,
# both per epoch. EMA 0.99996.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, by_epoch=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5, by_epoch=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=512)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
custom_hooks = [dict(type="EMAHook", momentum=4e-5)]

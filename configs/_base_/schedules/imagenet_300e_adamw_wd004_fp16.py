# 300 epochs of AdamW for a batch of 2048, weight decay 0.04: 20 epochs of warm-up from 1e-7 to 2e-3, then a cosine to
# 1e-6, both per iteration. Gradients clipped at 1, EMA 0.9999.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp16",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.04),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-5, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=5e-4, begin=20, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=2048)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
custom_hooks = [dict(type="EMAHook", momentum=1e-4)]

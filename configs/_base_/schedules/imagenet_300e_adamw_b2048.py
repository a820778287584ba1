# 300 epochs of AdamW for a batch of 2048: 20 epochs of warm-up, then a cosine, both per iteration, and 10 epochs at the
# last rate. Small clipping norm, EMA 0.9995.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp16",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=0.02),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", eta_min_ratio=1e-2, begin=20, end=300, by_epoch=True, convert_to_iter_based=True
    ),
]
auto_scale_lr = dict(enable=True, base_batch_size=2048)
train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)
custom_hooks = [dict(type="EMAHook", momentum=5e-4)]

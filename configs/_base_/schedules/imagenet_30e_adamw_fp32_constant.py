# 30 epochs of AdamW for a batch of 1024 at one low rate, float32, not clipped, to fine-tune. EMA 0.99996.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-8),
    accumulative_counts=1,
)
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=True)]
auto_scale_lr = dict(enable=True, base_batch_size=1024)
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
custom_hooks = [dict(type="EMAHook", momentum=4e-5)]

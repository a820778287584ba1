# 300 epochs of AdamW for a batch of 32, every parameter decayed; the rate falls to 1e-5 in 50 epochs and rises again in
# the next 50, and so on. Validated after every epoch.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    accumulative_counts=1,
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=50, eta_min=1e-5, begin=0, end=300, by_epoch=True)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
custom_hooks = []

# 40k iterations of AdamW for a batch of 32 along a polynomial to 0.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    accumulative_counts=1,
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
auto_scale_lr = dict(enable=True, base_batch_size=32)
train_cfg = dict(by_epoch=False, max_iters=40000, val_interval=4000)

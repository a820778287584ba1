# 80k iterations of AdamW for a batch of 8: 1500 of warm-up, then a straight line to 0. Norms are not decayed.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    paramwise_cfg=dict(no_decay=["*norm*"], only_named=True),
    precision="fp32",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=80000, by_epoch=False),
]
auto_scale_lr = dict(enable=True, base_batch_size=8)
train_cfg = dict(by_epoch=False, max_iters=80000, val_interval=8000)

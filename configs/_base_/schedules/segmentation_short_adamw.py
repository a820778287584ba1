# A short run of AdamW: 100 iterations of warm-up, then a straight line to 0. Vectors and states are not decayed.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=4e-3, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, begin=0, end=100, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=100, end=1600, by_epoch=False),
]
train_cfg = dict(by_epoch=False, max_iters=1600, val_interval=400)

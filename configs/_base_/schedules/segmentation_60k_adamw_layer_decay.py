# 60k iterations of AdamW for a batch of 32: 1500 of warm-up, then a straight line to 0; rates fall by 0.92 from layer
# to layer towards the stem. Vectors and positions are not decayed, matrices of decays are.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    paramwise_cfg=dict(layer_decay=0.92, decay=["*.A_log"]),
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=60000, by_epoch=False),
]
auto_scale_lr = dict(enable=True, base_batch_size=32)
train_cfg = dict(by_epoch=False, max_iters=60000, val_interval=6000)

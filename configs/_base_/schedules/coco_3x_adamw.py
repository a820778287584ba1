# 36 epochs of AdamW for a batch of 16: a tenth of the rate from epoch 27 on, a hundredth from epoch 33 on. Norms are
# not decayed.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    paramwise_cfg=dict(no_decay=["*norm*"], only_named=True),
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=1000, by_epoch=False),
    dict(type="MultiStepLR", milestones=[27, 33], gamma=0.1, begin=0, end=36, by_epoch=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=16)
train_cfg = dict(by_epoch=True, max_epochs=36, val_interval=1)

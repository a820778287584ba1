# 210 epochs of AdamW in float16 for a batch of 256: 500 iterations of warm-up from 5e-7, a tenth of the rate from epoch
# 170 and a hundredth from epoch 200 on. Batch norms take the statistics of all GPUs.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="fp16",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.01),
    clip_grad=None,
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=500, by_epoch=False),
    dict(type="MultiStepLR", milestones=[170, 200], gamma=0.1, begin=0, end=210, by_epoch=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=256)
train_cfg = dict(by_epoch=True, max_epochs=210, val_interval=10)
custom_hooks = []
sync_bn = "torch"

# 553,125 iterations of AdamW for a batch of 64, 300 epochs of COCO: 250 of warm-up, a tenth of the rate behind 8/9 of
# the run and a hundredth behind 26/27; rates fall from layer to layer towards the stem. Vectors, positions and states
# are not decayed. In bfloat16, because float16 is known to overflow in these backbones.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    paramwise_cfg=dict(layer_decay=0.837),
    precision="bf16",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=250, by_epoch=False),
    dict(type="MultiStepLR", milestones=[491667, 532639], gamma=0.1, begin=0, end=553125, by_epoch=False),
]
auto_scale_lr = dict(enable=True, base_batch_size=64)
train_cfg = dict(by_epoch=False, max_iters=553125, val_interval=20000)

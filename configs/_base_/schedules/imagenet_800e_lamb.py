# 800 epochs of LAMB in bfloat16 for a batch of 2048: 5 epochs of warm-up, then a cosine, per iteration. Gradients are
# clipped at a norm of 1.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="bf16",
    optimizer=dict(type="lamb", lr=4e-3, weight_decay=0.02),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-3, begin=5, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=2048)
train_cfg = dict(by_epoch=True, max_epochs=800, val_interval=1)
custom_hooks = []

# 20 epochs of AdamW in bfloat16 at a low rate for a batch of 512: 5 epochs of warm-up, then a cosine to 1e-6.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="bf16",
    optimizer=dict(type="AdamW", lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.1, begin=5, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=512)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
custom_hooks = []

# 50 epochs of AdamW for a batch of 128, clipped at norm 1: a warm-up, then a cosine to a thousandth, both per
# iteration. No average of the weights. The learning rate is a tenth of the paper's, reached in 8 epochs instead of one:
# with 1e-3 plain backbones stay at chance, and pLSTM becomes better with the longer warm-up (benchmarks/arrows.md).
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    constructor="vision_ssm.ParameterGroups",
    precision="bf16",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=8, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-3, begin=8, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=128)
train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=1)
custom_hooks = []

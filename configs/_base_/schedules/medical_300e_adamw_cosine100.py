# As medical_300e_adamw_cosine50.py with a half period of 100 epochs, and volumes validated when it ends.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    accumulative_counts=1,
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=100, eta_min=1e-5, begin=0, end=300, by_epoch=True)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=100)
custom_hooks = []

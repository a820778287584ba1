# 300 epochs of AdamW for a batch of 32 along one cosine to 1e-6, every parameter decayed; the encoder rests in the
# first 10 epochs, and training ends early when the training loss has not fallen for 15 epochs.
optim_wrapper = dict(
    type="vision_ssm.MixedPrecisionOptimWrapper",
    precision="fp32",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-3),
    accumulative_counts=1,
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=300, eta_min=1e-6, begin=0, end=300, by_epoch=True)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=20)
custom_hooks = [
    dict(type="vision_ssm.FreezeEncoderHook", epochs=10),
    dict(type="vision_ssm.StopOnPlateauHook", patience=15),
]
find_unused_parameters = True  # a resting encoder has no gradient to exchange between processes

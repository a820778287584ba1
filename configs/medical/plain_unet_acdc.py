# The plain U-Net on ACDC, with the recipe of msvmunet_acdc.py but from scratch, so no encoder rests: a baseline for it.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/acdc_224.py", "../_base_/schedules/medical_300e_adamw_cosine300.py",
]
model = dict(
    unet=dict(name="plain_unet"), num_classes=4, loss=dict(weights=(0.4, 0.6)), normalize=dict(mean=0.5, std=0.5)
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
custom_hooks = [dict(type="vision_ssm.StopOnPlateauHook", patience=15)]
find_unused_parameters = False

# The plain U-Net on ISIC 2017, with the recipe of vmunet_isic17.py but from scratch: a baseline for it.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_binary.py",
    "../_base_/datasets/isic17_256.py", "../_base_/schedules/medical_300e_adamw_cosine50.py",
]
model = dict(unet=dict(name="plain_unet"))

# The plain U-Net on Synapse, with the recipe of vmunet_synapse.py but from scratch: a baseline for it.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/synapse_224.py", "../_base_/schedules/medical_300e_adamw_cosine100.py",
]
model = dict(unet=dict(name="plain_unet"))

# The plain U-Net on drawn organs, with the recipe of vmunet_micro_organs.py: a baseline for it.
#   python tools/prepare_data.py organs data/organs --layout nifti --cases 40
#   python tools/train.py configs/medical/plain_unet_micro_organs.py
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/organs_96.py", "../_base_/schedules/medical_short_adamw.py",
]
model = dict(
    unet=dict(name="plain_unet_micro"), num_classes=6, inference=dict(size=(96, 96)), normalize=dict(mean=0.3, std=0.2)
)
# One core computes, the other prepares the slices.
env_cfg = dict(cpu_threads=1)

# MHS-VM with four heads on ISIC 2017 (arXiv 2406.05992), trained from scratch. No training on this set
# is reported; weights trained on ISIC 2018 reach DSC 90.12 % here. Validated from epoch 101 on.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_binary.py",
    "../_base_/datasets/isic17_256.py", "../_base_/schedules/medical_300e_adamw_cosine50.py",
]
model = dict(unet=dict(name="mhsvm_4h_isic17"))
train_cfg = dict(val_begin=101)

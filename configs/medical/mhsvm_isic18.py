# MHS-VM with four heads on ISIC 2018 (arXiv 2406.05992), trained from scratch: reported mIoU 80.85 %, DSC 89.41 %.
# Validated from epoch 101 on.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_binary.py",
    "../_base_/datasets/isic18_256.py", "../_base_/schedules/medical_300e_adamw_cosine50.py",
]
model = dict(unet=dict(name="mhsvm_4h"))
train_cfg = dict(val_begin=101)

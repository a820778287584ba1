# VM-UNet on ISIC 2018 (arXiv 2402.02491): reported mIoU 81.35 %, DSC 89.71 %. The paper keeps the weights of the least
# validation loss, this config those of the highest Dice.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_binary.py",
    "../_base_/datasets/isic18_256.py", "../_base_/schedules/medical_300e_adamw_cosine50.py",
]
model = dict(unet=dict(name="vmunet_isic"), pretrained="checkpoints/vmamba_small_e238_ema.pth")

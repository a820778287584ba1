# VM-UNet on ISIC 2017 (arXiv 2402.02491): reported mIoU 80.23 %, DSC 89.03 %. The paper keeps the weights of the least
# validation loss, this config those of the highest Dice.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_binary.py",
    "../_base_/datasets/isic17_256.py", "../_base_/schedules/medical_300e_adamw_cosine50.py",
]
model = dict(unet=dict(name="vmunet_isic"), pretrained="checkpoints/vmamba_small_e238_ema.pth")

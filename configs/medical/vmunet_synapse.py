# VM-UNet on Synapse (arXiv 2402.02491): reported DSC 81.08 %, HD95 19.21. The paper keeps the weights of the least
# training loss, this config those of the highest Dice.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/synapse_224.py", "../_base_/schedules/medical_300e_adamw_cosine100.py",
]
model = dict(unet=dict(name="vmunet_synapse"), pretrained="checkpoints/vmamba_small_e238_ema.pth")

# MSVM-UNet on ACDC (arXiv 2408.13735): reported DSC 92.58 %.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/acdc_224.py", "../_base_/schedules/medical_300e_adamw_cosine300.py",
]
model = dict(
    unet=dict(name="msvmunet_tiny"), num_classes=4, loss=dict(weights=(0.4, 0.6)), normalize=dict(mean=0.5, std=0.5),
    pretrained="checkpoints/vssm1_tiny_0230s_ckpt_epoch_264.pth",
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))

# MSVM-UNet on Synapse (arXiv 2408.13735): reported DSC 85.00 %, HD95 14.75.
_base_ = [
    "../_base_/medical_runtime.py", "../_base_/models/unet_classes.py",
    "../_base_/datasets/synapse_224.py", "../_base_/schedules/medical_300e_adamw_cosine300.py",
]
model = dict(
    unet=dict(name="msvmunet_tiny"), loss=dict(weights=(0.4, 0.6)), normalize=dict(mean=0.5, std=0.5),
    pretrained="checkpoints/vssm1_tiny_0230s_ckpt_epoch_264.pth",
)
train_dataloader = dict(dataset=dict(transform=dict(policy="msvmunet")))

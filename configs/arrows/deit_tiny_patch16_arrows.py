# ViT-T, as in DeiT, on the arrow-pointing task of pLSTM (arXiv 2506.11997). Its position table is resampled at 384.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_arrows.py",
    "../_base_/datasets/arrows_192.py",
    "../_base_/schedules/arrows_50e_adamw.py",
]
model = dict(backbone=dict(name="timm:deit_tiny_patch16_224", img_size=192, dynamic_img_size=True))

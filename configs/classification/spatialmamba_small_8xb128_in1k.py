# spatialmamba_small, Spatial-Mamba-S: reported top-1 84.6 % (arXiv 2410.15091).
# It was trained with MESA: after a quarter of the epochs, 1.5 times a second loss against the averaged model. The
# engine has no such loss, and this recipe goes without it.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="spatialmamba_small", drop_path_rate=0.3))
# The original decays its decays like any other weight of more than one dimension.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log"]))

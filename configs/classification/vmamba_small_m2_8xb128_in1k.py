# vmamba_small_m2: Mamba-2 (SSD) form. Neither weights nor an accuracy are published for it; the recipe is that of the
# other VMamba models, and nobody has reported a training with it.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="vmamba_small_m2", drop_path_rate=0.3))
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias", "*.core.D"]))

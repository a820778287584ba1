# hrvmamba_base: reported top-1 84.2 % (arXiv 2410.03174).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="hrvmamba_base", drop_path_rate=0.2))
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(precision="bf16", paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias"]))

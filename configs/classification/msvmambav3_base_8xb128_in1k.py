# msvmambav3_base, MSVMamba-Base of the last version of the paper: reported top-1 84.4 % (arXiv 2405.14174).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="msvmambav3_base", drop_path_rate=0.5))
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(optimizer=dict(lr=6e-4), paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias"]))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 600, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-2, begin=20, by_epoch=True, convert_to_iter_based=True),
]

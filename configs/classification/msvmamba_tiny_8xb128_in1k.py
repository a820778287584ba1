# msvmamba_tiny, MSVMamba-Tiny of the first version of the paper: reported top-1 82.8 % (arXiv 2405.14174).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="msvmamba_tiny", drop_path_rate=0.2))
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias"]))

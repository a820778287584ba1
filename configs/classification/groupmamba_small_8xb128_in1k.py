# groupmamba_small: reported top-1 83.9 % (arXiv 2407.13772). The teacher's weights have to be downloaded first.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k_distilled.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="groupmamba_small", drop_path_rate=0.05))
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias"]))

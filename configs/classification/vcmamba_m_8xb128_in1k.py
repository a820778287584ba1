# vcmamba_m: reported top-1 81.5 % with two classifiers, one of which learns from regnety_160 (arXiv 2509.04669). Not in
# here: that teacher, so there is one classifier; repeated augmentation; batch norms over all GPUs; 10 epochs more at
# the lowest rate.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_fp32_warmup5.py",
]
model = dict(backbone=dict(name="vcmamba_m", drop_path_rate=0.2, distillation=False))
# The original decays every parameter of two dimensions and more, which its layer scales have.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log", "*.pos_embed.table", "*.layer_scale"]))

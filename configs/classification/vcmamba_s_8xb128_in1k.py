# vcmamba_s: reported top-1 78.7 % (arXiv 2509.04669). The teacher's weights have to be downloaded first. Not in here:
# 10 epochs more at the lowest rate.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k_distilled.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_fp32_warmup5.py",
]
model = dict(backbone=dict(name="vcmamba_s", drop_path_rate=0.2), distillation=dict(kind="soft"))
train_dataloader = dict(
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler"), dataset=dict(transform=dict(color_jitter=0.3))
)
# The original decays every parameter of two dimensions and more, which its layer scales have.
optim_wrapper = dict(paramwise_cfg=dict(decay=["*.A_log", "*.pos_embed.table", "*.layer_scale"]))
sync_bn = "torch"

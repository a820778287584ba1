# hrvmamba_nano: reported top-1 74.8 % (arXiv 2410.03174).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="hrvmamba_nano", drop_path_rate=0.1))
train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256, crop_pct=1.0)))
test_dataloader = val_dataloader
# The original decays its multi-dimensional decays and step-size biases like any other weight.
optim_wrapper = dict(optimizer=dict(lr=2e-3), precision="bf16", paramwise_cfg=dict(decay=["*.A_log", "*.dt_proj_bias"]))
auto_scale_lr = dict(base_batch_size=2048)

# plainmamba_l2: reported top-1 81.6 %, of averaged weights (arXiv 2403.17695). The original averages ten times faster
# from epoch 250 on; here the average keeps one momentum.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="plainmamba_l2", drop_path_rate=0.2))
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(precision="fp32", optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=1.0))
auto_scale_lr = dict(base_batch_size=2048)

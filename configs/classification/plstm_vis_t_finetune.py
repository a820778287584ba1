# Fine-tune ImageNet weights on other photographs, DATA/{train,val}/CLASS/*: a low rate that falls from layer to layer
# towards the stem, light augmentation, averaged weights, no decay of the biases of gates.
#   tools/train.py CONFIG --data-root DATA --cfg-options model.pretrained=FILE model.reset_head=True model.num_classes=N
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/short_adamw.py",
]
model = dict(backbone=dict(name="plstm_vis_t", drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=1e-2), paramwise_cfg=dict(layer_decay=0.75), precision="bf16")
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(auto_augment="rand-m5-inc1", scale=(0.3, 1))))
custom_hooks = [dict(type="EMAHook", ema_type="MomentumAnnealingEMA", momentum=1e-3, gamma=10)]

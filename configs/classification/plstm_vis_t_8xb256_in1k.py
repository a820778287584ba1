# plstm_vis_t: 800 epochs at 192 x 192 (arXiv 2506.11997). Neither weights nor an accuracy are published.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_128_3augment.py",
    "../_base_/schedules/imagenet_800e_lamb.py",
]
model = dict(
    backbone=dict(name="plstm_vis_t", img_size=192),
    loss=dict(type="BinaryCrossEntropy"),
    mixup=dict(label_smoothing=0.0),
)
train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(input_size=192, color_jitter=0.3)))
val_dataloader = test_dataloader = dict(dataset=dict(transform=dict(input_size=192, crop_pct=1.0)))

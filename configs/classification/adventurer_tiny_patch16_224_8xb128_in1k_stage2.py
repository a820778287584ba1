# adventurer_tiny_patch16_224, second stage: 100 epochs at 224 x 224 from the weights of the first,
# --cfg-options model.pretrained=FILE. Drop path is published for Base alone.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_128_3augment.py",
    "../_base_/schedules/imagenet_300e_adamw_warm5_bf16.py",
]
model = dict(
    backbone=dict(name="adventurer_tiny_patch16_224"),
    mixup=dict(label_smoothing=0.0),
)
train_cfg = dict(max_epochs=100)
train_dataloader = dict(dataset=dict(transform=dict(input_size=224)))
val_dataloader = test_dataloader = dict(dataset=dict(transform=dict(input_size=224)))

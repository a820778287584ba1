# adventurer_base_patch16_384: reported top-1 84.2 % (arXiv 2410.07599), fine-tuned from 224 x 224,
# --cfg-options model.pretrained=FILE. No recipe is published for this size: here, that of the last stage before.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_20e_adamw_constant_bf16.py",
]
model = dict(backbone=dict(name="adventurer_base_patch16_384", drop_path_rate=0.6))
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384, erasing_prob=0.0)))
val_dataloader = test_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))

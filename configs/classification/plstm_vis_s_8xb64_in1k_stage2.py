# plstm_vis_s, second stage: 20 epochs at 224 x 224 from the weights of the first,
# --cfg-options model.pretrained=FILE.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_20e_adamw_cosine_bf16.py",
]
model = dict(backbone=dict(name="plstm_vis_s", drop_path_rate=0.05))
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(erasing_prob=0.0)))
val_dataloader = test_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))

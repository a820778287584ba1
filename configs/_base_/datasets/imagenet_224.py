# ImageNet-1K or any other photographs in the layout data_root/{train,val}/CLASS/*.jpg, at 224 x 224.
data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.ImageFolder",
        root=data_root,
        split="train",
        transform=dict(
            train=True,
            input_size=224,
            interpolation="bicubic",
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            erasing_prob=0.25,
            erasing_mode="pixel",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False),
    dataset=dict(
        type="vision_ssm.ImageFolder",
        root=data_root,
        split="val",
        transform=dict(train=False, input_size=224, interpolation="bicubic", crop_pct=224 / 256),
    ),
)
val_evaluator = dict(type="vision_ssm.ClassificationMetric")
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()

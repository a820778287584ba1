# ImageNet-1K or any other photographs in the layout data_root/{train,val}/CLASS/*.jpg, at 128 x 128 with 3-Augment and
# repeated augmentation: three copies of an image, each augmented anew, in one epoch of a third of the images.
data_root = "data/imagenet"
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.RepeatedAugmentSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.ImageFolder",
        root=data_root,
        split="train",
        transform=dict(
            train=True,
            input_size=128,
            interpolation="bicubic",
            auto_augment="3a",
            color_jitter=0.4,
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
        transform=dict(train=False, input_size=128, interpolation="bicubic", crop_pct=0.875),
    ),
)
val_evaluator = dict(type="vision_ssm.ClassificationMetric")
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()

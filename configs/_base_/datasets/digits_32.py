# The UCI digits that tools/prepare_data.py writes: ten classes of grey 8 x 8 scans, enlarged to 32 x 32.
data_root = "data/digits"
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.ImageFolder",
        root=data_root,
        split="train",
        channels=1,
        transform=dict(train=True, policy="small", input_size=32, mean=(0.3,), std=(0.35,), padding=2, rotation=10.0),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False),
    dataset=dict(
        type="vision_ssm.ImageFolder",
        root=data_root,
        split="val",
        channels=1,
        transform=dict(train=False, input_size=32, mean=(0.3,), std=(0.35,), crop_pct=1.0),
    ),
)
val_evaluator = dict(type="vision_ssm.ClassificationMetric")
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()

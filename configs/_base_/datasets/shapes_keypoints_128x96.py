# The drawn figures that tools/prepare_data.py writes, with COCO's seventeen keypoints, at 128 x 96.
data_root = "data/shapes_keypoints"
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate_poses"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.CocoKeypoints",
        root=data_root,
        split="train",
        transform=dict(train=True, input_size=(128, 96), stride=4, sigma=1.5, scale=(0.75, 1.25), rotation=30.0),
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    collate_fn=dict(type="vision_ssm.collate_poses"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False),
    dataset=dict(
        type="vision_ssm.CocoKeypoints",
        root=data_root,
        split="val",
        transform=dict(train=False, input_size=(128, 96)),
    ),
)
val_evaluator = dict(type="vision_ssm.CocoKeypointMetric")
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()

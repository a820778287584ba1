# The arrow-pointing task of arXiv 2506.11997, drawn while it is read: trained on 100,000 pictures of 192 x 192, and
# evaluated on others of that size and, under the name 384, on pictures of 384 x 384 with arrows and discs of the same
# size in pixels. --data-root DIR keeps the pictures in DIR. A test at one more size:
#   tools/test.py CONFIG CHECKPOINT --cfg-options test_cfg.also.512.batch_size=16 test_cfg.also.512.dataset.size=512 \
#       test_cfg.also.512.dataset.transform.input_size=512
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.ArrowPointing",
        split="train",
        root=None,
        transform=dict(train=True, policy="none", input_size=192),
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
        type="vision_ssm.ArrowPointing",
        split="val",
        root=None,
        transform=dict(train=False, input_size=192, crop_pct=1.0),
    ),
)
val_evaluator = dict(type="vision_ssm.ClassificationMetric")
val_cfg = dict(
    type="vision_ssm.SeveralValLoop",
    also={"384": dict(batch_size=32, dataset=dict(split="val_384", transform=dict(input_size=384)))},
)
test_dataloader = dict(
    batch_size=128,
    num_workers=8,
    pin_memory=True,
    collate_fn=dict(type="vision_ssm.collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False),
    dataset=dict(
        type="vision_ssm.ArrowPointing",
        split="test",
        root=None,
        transform=dict(train=False, input_size=192, crop_pct=1.0),
    ),
)
test_evaluator = val_evaluator
test_cfg = dict(
    type="vision_ssm.SeveralTestLoop",
    also={"384": dict(batch_size=32, dataset=dict(split="test_384", transform=dict(input_size=384)))},
)

# The drawn volumes of tools/prepare_data.py organs, NIfTI files in Hounsfield units, slices at 96 x 96.
data_root = "data/organs"
window = (-125.0, 275.0)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.NiftiSlices",
        root=data_root,
        split="train",
        window=window,
        transform=dict(
            policy="msvmunet", size=96, most=1, noise=0.02, blur=0.5, contrast=(0.9, 1.1), scale=(0.9, 1.1),
            degrees=8.0, shear=4.0, shift=0.05,
        ),  # fmt: skip
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.NiftiVolumes", root=data_root, split="val", window=window),
)
val_evaluator = dict(type="vision_ssm.VolumeMetric")
val_cfg = dict()
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.NiftiVolumes", root=data_root, split="test", window=window),
)
test_evaluator = val_evaluator
test_cfg = dict()

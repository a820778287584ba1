# ISIC 2017 as VM-UNet lays it out (SPLIT/images, SPLIT/masks), at 256 x 256. Scores are those of the paper, over all
# pixels of the set, and beside them, as image/..., the means of the images' own.
data_root = "data/isic2017"
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.IsicImages", root=data_root, split="train", transform=dict(policy="isic", size=256)
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.IsicVolumes", root=data_root, split="val", size=256),
)
val_evaluator = [
    dict(type="vision_ssm.GlobalMetric"),
    dict(type="vision_ssm.VolumeMetric", distances=False, prefix="image"),
]
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = [dict(type="vision_ssm.GlobalMetric"), dict(type="vision_ssm.VolumeMetric", prefix="image")]
test_cfg = dict()

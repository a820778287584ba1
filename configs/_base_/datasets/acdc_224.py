# ACDC as MT-UNet prepared it, slices at 224 x 224. The best weights are those of the validation slices, while the code
# of MSVM-UNet takes the test volumes for that. The test also gives, as paper/..., the scores by the rules of that code.
data_root = "data/ACDC"
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.AcdcSlices", root=data_root, split="train", transform=dict(policy="msvmunet", size=224)
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.AcdcVolumes", root=data_root, split="valid"),
)
val_evaluator = dict(type="vision_ssm.VolumeMetric", distances=False)
val_cfg = dict()
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.AcdcVolumes", root=data_root, split="test"),
)
test_evaluator = [
    dict(type="vision_ssm.VolumeMetric"),
    dict(type="vision_ssm.VolumeMetric", rule="paper", prefix="paper"),
]
test_cfg = dict()

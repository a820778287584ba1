# Synapse as TransUNet prepared it, slices at 224 x 224. There is no validation split: as in the papers, the best
# weights are those of the test volumes. The test also gives, as paper/..., the scores by the rules of the papers' code.
data_root = "data/Synapse"
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.SynapseSlices", root=data_root, split="train", transform=dict(policy="synapse", size=224)
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    collate_fn=dict(type="pseudo_collate"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False, round_up=False),
    dataset=dict(type="vision_ssm.SynapseVolumes", root=data_root, split="test_vol"),
)
val_evaluator = dict(type="vision_ssm.VolumeMetric", distances=False)
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = [
    dict(type="vision_ssm.VolumeMetric"),
    dict(type="vision_ssm.VolumeMetric", rule="paper", prefix="paper"),
]
test_cfg = dict()

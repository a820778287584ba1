# efficientvim_m4: reported top-1 79.4 % (arXiv 2411.15241), 300 epochs.
# From a quarter of the epochs on, the original adds a loss against its averaged weights (MESA), left out here.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw_b2048.py",
]
model = dict(backbone=dict(name="efficientvim_m4"))
train_dataloader = dict(batch_size=256, dataset=dict(transform=dict(input_size=256)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=256)))
test_dataloader = val_dataloader
# The original decays the gains of its layer norms, which it stores with three dimensions.
optim_wrapper = dict(paramwise_cfg=dict(decay=["stages.*.blocks.?.norm.weight", "head.norms.*.weight", "norm.weight"]))

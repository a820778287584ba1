# Segmentation of medical images: what every run has. The best weights are those of the highest validation Dice.
_base_ = "./default_runtime.py"
default_hooks = dict(
    checkpoint=dict(best="dice"),
    record=dict(metric="dice", accuracy="dice"),
    pictures=dict(_delete_=True, type="vision_ssm.MedicalPicturesHook"),
)
randomness = dict(seed=42)

# Pose estimation: what every run has. The best weights are those of the highest AP.
_base_ = "./default_runtime.py"
default_hooks = dict(
    checkpoint=dict(best="coco/AP"),
    record=dict(metric="coco/AP", accuracy="accuracy"),
    pictures=dict(_delete_=True, type="vision_ssm.PosePicturesHook"),
)

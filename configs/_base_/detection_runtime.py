# Detection and instance segmentation on mmdet: what every run has, counted in epochs.
_base_ = "./default_runtime.py"
default_scope = "mmdet"
custom_imports = dict(imports=["vision_ssm.integrations.mm"])
default_hooks = dict(
    checkpoint=dict(best="coco/bbox_mAP"),
    record=dict(metric="coco/bbox_mAP", accuracy=""),
    pictures=dict(_delete_=True, type="vision_ssm.DensePicturesHook"),
)
log_processor = dict(window_size=50)

# Semantic segmentation on mmseg: what every run has, counted in iterations.
_base_ = "./default_runtime.py"
default_scope = "mmseg"
custom_imports = dict(imports=["vision_ssm.integrations.mm"])
default_hooks = dict(
    checkpoint=dict(every_iterations=4000, best="mIoU"),
    record=dict(metric="mIoU", accuracy="decode.acc_seg"),
    pictures=dict(_delete_=True, type="vision_ssm.DensePicturesHook"),
)
log_processor = dict(by_epoch=False, window_size=50)
tta_model = dict(type="SegTTAModel")

# As detection_runtime.py, counted in iterations.
_base_ = "./detection_runtime.py"
default_hooks = dict(checkpoint=dict(every_iterations=20000))
log_processor = dict(by_epoch=False)

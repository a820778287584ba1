# What every run of pose estimation has: hooks, logging, seed. The best weights are those of the highest AP.
default_scope = "mmengine"
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="vision_ssm.CheckpointHook", every_epochs=1, every_iterations=None, keep=2, best="coco/AP"),
    non_finite=dict(type="vision_ssm.NonFiniteHook"),
    record=dict(type="vision_ssm.RecordHook", metric="coco/AP", accuracy="accuracy"),
    pictures=dict(type="vision_ssm.PosePicturesHook"),
    progress=dict(type="vision_ssm.ProgressHook"),
)
env_cfg = dict(
    cudnn_benchmark=True,
    cpu_threads=None,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
randomness = dict(seed=0, deterministic=False)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
log_processor = dict(by_epoch=True, window_size=20)
log_level = "INFO"
launcher = "none"
load_from = None
resume = False

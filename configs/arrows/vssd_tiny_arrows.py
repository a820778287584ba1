# VSSD-T on the arrow-pointing task of pLSTM (arXiv 2506.11997).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_arrows.py",
    "../_base_/datasets/arrows_192.py",
    "../_base_/schedules/arrows_50e_adamw.py",
]
model = dict(backbone=dict(name="vssd_tiny", drop_path_rate=0.0))

# pLSTM-Vis-T with six heads on the arrow-pointing task (arXiv 2506.11997).
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_arrows.py",
    "../_base_/datasets/arrows_192.py",
    "../_base_/schedules/arrows_50e_adamw.py",
]
model = dict(backbone=dict(name="plstm_vis_t", num_heads=6, img_size=192))

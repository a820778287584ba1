# pLSTM-Vis-T without a position embedding on the arrow-pointing task.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_arrows.py",
    "../_base_/datasets/arrows_192.py",
    "../_base_/schedules/arrows_50e_adamw.py",
]
model = dict(backbone=dict(name="plstm_vis_t_noposemb", num_heads=6, img_size=192))

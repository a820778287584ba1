# pLSTM-Vis-T with every layer in diffusion mode on the arrow-pointing task.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_arrows.py",
    "../_base_/datasets/arrows_192.py",
    "../_base_/schedules/arrows_50e_adamw.py",
]
model = dict(backbone=dict(name="plstm_vis_t_dmodeonly", num_heads=6, img_size=192))

# vssd_micro_d48, VSSD-M of the paper: reported top-1 82.5 % (arXiv 2407.18559).
# The original asks for drop path 0.1 here, under a name that its code does not read: the model was trained with 0.2.
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier_in1k.py",
    "../_base_/datasets/imagenet_224.py",
    "../_base_/schedules/imagenet_300e_adamw.py",
]
model = dict(backbone=dict(name="vssd_micro_d48", drop_path_rate=0.2))

# Ten digits in about a minute on two CPU cores, validation top-1 of at least 98 %:
#   python tools/prepare_data.py digits data/digits && python tools/train.py configs/classification/quickstart_digits.py
_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/models/classifier.py",
    "../_base_/datasets/digits_32.py",
    "../_base_/schedules/short_adamw.py",
]
model = dict(backbone=dict(name="vmamba_micro", in_chans=1), num_classes=10)
# One core computes, the other prepares the images: operations this small gain nothing from a second thread.
env_cfg = dict(cpu_threads=1)

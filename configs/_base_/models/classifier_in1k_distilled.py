# ImageNet-1K classifier with batch mixing and a teacher; a leaf config names the backbone, which has two classifiers.
# Weights of the teacher: https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth, to be downloaded first.
model = dict(
    type="vision_ssm.ImageClassifier",
    backbone=dict(name="groupmamba_tiny"),
    num_classes=1000,
    loss=dict(type="SoftTargetCrossEntropy"),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1),
    distillation=dict(
        teacher="regnety_160.deit_in1k",
        checkpoint="data/teachers/regnety_160-a5fe301d.pth",
        kind="hard",
        alpha=0.5,
        temperature=1.0,
    ),
)

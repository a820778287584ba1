# ImageNet-1K classifier with batch mixing; a leaf config names the backbone.
model = dict(
    type="vision_ssm.ImageClassifier",
    backbone=dict(name="vmamba_tiny_s1l8"),
    num_classes=1000,
    loss=dict(type="SoftTargetCrossEntropy"),
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1),
)

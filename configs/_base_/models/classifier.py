# Classifier with label smoothing and without batch mixing; a leaf config names the backbone and the classes.
model = dict(
    type="vision_ssm.ImageClassifier",
    backbone=dict(name="vmamba_micro"),
    num_classes=10,
    loss=dict(type="LabelSmoothingCrossEntropy", smoothing=0.1),
    mixup=None,
    pretrained=None,
    reset_head=False,
)

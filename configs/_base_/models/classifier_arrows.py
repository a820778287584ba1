# Classifier of two classes without label smoothing or batch mixing; a leaf config names the backbone.
model = dict(
    type="vision_ssm.ImageClassifier",
    backbone=dict(name="plstm_vis_t"),
    num_classes=2,
    loss=dict(type="CrossEntropyLoss"),
    mixup=None,
    pretrained=None,
    reset_head=False,
)

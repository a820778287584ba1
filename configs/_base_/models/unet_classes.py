# Several classes, the background among them: cross-entropy and Dice. A leaf config names the U-Net and the classes.
model = dict(
    type="vision_ssm.MedicalSegmentor",
    unet=dict(name="vmunet_synapse"),
    num_classes=9,
    loss=dict(kind="dice_ce", weights=(1.0, 1.0)),
    inference=dict(size=(224, 224)),
    pretrained=None,
)

# One foreground class through a sigmoid, binary cross-entropy and Dice in equal parts. A leaf config names the U-Net.
model = dict(
    type="vision_ssm.MedicalSegmentor",
    unet=dict(name="vmunet_isic"),
    num_classes=1,
    loss=dict(kind="dice_bce", weights=(1.0, 1.0)),
    inference=dict(size=(256, 256)),
    pretrained=None,
)

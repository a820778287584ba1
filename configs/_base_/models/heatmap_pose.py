# Heat maps of COCO's seventeen keypoints; a leaf config names the backbone, and gives the head transposed convolutions
# where the backbone's map is coarser than a quarter of the image.
model = dict(
    type="vision_ssm.TopDownPose",
    backbone=dict(name="hrvmamba_small_pose"),
    deconv_channels=(),
    pretrained=None,
    flip_test=True,
    shift_heatmap=True,
)

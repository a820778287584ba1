# Persons of COCO keypoints at 384x288, with heat maps of 96 x 72, in the layout data_root/{train2017,val2017}/*.jpg and
# data_root/annotations/person_keypoints_{train,val}2017.json. Validation and test take the boxes of the annotations;
# published numbers are for those of a detector: {val,test}_dataloader.dataset.detections =
# person_detection_results/COCO_val2017_detections_AP_H_56_person.json, a path below data_root.
data_root = "data/coco"
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="vision_ssm.collate_poses"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=True),
    dataset=dict(
        type="vision_ssm.CocoKeypoints",
        root=data_root,
        split="train",
        transform=dict(train=True, input_size=(384, 288), stride=4, sigma=3.0),
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="vision_ssm.collate_poses"),
    sampler=dict(type="vision_ssm.EpochSampler", shuffle=False),
    dataset=dict(
        type="vision_ssm.CocoKeypoints",
        root=data_root,
        split="val",
        detections=None,
        transform=dict(train=False, input_size=(384, 288)),
    ),
)
val_evaluator = dict(type="vision_ssm.CocoKeypointMetric")
val_cfg = dict()
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()

"""Small pictures and small configs of mmseg and mmdet for the tests of dense training."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask
from engine_support import read_config
from mmengine.config import Config
from PIL import Image

CLASSES = ("ground", "bright", "dark")
PALETTE = [[120, 120, 120], [230, 30, 30], [30, 30, 230]]
SIDE = 64
TRAIN, VAL = 6, 3
BATCH = 2
RUNTIMES = Path(__file__).resolve().parent.parent / "configs" / "_base_"


def write_dense_pictures(root: Path) -> Path:
    """One bright and one dark box on grey ground in each picture, as maps (ADE20K) and as instances (COCO)."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, part, count in (("training", "train", TRAIN), ("validation", "val", VAL)):
        images, maps = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        found: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        found["categories"] = [{"id": 3 * label, "name": CLASSES[label]} for label in (1, 2)]
        for number in range(count):
            height, width = (SIDE, SIDE - 16) if number % 2 else (SIDE - 16, SIDE)  # two groups of shapes
            picture, labels = np.full((height, width, 3), 120.0), np.ones((height, width), np.uint8)
            for label in (1, 2):
                top, left = generator.integers(2, height - 26), generator.integers(2, width // 2 - 16)
                left += (label - 1) * width // 2
                mask = np.zeros((height, width), np.uint8)
                mask[top : top + 22, left : left + 14] = 1
                picture[mask > 0], labels[mask > 0] = (215.0, 30.0)[label - 1], label + 1
                corners = [left, top, left + 14, top, left + 14, top + 22, left, top + 22]
                found["annotations"].append(
                    dict(id=len(found["annotations"]) + 1, image_id=number, category_id=3 * label, iscrowd=0,
                         bbox=[int(left), int(top), 14, 22], area=14 * 22, segmentation=[list(map(int, corners))])
                )  # fmt: skip
                assert pycocotools.mask.area(pycocotools.mask.encode(np.asfortranarray(mask))) == 14 * 22
            labels[0] = 0  # ignored
            picture += generator.normal(0, 8, picture.shape)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(images / f"{number:03}.jpg", quality=95)
            Image.fromarray(labels).save(maps / f"{number:03}.png")
            found["images"].append(dict(id=number, file_name=f"{number:03}.jpg", height=height, width=width))
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(found))
    return root


def _finish(cfg: dict, runtime: str, work_dir: Path) -> Config:
    base = read_config(RUNTIMES / runtime)
    base.merge_from_dict(dict(default_hooks=dict(checkpoint=dict(keep=20), logger=dict(interval=1))))
    for key, value in cfg.items():
        base[key] = value
    base.visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    base.env_cfg.cpu_threads = 1
    base.work_dir = str(work_dir)
    return base


def _loader(dataset: dict, batch: int, shuffle: bool, **extra: object) -> dict:
    sampler = dict(type="vision_ssm.EpochSampler", shuffle=shuffle, **extra)
    return dict(batch_size=batch, num_workers=0, sampler=sampler, dataset=dataset)


def _optimisation(iterations: int) -> dict:
    return dict(
        optim_wrapper=dict(
            type="vision_ssm.MixedPrecisionOptimWrapper",
            constructor="vision_ssm.ParameterGroups",
            optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01),
            clip_grad=dict(max_norm=10.0),
        ),
        param_scheduler=[dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=iterations)],
    )


BACKBONE = dict(
    type="vision_ssm.VMamba", variant="vmamba_micro", dims=8, depths=(1, 1, 1, 1), drop_path_rate=0.1, init_cfg=None
)
WIDTHS = [8, 16, 32, 64]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def segmentation_config(data: Path, work_dir: Path, iterations: int = 6) -> Config:
    """UPerNet with FCN auxiliary head on `write_dense_pictures`, with random scale, crop, flip and colours."""
    norm = dict(type="SyncBN", requires_grad=True)
    head = dict(channels=8, num_classes=len(CLASSES), norm_cfg=norm, align_corners=False, dropout_ratio=0.1)
    loss = dict(type="CrossEntropyLoss", use_sigmoid=False)
    training = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="RandomResize", scale=(SIDE, SIDE), ratio_range=(0.8, 1.5), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(48, 48), cat_max_ratio=0.95),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    testing = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="PackSegInputs"),
    ]
    flips = [[dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (1.0, 1.25)],
             [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)],
             [dict(type="LoadAnnotations", reduce_zero_label=True)], [dict(type="PackSegInputs")]]  # fmt: skip

    def dataset(split: str, pipeline: list) -> dict:
        prefix = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
        return dict(type="BaseSegDataset", data_root=str(data), data_prefix=prefix, reduce_zero_label=True,
                    metainfo=dict(classes=CLASSES, palette=PALETTE), pipeline=pipeline)  # fmt: skip

    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", mean=MEAN, std=STD, bgr_to_rgb=True, pad_val=0,
                               seg_pad_val=255, size=(48, 48)),
        backbone=BACKBONE,
        decode_head=dict(type="UPerHead", in_channels=WIDTHS, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6),
                         loss_decode=dict(loss, loss_weight=1.0), **head),
        auxiliary_head=dict(type="FCNHead", in_channels=WIDTHS[2], in_index=2, num_convs=1, concat_input=False,
                            loss_decode=dict(loss, loss_weight=0.4), **head),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )  # fmt: skip
    return _finish(
        dict(
            data_root=str(data),
            model=model,
            train_dataloader=_loader(dataset("training", training), BATCH, True, endless=True),
            val_dataloader=_loader(dataset("validation", testing), 1, False),
            test_dataloader=_loader(dataset("validation", testing), 1, False),
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=4),
            val_cfg=dict(),
            test_cfg=dict(),
            test_pipeline=testing,
            tta_pipeline=[dict(type="LoadImageFromFile"), dict(type="TestTimeAug", transforms=flips)],
            **_optimisation(iterations),
        ),
        "segmentation_runtime.py",
        work_dir,
    )


def detection_config(data: Path, work_dir: Path, epochs: int = 2) -> Config:
    """Mask R-CNN with FPN on `write_dense_pictures`, batches of one aspect, random scale and flip."""
    training = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="RandomResize", scale=(SIDE, SIDE), ratio_range=(0.8, 1.3), keep_ratio=True),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackDetInputs"),
    ]
    testing = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
    ]

    def dataset(part: str, split: str, pipeline: list) -> dict:
        return dict(type="CocoDataset", data_root=str(data), ann_file=f"annotations/instances_{part}.json",
                    data_prefix=dict(img=f"images/{split}/"), metainfo=dict(classes=CLASSES[1:], palette=PALETTE[1:]),
                    test_mode=part == "val", pipeline=pipeline)  # fmt: skip

    anchors = dict(type="AnchorGenerator", scales=[2], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])
    coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3, ignore_iof_thr=-1)
    sampler = dict(type="RandomSampler", num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
    proposals = dict(nms_pre=50, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)

    def extractor(size: int) -> dict:
        layer = dict(type="RoIAlign", output_size=size, sampling_ratio=0)
        return dict(type="SingleRoIExtractor", roi_layer=layer, out_channels=16, featmap_strides=[4, 8, 16, 32])

    model = dict(
        type="MaskRCNN",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=MEAN, std=STD, bgr_to_rgb=True, pad_mask=True,
                               pad_size_divisor=32),
        backbone=BACKBONE,
        neck=dict(type="FPN", in_channels=WIDTHS, out_channels=16, num_outs=5),
        rpn_head=dict(type="RPNHead", in_channels=16, feat_channels=16, anchor_generator=anchors,
                      bbox_coder=dict(coder, target_stds=[1.0] * 4),
                      loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
                      loss_bbox=dict(type="L1Loss", loss_weight=1.0)),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=extractor(7),
            bbox_head=dict(type="Shared2FCBBoxHead", in_channels=16, fc_out_channels=32, roi_feat_size=7, num_classes=2,
                           bbox_coder=coder, reg_class_agnostic=False,
                           loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                           loss_bbox=dict(type="L1Loss", loss_weight=1.0)),
            mask_roi_extractor=extractor(14),
            mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2,
                           loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0)),
        ),
        train_cfg=dict(
            rpn=dict(assigner=dict(assigner, pos_iou_thr=0.7, neg_iou_thr=0.3, match_low_quality=True),
                     sampler=dict(sampler, add_gt_as_proposals=False), allowed_border=-1, pos_weight=-1, debug=False),
            rpn_proposal=proposals,
            rcnn=dict(assigner=dict(assigner, match_low_quality=True), sampler=sampler, mask_size=28, pos_weight=-1,
                      debug=False),
        ),
        test_cfg=dict(rpn=proposals, rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10,
                                               mask_thr_binary=0.5)),
    )  # fmt: skip
    evaluator = dict(type="CocoMetric", ann_file=f"{data}/annotations/instances_val.json", metric=["bbox", "segm"])
    train_loader = _loader(dataset("train", "training", training), BATCH, True)
    train_loader["batch_sampler"] = dict(type="vision_ssm.AspectRatioBatchSampler")
    return _finish(
        dict(
            data_root=str(data),
            model=model,
            train_dataloader=train_loader,
            val_dataloader=_loader(dataset("val", "validation", testing), 1, False),
            test_dataloader=_loader(dataset("val", "validation", testing), 1, False),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
            val_cfg=dict(),
            test_cfg=dict(),
            test_pipeline=testing,
            **_optimisation(epochs * TRAIN // BATCH),
        ),
        "detection_runtime.py",
        work_dir,
    )

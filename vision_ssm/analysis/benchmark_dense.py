"""Speed of a segmentation or detection config, with other backbones under the same heads beside it.

Images, maps, boxes and masks are random, of the sizes asked for; the step is the one that training or testing takes,
preparation of the images on the device included, reading of files not.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from vision_ssm.registry import suggest

from .benchmark import Measurement, ModelSettings, check_model
from .timing import (
    BenchmarkError,
    allocated,
    describe_backends,
    fits_in_memory,
    on_device,
    peak_memory,
    release_memory,
    slowest_line,
    synchronize,
    time_in_turns,
    used_backends,
)

INSTANCES = 7
"""Objects in an image of a detector: COCO's mean."""
PEERS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "swin_tiny": (
        [96, 192, 384, 768],
        dict(type="mmdet.SwinTransformer", embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
             window_size=7, drop_path_rate=0.2, convert_weights=False),
    ),
    "convnext_tiny": (
        [96, 192, 384, 768],
        dict(type="mmseg.TIMMBackbone", model_name="convnext_tiny", pretrained=False, out_indices=(0, 1, 2, 3),
             drop_path_rate=0.2),
    ),
}  # fmt: skip
"""Backbones to compare with: the widths of their four maps, and their config."""


def _samples(scope: str, classes: int, settings: ModelSettings) -> dict[str, list]:
    """A batch as a loader of mmseg or mmdet gives it."""
    height, width = settings.size
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator) for _ in range(settings.batch)
    ]
    meta = {**dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (height, width)), "scale_factor": (1.0, 1.0)}
    if scope == "mmseg":
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        def sample() -> Any:
            labels = torch.randint(0, classes, (1, height, width), generator=generator)
            return SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels))
    else:
        import numpy as np
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        def sample() -> Any:
            sides = torch.tensor([width, height]).repeat(INSTANCES, 1)
            corners = torch.rand(INSTANCES, 2, generator=generator) * 0.7 * sides
            extent = (0.05 + 0.25 * torch.rand(INSTANCES, 2, generator=generator)) * sides
            boxes = torch.cat([corners, corners + extent], 1)
            masks = np.zeros((INSTANCES, height, width), np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
                mask[top:bottom, left:right] = 1
            truth = InstanceData(
                bboxes=boxes,
                labels=torch.randint(0, classes, (INSTANCES,), generator=generator),
                masks=BitmapMasks(masks, height, width),
            )
            return DetDataSample(metainfo=meta, gt_instances=truth, ignored_instances=InstanceData(bboxes=boxes[:0]))

    return dict(inputs=images, data_samples=[sample() for _ in images])


def _classes(model: Any) -> int:
    """The number of classes that a model's config is for."""
    for head in (model.get("decode_head"), (model.get("roi_head") or {}).get("bbox_head"), model.get("bbox_head")):
        head = head[0] if isinstance(head, (list, tuple)) else head
        if head:
            return head["num_classes"]
    raise BenchmarkError("this config's model has neither decode_head nor roi_head nor bbox_head")


def dense_contenders(cfg: Config, peers: Sequence[str]) -> dict[str, Any]:
    """Model configs by name: that of `cfg`, and those with the backbone of each of `peers` in its place.

    Raises:
        BenchmarkError: not a config of mmseg or mmdet, an unknown peer, or one whose maps do not fit under its heads.
    """
    from vision_ssm.integrations.checks import backbone_maps

    if cfg.get("default_scope") not in ("mmseg", "mmdet"):
        raise BenchmarkError(f"a config of mmseg or mmdet is needed, this one is of {cfg.get('default_scope')!r}")
    own = copy.deepcopy(cfg.model)
    own.backbone.init_cfg = None
    found = {own.backbone.get("variant", own.backbone.type): own}
    for peer in peers:
        if peer not in PEERS:
            raise BenchmarkError(f"unknown backbone {peer!r} to compare with.{suggest(peer, PEERS)}")
        widths, backbone = PEERS[peer]
        channels = backbone_maps(own.backbone).channels
        if channels != widths:
            raise BenchmarkError(f"{peer} has maps of {widths} channels, the heads of this config are for {channels}")
        found[peer] = copy.deepcopy(own)
        found[peer].backbone = backbone
    return found


def _step(model: nn.Module, batch: dict, settings: ModelSettings) -> Callable[[], Any]:
    preprocess: Any = model.data_preprocessor
    kind = settings.device.type

    def autocast() -> Any:
        return torch.autocast(kind, dtype=settings.amp, enabled=settings.amp is not None)

    def infer() -> Any:
        with torch.inference_mode(), autocast():
            return model(**preprocess(copy.deepcopy(batch), False), mode="predict")

    if not settings.train:
        return infer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-6, fused=kind == "cuda"
    )

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            losses = model(**preprocess(copy.deepcopy(batch), True), mode="loss")
        loss, _ = model.parse_losses(losses)  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def benchmark_config(cfg: Config, settings: ModelSettings, peers: Sequence[str] = ()) -> list[Measurement]:
    """Time the model of a config and other backbones under its heads, in turns.

    Args:
        cfg: a config of mmseg or mmdet; its weights stay random and its batch norms of one device.
        settings: size, batch, device, training or inference, autocast, repeats, warm-up, profile.
        peers: names of `PEERS`.

    Returns:
        One row per backbone. One that ran out of memory has a note instead of times.

    Raises:
        BenchmarkError: see `dense_contenders`; or the backbone computes something else than on its reference operators,
            or a loss is not finite.
    """
    from mmengine.model import revert_sync_batchnorm

    device = settings.device
    if settings.graph or settings.compile or settings.channels_last:
        raise BenchmarkError("whole configs are timed as they train: without CUDA graphs, compilation, channels_last")
    contenders = dense_contenders(cfg, peers)
    batch = _samples(cfg.default_scope, _classes(cfg.model), settings)
    rows, steps = {}, {}
    release_memory(device)
    with on_device(device):
        for name, options in contenders.items():
            row = rows[name] = Measurement(name, settings.size, settings.batch)

            def prepare(name: str = name, options: Any = options, row: Measurement = row) -> None:
                before = allocated(device)
                with DefaultScope.overwrite_default_scope(cfg.default_scope):
                    model = revert_sync_batchnorm(MODELS.build(options)).to(device)
                row.parameters = sum(parameter.numel() for parameter in model.parameters())
                backbone = model.backbone
                check_model(name, backbone, device, amp=settings.amp, gradients=settings.train)
                image = torch.randn(1, 3, *settings.size, device=device)
                row.backend, row.reason = describe_backends(used_backends(lambda: backbone(image)))
                model.train(settings.train)
                step = _step(model, batch, settings)
                for _ in range(settings.warmup):
                    output = step()
                if settings.train and not output.isfinite():
                    raise BenchmarkError(f"{name} is not timed: its loss is not finite")
                synchronize(device)
                row.peak_memory = peak_memory(step, device, before)
                if settings.profile:
                    row.slowest = slowest_line(step, device)
                steps[name] = step

            if not fits_in_memory(prepare, device):
                row.note = "out of memory"
        timings = time_in_turns(steps, device, settings.repeats)
    finished = []
    for name, row in rows.items():
        if name in timings:
            rate = settings.batch / timings[name].median
            finished.append(replace(row, **vars(timings[name]), images_per_second=rate))
        else:
            finished.append(replace(row, note="out of memory"))
    return finished

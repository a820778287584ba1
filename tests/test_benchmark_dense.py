"""Whole segmentation and detection configs are timed as they train and test, and refused when they are wrong."""

from pathlib import Path

import pytest
import torch
from dense_support import detection_config, segmentation_config

from vision_ssm.analysis import BenchmarkError, ModelSettings
from vision_ssm.analysis import benchmark_dense as dense
from vision_ssm.scans.core import S6Core

SETTINGS = ModelSettings(size=(64, 96), batch=2, repeats=1, warmup=1)
BUILD = {"segmentation": segmentation_config, "detection": detection_config}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", BUILD)
def test_a_config_and_a_peer_under_its_heads(kind, train, tmp_path, monkeypatch):
    small = dict(type="mmdet.SwinTransformer", embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
    monkeypatch.setitem(dense.PEERS, "small", ([8, 16, 32, 64], dict(small, convert_weights=False)))
    cfg = BUILD[kind](Path("nowhere"), tmp_path)
    settings = ModelSettings(size=(64, 96), batch=2, repeats=1, warmup=1, train=train)
    ours, peer = dense.benchmark_config(cfg, settings, ["small"])
    assert (ours.name, peer.name) == ("vmamba_micro", "small") and (ours.backend, peer.backend) == ("chunked", "-")
    for row in (ours, peer):
        assert row.median > 0 and row.images_per_second == pytest.approx(2 / row.median) and not row.note
        assert row.parameters > 1000 and row.peak_memory is None


def test_what_cannot_be_compared(tmp_path):
    cfg = segmentation_config(Path("nowhere"), tmp_path)
    with pytest.raises(BenchmarkError, match="Did you mean 'swin_tiny'"):
        dense.benchmark_config(cfg, SETTINGS, ["swin_tny"])
    with pytest.raises(BenchmarkError, match=r"\[96, 192, 384, 768\] channels, the heads of this config are for \[8, 16"):
        dense.benchmark_config(cfg, SETTINGS, ["swin_tiny"])
    cfg.default_scope = "mmengine"
    with pytest.raises(BenchmarkError, match="a config of mmseg or mmdet is needed"):
        dense.benchmark_config(cfg, SETTINGS)


def test_a_wrong_backbone_is_not_timed(tmp_path, monkeypatch):
    cfg = segmentation_config(Path("nowhere"), tmp_path)
    plain = S6Core.forward

    def wrong(self, *args, **kwargs):
        from vision_ssm.ops.backend import demanded_backend

        result = plain(self, *args, **kwargs)
        return result if demanded_backend() == "reference" else 1.01 * result

    monkeypatch.setattr(S6Core, "forward", wrong)
    with pytest.raises(BenchmarkError, match="vmamba_micro is not timed: its logits are .* away from the reference"):
        dense.benchmark_config(cfg, SETTINGS)


def test_random_data_is_what_loaders_give():
    batch = dense._samples("mmdet", 5, SETTINGS)
    sample = batch["data_samples"][0]
    assert batch["inputs"][0].dtype == torch.uint8 and batch["inputs"][0].shape == (3, 64, 96)
    boxes = sample.gt_instances.bboxes
    assert len(boxes) == dense.INSTANCES and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 0::2] <= 96).all() and (boxes[:, 1::2] <= 64).all() and (boxes >= 0).all()
    assert (sample.gt_instances.masks.masks.sum((1, 2)) > 0).all()

"""mmdet's extractor of region features, for mixed precision. Importing this module imports mmdet."""

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import roi_extractors

from .mmcv_ext import widen


class SingleRoIExtractor(roi_extractors.SingleRoIExtractor):
    """mmdet's class, with regions and features in float32 at least.

    mmdet's own casts the corners of regions to the dtype of the features. bfloat16 has 8 bits for them, so that at 1000
    pixels a corner is up to 2 pixels off, and 4 beyond 1024.
    """

    def forward(
        self, feats: Sequence[torch.Tensor], rois: torch.Tensor, roi_scale_factor: float | None = None
    ) -> torch.Tensor:
        """feats: maps (B, C, H, W) of the levels. rois: (K, 5), image and corners. Returns (K, C, h, w), float32."""
        return super().forward(tuple(widen(*feats)), *widen(rois), roi_scale_factor)

"""Building blocks shared by every backbone: the only place for norms, stems, downsampling, MLPs and position tables."""

from .activation import get_activation
from .conv import ChannelLastConv2d
from .downsample import ConvDownsample, PatchMerging
from .mlp import build_mlp
from .norm import ChannelLastBatchNorm, get_norm
from .position import PositionTable, resample_position_table
from .stem import ConvStem, PatchStem

__all__ = [
    "ChannelLastBatchNorm",
    "ChannelLastConv2d",
    "ConvDownsample",
    "ConvStem",
    "PatchMerging",
    "PatchStem",
    "PositionTable",
    "build_mlp",
    "get_activation",
    "get_norm",
    "resample_position_table",
]

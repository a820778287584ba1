"""Building blocks shared by every backbone: the only place for norms, stems, downsampling, MLPs and position tables."""

from .activation import get_activation
from .conv import CausalConv1d, ChannelLastConv2d, DepthwiseConv2d
from .conv_ffn import ConvMlp
from .deformable import DeformableConv2d
from .downsample import ConvDownsample, InvertedDownsample, PatchMerging
from .gate import ChannelGate
from .head import AttentionHead, DistilledHead, HiddenStateHead
from .high_resolution import Bottleneck, ConvNorm, ConvNormStem, Fusion, SumNeck
from .mlp import build_mlp
from .norm import ChannelLastBatchNorm, LayerNorm, RMSNorm, add_norm, get_norm, synchronize_batch_norms
from .position import PositionTable, resample_position_table
from .pyramid import SimplePyramid
from .rotary import RotaryTable
from .stem import ConvStem, DeepConvStem, PatchStem, ResidualConvStem
from .watched import is_plain

__all__ = [
    "AttentionHead",
    "Bottleneck",
    "CausalConv1d",
    "ChannelGate",
    "ChannelLastBatchNorm",
    "ChannelLastConv2d",
    "ConvDownsample",
    "ConvMlp",
    "ConvNorm",
    "ConvNormStem",
    "ConvStem",
    "DeepConvStem",
    "DeformableConv2d",
    "DepthwiseConv2d",
    "DistilledHead",
    "Fusion",
    "HiddenStateHead",
    "InvertedDownsample",
    "LayerNorm",
    "PatchMerging",
    "PatchStem",
    "PositionTable",
    "RMSNorm",
    "ResidualConvStem",
    "RotaryTable",
    "SimplePyramid",
    "SumNeck",
    "add_norm",
    "build_mlp",
    "get_activation",
    "get_norm",
    "is_plain",
    "resample_position_table",
    "synchronize_batch_norms",
]

"""Building blocks shared by every model: the only place for norms, stems, resampling, MLPs and position tables."""

from .activation import get_activation
from .conv import CausalConv1d, ChannelLastConv2d, DepthwiseConv2d, channels_last
from .conv_ffn import ConvMlp, MultiScaleMlp
from .deformable import DeformableConv2d
from .downsample import ConvDownsample, Halve, InvertedDownsample, PatchMerging
from .gate import ChannelGate
from .head import AttentionHead, DistilledHead, HiddenStateHead
from .high_resolution import Bottleneck, ConvNorm, ConvNormStem, Fusion, SumNeck
from .init import trunc_normal_
from .mlp import build_mlp
from .norm import ChannelLastBatchNorm, LayerNorm, RMSNorm, add_norm, get_norm, synchronize_batch_norms
from .position import PositionTable, resample_position_table
from .pyramid import SimplePyramid
from .rotary import RotaryTable
from .stem import ConvStem, DeepConvStem, PatchStem, ResidualConvStem
from .upsample import LargeKernelExpanding, PatchExpanding, TransposedConv2d, depth_to_space
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
    "Halve",
    "HiddenStateHead",
    "InvertedDownsample",
    "LargeKernelExpanding",
    "LayerNorm",
    "MultiScaleMlp",
    "PatchExpanding",
    "PatchMerging",
    "PatchStem",
    "PositionTable",
    "RMSNorm",
    "ResidualConvStem",
    "RotaryTable",
    "SimplePyramid",
    "SumNeck",
    "TransposedConv2d",
    "add_norm",
    "build_mlp",
    "channels_last",
    "depth_to_space",
    "get_activation",
    "get_norm",
    "is_plain",
    "resample_position_table",
    "synchronize_batch_norms",
    "trunc_normal_",
]

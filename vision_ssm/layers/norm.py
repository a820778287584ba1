"""Normalisation of channel-last maps."""

import torch
from timm.layers import DropPath, convert_sync_batchnorm
from torch import nn

from ..ops.autocast import autocast_dtype
from ..ops.layer_norm import layer_norm
from ..registry import suggest
from .watched import is_plain


class ChannelLastBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (B, H, W, C) maps over everything but the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ChannelLastSyncBatchNorm(nn.SyncBatchNorm):
    """`ChannelLastBatchNorm` with the statistics of all processes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def synchronize_batch_norms(model: nn.Module) -> nn.Module:
    """`model` with every batch norm replaced by one that takes the statistics of all processes; weights are shared.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which would lose the layout of channel-last norms and the
    activations of timm's.
    """
    if isinstance(model, ChannelLastBatchNorm):
        twin = ChannelLastSyncBatchNorm(model.num_features, model.eps, model.momentum)
        twin.load_state_dict(model.state_dict())
        twin.weight, twin.bias = model.weight, model.bias
        return twin.train(model.training).to(model.weight.device)
    if isinstance(model, nn.modules.batchnorm._BatchNorm) and not isinstance(model, nn.SyncBatchNorm):
        return convert_sync_batchnorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronize_batch_norms(child))
    return model


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    """dtype of a norm of `x`, as PyTorch's own norms have it."""
    return x.dtype if autocast_dtype(x) is None else torch.promote_types(x.dtype, torch.float32)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a channel-last map.

    The result of `forward` is float32 under autocast, as `nn.LayerNorm`'s is; `add_norm` gives the autocast dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, ..., C). Returns the same shape."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, out_dtype=_result_dtype(x))


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the channels, computed in float32 at least.

    The result of `forward` is float32 under autocast; `add_norm` gives the autocast dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, ..., C). Returns the same shape."""
        return self.normalise(x, _result_dtype(x))

    def normalise(self, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """`forward` with the result in `out_dtype`."""
        return layer_norm(x, self.weight, eps=self.eps, center=False, out_dtype=out_dtype)


def get_norm(name: str, dim: int, eps: float = 1e-5) -> nn.Module:
    """A norm for (B, ..., `dim`) maps: ``"layer"`` or ``"rms"`` (over channels), ``"batch"`` or ``"none"``.

    Raises:
        ValueError: `name` is not one of them.
    """
    norms = {
        "layer": lambda: LayerNorm(dim, eps=eps),
        "rms": lambda: RMSNorm(dim, eps=eps),
        "batch": lambda: ChannelLastBatchNorm(dim, eps=eps),
        "none": lambda: nn.Identity(),
    }
    if name not in norms:
        raise ValueError(f"unknown norm {name!r}.{suggest(str(name), norms)}")
    return norms[name]()


def add_norm(
    norm: nn.Module, x: torch.Tensor, branch: torch.Tensor | None = None, drop_path: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = x + drop_path(branch)`` and ``norm(s)``, in one pass over memory for a layer norm or an RMS norm.

    Args:
        norm: a norm of `get_norm`.
        x: (B, ..., C), the residual stream.
        branch: what is added to it; None: nothing.
        drop_path: timm's `DropPath`, or None.

    Returns:
        s in the dtype of `x`, and the norm of it in the autocast dtype, if there is one, for the layers that follow.
    """
    dtype = autocast_dtype(x)
    out_dtype = x.dtype if dtype is None or x.dtype != torch.float32 else dtype
    if not is_plain(norm, LayerNorm, RMSNorm):
        if branch is not None:
            x = x + (branch if drop_path is None else drop_path(branch))
        return x, norm(x)
    center = isinstance(norm, LayerNorm)
    bias = norm.bias if center else None
    options = dict(eps=norm.eps, center=center, out_dtype=out_dtype)
    if branch is None:
        return x, layer_norm(x, norm.weight, bias, **options)
    scale = None
    if isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob > 0:
        scale = drop_path(x.new_ones(x.shape[0], 1, dtype=torch.float32)).flatten()  # of every sample
    return layer_norm(x, norm.weight, bias, residual=branch, row_scale=scale, **options)

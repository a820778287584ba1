"""What every backbone is and answers: written once, for all families."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from timm.layers import DropPath, trunc_normal_
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers import DepthwiseConv2d, add_norm, build_mlp, get_norm
from ..scans import build_scan
from ..scans.sequence import TokenLayout
from .family import ModelFamily, register_family, resolve_scan  # noqa: F401  (every family needs the last two)

MIN_IMAGE_SIZE = 32
DEFAULT_PRETRAINED_CFG = dict(
    input_size=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=224 / 256,
)

UNDECAYED = (
    *("A_log", "D", "dt_proj_bias", "out_norm_weight", "out_norm_bias", "table"),
    *("gate_bias", "transition_bias"),
)
"""Last parts of the names of parameters that weight decay leaves alone."""


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates rising linearly from 0 to `rate` over all blocks, grouped by stage."""
    last = max(sum(depths) - 1, 1)
    rates = [rate * i / last for i in range(sum(depths))]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths)]


def stage_widths(dims: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Width of each stage; one number is the first stage's, doubled from stage to stage."""
    widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    if len(widths) != len(depths):
        raise ValueError(f"dims and depths must have one entry per stage, got {widths} and {tuple(depths)}")
    return widths


class ScanBlock(nn.Module):
    """Pre-norm residual block: a token mixer, then an MLP.

    Args:
        dim: width C.
        scan: strategy of the mixer, for `build_scan`; False leaves the mixer out.
        norm: norm of both branches, see `get_norm`.
        mlp_ratio: hidden width of the MLP over `dim`; 0 leaves the MLP out.
        mlp_act, mlp_gated, mlp_dropout: see `build_mlp`.
        drop_path: probability of dropping a branch for a sample, in training.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        dim: int,
        scan: dict | Literal[False],
        *,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_gated: bool = False,
        mlp_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.mixer = None
        if scan is not False:
            self.norm1 = get_norm(norm, dim, norm_eps)
            self.mixer = build_scan(scan, dim)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = get_norm(norm, dim, norm_eps)
            self.mlp = build_mlp(dim, int(dim * mlp_ratio), act=mlp_act, gated=mlp_gated, dropout=mlp_dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: torch.Tensor, branch: "Branch | None" = None, layout: TokenLayout | None = None
    ) -> "tuple[torch.Tensor, Branch | None]":
        """The residual stream x and what is still to be added to it, before and after the block.

        An addition waits for the norm that follows it, because the two together pass over memory once. The stream is a
        map, (B, H, W, dim), or a sequence with class tokens, (B, T, dim), of the given `layout`.
        """
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x, *(branch or ()))
            branch = self.mixer(normed) if layout is None else self.mixer.scan_tokens(normed, layout), self.drop_path
        if self.mlp is not None:
            x, normed = add_norm(self.norm2, x, *(branch or ()))
            branch = self.mlp(normed), self.drop_path
        return x, branch


class PositionConvBlock(ScanBlock):
    """`ScanBlock` with a residual depthwise 3x3 convolution, ``conv1`` and ``conv2``, in front of either branch.

    The convolutions tell a mixer without order where its tokens are; drop path does not touch them.
    """

    def __init__(self, dim: int, scan: dict | Literal[False], **options: Any):
        super().__init__(dim, scan, **options)
        self.conv1 = DepthwiseConv2d(dim, 3)
        self.conv2 = DepthwiseConv2d(dim, 3)

    def forward(
        self, x: torch.Tensor, branch: "Branch | None" = None, layout: TokenLayout | None = None
    ) -> "tuple[torch.Tensor, Branch | None]":
        """As `ScanBlock.forward`, on maps alone."""
        x = _add(x, branch)
        x = x + self.conv1(x)
        if self.mixer is not None:
            x, normed = add_norm(self.norm1, x)
            x = x + self.drop_path(self.mixer(normed))
        x = x + self.conv2(x)
        if self.mlp is None:
            return x, None
        x, normed = add_norm(self.norm2, x)
        return x, (self.mlp(normed), self.drop_path)


Branch = tuple[torch.Tensor, nn.Module]
"""Output of a residual branch, and the drop path that it goes through."""


def _add(x: torch.Tensor, branch: Branch | None) -> torch.Tensor:
    if branch is None:
        return x
    values, drop_path = branch
    return x + drop_path(values)


class Stage(nn.Module):
    """Downsampling (or none), then blocks with the interface of `ScanBlock`. Maps are (B, H, W, C)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None):
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_blocks(self.downsample(x))

    def forward_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C), downsampled. Returns the same shape."""
        branch = None
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch)
        return _add(x, branch)


class Backbone(ModelFamily):
    """Base of all backbones.

    A family builds `stem` and `stages` and then calls `finish`; everything else follows from these. Images are
    (B, `in_chans`, H, W) with H and W of at least 32, in any ratio; features leave as (B, C, H', W'); inside, maps are
    (B, H', W', C).

    Attributes:
        variant: name this model was created under.
        num_classes: outputs of the classifier; 0 when there is none.
        num_features: channels of the last map.
        feature_info: per stage, dict(num_chs, reduction, module).
        pretrained_cfg: input size, mean, std, interpolation, crop and, where weights are published, their origin.
    """

    default_cfg = DEFAULT_PRETRAINED_CFG

    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norm: bool = True,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices needs features_only=True; forward_intermediates takes out_indices anywhere")
        self.in_chans = in_chans
        self.num_classes = 0 if features_only else num_classes
        self.features_only = features_only
        self.variant = None
        self.pos_embed: nn.Module | None = None
        self.pretrained_cfg = {}
        self._requested_indices = out_indices
        self._wants_out_norm = features_only and out_norm
        self.head_drop = nn.Dropout(drop_rate)

    def finish(
        self,
        dims: Sequence[int],
        reductions: Sequence[int],
        norm: str = "layer",
        norm_eps: float = 1e-5,
        num_features: int | None = None,
    ) -> None:
        """Build what follows the stages and initialise all weights. To be called last in a family's constructor.

        Args:
            dims: channels of each stage.
            reductions: stride of each stage.
            norm: norm of the final map, and of each feature map of a `features_only` model.
            norm_eps: epsilon of these norms.
            num_features: channels of the map in front of the classifier; None: of the last stage.
        """
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, reductions))
        ]
        self.num_features = dims[-1] if num_features is None else num_features
        self.out_indices = self._resolve_indices(self._requested_indices)
        self.out_norms = nn.ModuleDict()
        if self.features_only:
            self.norm, self.head = nn.Identity(), nn.Identity()
            self.prune()
            if self._wants_out_norm:
                self.out_norms.update({str(i): get_norm(norm, dims[i], norm_eps) for i in self.out_indices})
        else:
            self.norm = get_norm(norm, self.num_features, norm_eps)
            self.head = self.build_head(self.num_classes) if self.num_classes else nn.Identity()
        self.apply(self._init_weights)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled vector: `num_features`, unless a family sees more than one cell."""
        return self.num_features

    def build_head(self, num_classes: int) -> nn.Module:
        """What turns the pooled vector, (B, head_hidden_size), into logits; a family may have more than one layer."""
        return nn.Linear(self.head_hidden_size, num_classes)

    def prune(self) -> None:
        """Take away what none of the maps of a `features_only` model depends on: it would get no gradient."""
        del self.stages[self.out_indices[-1] + 1 :]

    def built_maps(self) -> list[int]:
        """Numbers of the maps that this model can return."""
        return list(range(len(self.stages)))

    def rule_for_missing(self, key: str, given: Collection[str]) -> str | None:
        if key.startswith("out_norms."):
            return "output norms that a classifier's weights do not have"
        if key.startswith("pyramid.") and not any(name.startswith("pyramid.") for name in given):
            return "a pyramid that a classifier's weights do not have"
        return super().rule_for_missing(key, given)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _resolve_indices(self, out_indices: Sequence[int] | int | None) -> list[int]:
        count = len(self.feature_info)
        if out_indices is None:
            return self.default_out_indices()
        if isinstance(out_indices, int):
            raise TypeError(f"out_indices is a sequence of stage numbers such as (0, 1, 2, 3), got {out_indices!r}")
        resolved = [i + count if i < 0 else i for i in out_indices]
        if not resolved or any(not 0 <= i < count for i in resolved) or len(set(resolved)) != len(resolved):
            raise ValueError(f"out_indices must be different stages in 0..{count - 1}, got {tuple(out_indices)}")
        return sorted(resolved)

    def default_out_indices(self) -> list[int]:
        """Stages whose maps are returned unless others are asked for."""
        return list(range(len(self.feature_info)))

    @property
    def out_info(self) -> list[dict[str, Any]]:
        """For every map that `forward_intermediates` returns by default: dict(num_chs, reduction, module)."""
        return [self.feature_info[i] for i in self.out_indices]

    def _check_images(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"{self.variant or type(self).__name__} takes images (B, {self.in_chans}, H, W), got {tuple(x.shape)};"
                " create the model with in_chans=... for another number of channels"
            )
        if x.shape[2] < MIN_IMAGE_SIZE or x.shape[3] < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images must be at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, got {x.shape[2]} x {x.shape[3]};"
                " resize them first"
            )

    def forward_stages(self, x: torch.Tensor, last: int | None = None) -> list[torch.Tensor]:
        """Raw output of each stage up to number `last`, finest first, each (B, H', W', C)."""
        self._check_images(x)
        x = self.stem(x)
        if self.pos_embed is not None:
            x = self.pos_embed(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            outputs.append(x)
            if i == last:
                break
        return outputs

    def _last_map(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.forward_stages(x)[-1])  # (B, H', W', C)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_chans, H, W). Returns the last map, normalised in a classifier, (B, C, H', W')."""
        return self._last_map(x).permute(0, 3, 1, 2)

    def forward_intermediates(self, x: torch.Tensor, out_indices: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Maps of the stages `out_indices`, finest first, each (B, C, H', W').

        They carry the output norms of a `features_only` model and are raw in a classifier. By default the stages the
        model was built for.
        """
        indices = self.out_indices if out_indices is None else self._resolve_indices(out_indices)
        if missing := [i for i in indices if i not in self.built_maps()]:
            raise ValueError(f"this model was built for out_indices={self.out_indices} and has no map {missing[-1]}")
        outputs = self.forward_stages(x, last=indices[-1])
        maps = [self.out_norms[str(i)](outputs[i]) if str(i) in self.out_norms else outputs[i] for i in indices]
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps]  # (B, C, H', W')

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features: (B, C, H', W') of `forward_features`. Returns logits, or pooled (B, C) if `pre_logits`."""
        pooled = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """x: (B, in_chans, H, W). Returns logits (B, num_classes), or the feature maps of a `features_only` model."""
        if self.features_only:
            return self.forward_intermediates(x)
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier, or `nn.Identity` where there is none."""
        return self.head

    def taught_parameters(self) -> list[nn.Parameter]:
        """Parameters that only a distillation loss reaches: those of the classifier that learns from a teacher, which
        heads of two classifiers call ``teacher``."""
        taught: nn.Module | None = getattr(self.head, "teacher", None)
        return [] if taught is None else list(taught.parameters())

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one for `num_classes` classes (0: none)."""
        if self.features_only:
            raise ValueError("a features_only model has no classifier to reset")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.head = self.build_head(num_classes) if num_classes else nn.Identity()
        self.head.apply(self._init_weights)
        self.head.to(device=reference.device, dtype=reference.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that give each parameter its depth (timm's contract), for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        tail = [(r"^(?:norm|out_norms)\b", (99999,))]
        return dict(stem=r"^(?:stem|pos_embed)\b", blocks=r"^stages\.(\d+)" if coarse else blocks + tail)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed: decays, skips, biases of step sizes and gates, norms of groups of
        channels, position tables (1-D ones aside)."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in UNDECAYED}

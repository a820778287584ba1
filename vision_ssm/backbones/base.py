"""What every backbone is and answers: written once, for all families."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..layers import get_norm, trunc_normal_
from .blocks import (  # noqa: F401  (what a family is built of comes from here)
    Branch,
    PositionConvBlock,
    ScanBlock,
    Stage,
    add_branch,
    drop_path_rates,
    recomputes,
    stage_widths,
)
from .contract import TimmContract
from .family import register_family, resolve_scan  # noqa: F401

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


class Backbone(TimmContract):
    """Base of all backbones.

    A family builds `stem` and `stages` and then calls `finish`; everything else follows from these. Images are
    (B, `in_chans`, H, W) with H and W of at least 32, in any ratio; features leave as (B, C, H', W'); inside, maps are
    (B, H', W', C).

    Attributes:
        variant: name this model was created under.
        num_classes: outputs of the classifier; 0 when there is none.
        num_features: channels of the last map.
        stage_info: per stage, dict(num_chs, reduction, module).
        pretrained_cfg: timm's: input size, mean, std, interpolation, crop and, where weights are published, their
            origin.
    """

    common_cfg = DEFAULT_PRETRAINED_CFG

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norm: bool = True,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
    ):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be 1 or more, got {in_chans}")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices needs features_only=True; forward_intermediates takes out_indices anywhere")
        self.in_chans = in_chans
        self.num_classes = 0 if features_only else num_classes
        self.features_only = features_only
        self.variant = None
        self.overrides = {}
        self.pos_embed: nn.Module | None = None
        self.pretrained_cfg = {}
        self._requested_indices = out_indices
        self._wants_out_norm = features_only and out_norm
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool

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
        self.stage_info = [
            dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, reductions))
        ]
        self.num_features = dims[-1] if num_features is None else num_features
        self.out_indices = self.resolve_indices(self._requested_indices)
        self.out_norms = nn.ModuleDict()
        self._set_pooling(self.num_classes, self.global_pool)
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

    def check_images(self, x: torch.Tensor) -> None:
        super().check_images(x)
        if x.shape[2] < MIN_IMAGE_SIZE or x.shape[3] < MIN_IMAGE_SIZE:
            raise ValueError(
                f"images must be at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, got {x.shape[2]} x {x.shape[3]};"
                " resize them first"
            )

    def forward_stages(self, x: torch.Tensor, last: int | None = None) -> list[torch.Tensor]:
        """Raw output of each stage up to number `last`, finest first, each (B, H', W', C)."""
        self.check_images(x)
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

    def trace(self, x: torch.Tensor) -> tuple[Any, Sequence[torch.Tensor] | dict[int, torch.Tensor]]:
        """What `forward_features` returns of images x, and what `forward_stages` does, from one pass."""
        outputs = self.forward_stages(x)
        return self.norm(outputs[-1]).permute(0, 3, 1, 2), outputs

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_chans, H, W). Returns the last map, normalised in a classifier, (B, C, H', W')."""
        return self.trace(x)[0]

    def map_norm(self, index: int, norm: bool | None = None) -> nn.Module:
        """What normalises the map of stage `index` before it is returned; `norm` as for `forward_intermediates`."""
        if norm is False:
            return nn.Identity()
        if str(index) in self.out_norms:
            return self.out_norms[str(index)]
        return self.end_norm(index) if norm else nn.Identity()

    def end_norm(self, index: int) -> nn.Module:
        """The norm in front of the classifier, where it fits the map of stage `index`."""
        return self.norm if index == len(self.stage_info) - 1 else nn.Identity()

    def collect(
        self, x: torch.Tensor, indices: Sequence[int], norm: bool | None, whole: bool
    ) -> tuple[Any, list[torch.Tensor]]:
        features, outputs = self.trace(x) if whole else (None, self.forward_stages(x, last=indices[-1]))
        maps = [self.map_norm(i, norm)(outputs[i]) for i in indices]
        return features, [m.permute(0, 3, 1, 2).contiguous() for m in maps]  # (B, C, H', W')

    @property
    def own_pool(self) -> str:
        """timm's word for what makes a vector of the features: ``"avg"`` or ``"token"``, or a family's own."""
        return "avg"

    def _set_pooling(self, num_classes: int, global_pool: str | None) -> None:
        if global_pool not in (None, "", self.own_pool):
            raise ValueError(
                f"{type(self).__name__} pools by {self.own_pool!r}: global_pool is that, or '' for none, got"
                f" {global_pool!r}"
            )
        if global_pool == "" and num_classes:
            raise ValueError("a classifier needs pooled features: global_pool='' goes with num_classes=0")
        self.global_pool = self.own_pool if global_pool is None else global_pool

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """features: of `forward_features`. Returns the vector that the classifier sees, (B, head_hidden_size)."""
        return features.mean(dim=(2, 3))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """features: of `forward_features`. Returns logits, or the pooled (B, C) if `pre_logits`.

        The features themselves where ``global_pool=""`` switched pooling off.
        """
        if self.global_pool == "":
            return features
        pooled = self.head_drop(self.pool(features))
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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for `num_classes` classes (0: none).

        Without one, ``global_pool=""`` switches pooling off, so that the model returns its features.
        """
        if self.features_only:
            raise ValueError("a features_only model has no classifier to reset")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self._set_pooling(num_classes, global_pool)
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.head = self.build_head(num_classes) if num_classes else nn.Identity()
        self.head.apply(self._init_weights)
        self.head.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.name_classifier()

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

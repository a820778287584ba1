"""What every U-Net is and answers: written once, for all families."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..backbones.base import UNDECAYED, Backbone, Stage, drop_path_rates
from ..backbones.family import ModelFamily
from ..registry import UNETS
from ..weights import CheckpointError, LoadReport, load_state_dict, read_checkpoint, split_parts, unwrap


def falling_drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates falling linearly from `rate` to 0 over all blocks of a decoder, grouped by level."""
    return [rates[::-1] for rates in drop_path_rates(rate, depths[::-1])[::-1]]


class AddStage(Stage):
    """A level of a decoder that adds the skip to its input, enlarges the sum, and runs its blocks."""

    def __init__(self, blocks: Sequence[nn.Module], expand: nn.Module | None = None):
        super().__init__(blocks)
        self.expand = nn.Identity() if expand is None else expand

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, H, W, C); skip of the same shape. Returns (B, H', W', C')."""
        return self.forward_blocks(self.expand(x if skip is None else x + skip))


class ConcatStage(Stage):
    """A level of a decoder that enlarges its input, appends the skip to its channels, and runs its blocks.

    Args:
        blocks: see `Stage`.
        expand: enlarges the input to the size of the skip.
        fuse: makes channels of the blocks from those of both; None: nothing to do.
    """

    def __init__(self, blocks: Sequence[nn.Module], expand: nn.Module, fuse: nn.Module | None = None):
        super().__init__(blocks)
        self.expand = expand
        self.fuse = nn.Identity() if fuse is None else fuse

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, H, W, C); skip: (B, H', W', S), or None for a level without one. Returns (B, H', W', C')."""
        x = self.expand(x)
        if skip is not None:
            x = torch.cat([x, skip.to(x.dtype)], dim=-1)  # (B, H', W', C + S)
        return self.forward_blocks(self.fuse(x))


class SegmentationHead(nn.Module):
    """Scores of all classes at every cell: ``scores`` of the last map, ``aux`` of the decoder's earlier ones."""

    def __init__(self, dim: int, aux_dims: Sequence[int], num_classes: int):
        super().__init__()
        self.scores = nn.Linear(dim, num_classes)
        self.aux = nn.ModuleList(nn.Linear(width, num_classes) for width in aux_dims)


class UNet(ModelFamily):
    """Base of all U-Nets.

    A family builds `encoder`, `decoder` (levels, coarsest first) and `expand` (from the decoder's last map to the size
    of the image) and then calls `finish`. Images are (B, `in_chans`, H, W) of any height and width: they are padded at
    the bottom and right to a multiple of `size_divisor` by repeating their edge, and scores are cropped. Images of one
    channel go into a network of three by repetition. Scores are raw, never probabilities; a network of one class gives
    the logit of that class. Inside, maps are (B, H', W', C).

    Args:
        num_classes: channels of the scores; 1 for foreground against background.
        in_chans: channels of the images.
        deep_supervision: predict scores from every map of the decoder; in training, `forward` returns them all.

    Attributes:
        variant: name this model was created under.
        size_divisor: multiple that image sizes are padded to.
        feature_info: per map of the encoder, dict(num_chs, reduction, module), finest first.
        pretrained_cfg: size of the images that a variant was published for, and where encoder weights come from.
    """

    registry = UNETS
    common_cfg = dict(input_size=(3, 224, 224))
    classifier_key = "head.scores.weight"
    classifier_parts = ()
    wrappers = ("module.", "_orig_mod.", "model.", "_model.", "unet.")

    encoder: Any  # a backbone, or a module with its methods
    decoder: nn.ModuleList
    expand: nn.Module
    head: SegmentationHead

    def __init__(self, *, num_classes: int = 1, in_chans: int = 3, deep_supervision: bool = False):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 (binary) or more, got {num_classes}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.deep_supervision = deep_supervision
        self.variant = None
        self.overrides = {}
        self.pretrained_cfg = {}

    @classmethod
    def encoder_of(cls, name: str, overrides: Mapping[str, Any]) -> str | None:
        """The backbone whose published weights start the encoder of variant `name` with some keywords replaced."""
        backbone: str | None = cls.published.get(name, {}).get("encoder_weights")
        return backbone

    def finish(self, dims: Sequence[int], reductions: Sequence[int], head_dim: int) -> None:
        """Build the head. To be called last in a family's constructor.

        Args:
            dims: channels of the decoder's maps, coarsest first.
            reductions: their strides.
            head_dim: channels behind `expand`.
        """
        self.feature_info: list[dict[str, Any]] = self.encoder.out_info
        self.size_divisor: int = max(info["reduction"] for info in self.feature_info)
        self.head_dim = head_dim
        self.aux_dims = list(dims[:-1]) if self.deep_supervision else []
        self.aux_reductions = list(reductions[:-1])
        self.head = SegmentationHead(head_dim, self.aux_dims, self.num_classes)

    @property
    def first_conv(self) -> str | None:
        """Name of the convolution that sees the image."""
        inner = getattr(self.encoder, "first_conv", None)
        return None if inner is None else f"encoder.{inner}"

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: padded images. Returns the maps that the decoder takes, finest first, each (B, H', W', C)."""
        return [m.permute(0, 2, 3, 1) for m in self.encoder.forward_intermediates(x)]

    def decode(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: those of `encode`. Returns the output of every level, coarsest first, each (B, H', W', C)."""
        x, skips, outputs = maps[-1], list(maps[:-1]), []
        for level in self.decoder:
            x = level(x, skips.pop() if skips else None)
            outputs.append(x)
        return outputs

    @property
    def image_channels(self) -> tuple[int, ...]:
        return (3, 1) if self.in_chans == 3 else (self.in_chans,)

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """x: images as `forward` takes them. Returns them with all channels and padded, (B, in_chans, H', W').

        Raises:
            TypeError: not floating-point. ValueError: another shape.
        """
        self.check_images(x)
        if x.shape[1] != self.in_chans:
            x = x.expand(-1, self.in_chans, -1, -1)
        step = self.size_divisor
        bottom, right = ((side + step - 1) // step * step - side for side in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Raw scores of every pixel.

        Args:
            x: float images (B, in_chans, H, W), or (B, 1, H, W) for a network of three channels.

        Returns:
            (B, num_classes, H, W). With deep supervision, in training, a tuple: these, then the auxiliary scores, each
            (B, num_classes, ceil(H / r), ceil(W / r)) at stride r, finest first.
        """
        height, width = x.shape[-2:]
        maps = self.decode(self.encode(self.prepare(x)))
        scores = self.read(maps[-1], height, width)
        if not (self.deep_supervision and self.training):
            return scores
        auxiliary = zip(self.head.aux, maps, self.aux_reductions)
        finest_last = [self._cropped(head(m), -(-height // r), -(-width // r)) for head, m, r in auxiliary]
        return (scores, *finest_last[::-1])

    def read(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """x: the last map of `decode`. Returns the scores of an image of that size, (B, num_classes, H, W)."""
        return self._cropped(self.head.scores(self.expand(x)), height, width)

    @staticmethod
    def _cropped(scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return scores[:, :height, :width].permute(0, 3, 1, 2).contiguous()  # (B, num_classes, H, W)

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps of the encoder's stages for images padded as `forward` pads them, finest first, each (B, C, H', W')."""
        return self.encoder.forward_intermediates(self.prepare(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for `num_classes` classes."""
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 (binary) or more, got {num_classes}")
        weight = self.head.scores.weight
        self.num_classes = num_classes
        self.head = SegmentationHead(self.head_dim, self.aux_dims, num_classes)
        self.head.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.encoder.set_grad_checkpointing(enable)
        for level in self.decoder:
            level.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that give each parameter its depth (timm's contract): the encoder's, with all else at the top."""

        def inside(pattern: str) -> str:
            return pattern.replace("^", r"^encoder\.", 1)

        patterns = self.encoder.group_matcher(coarse)
        blocks = patterns["blocks"]
        blocks = inside(blocks) if isinstance(blocks, str) else [(inside(pattern), rank) for pattern, rank in blocks]
        return dict(stem=inside(patterns["stem"]), blocks=blocks)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed: see `Backbone.no_weight_decay`."""
        own = {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in UNDECAYED}
        return own | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def rule_for_extra(self, key: str) -> str | None:
        if key.startswith("head.aux."):
            return "auxiliary heads of a model without deep supervision"
        if key.startswith(("data_preprocessor.", "loss.", "criterion.")):
            return "part of another model, the training code"
        return None

    def rule_for_missing(self, key: str, given: Collection[str]) -> str | None:
        if key.startswith("head.aux.") and not any(name.startswith("head.aux.") for name in given):
            return "auxiliary heads that the file does not have, initialised anew"
        return None

    def load_mirrored(self, tensors: Mapping[str, torch.Tensor], report: LoadReport) -> None:
        """Initialise the decoder from weights of the encoder, under the encoder's names, where a family does that."""


def load_encoder(
    model: UNet,
    weights: str | os.PathLike | Mapping[str, torch.Tensor],
    *,
    ema: bool = False,
    verbose: bool = True,
) -> LoadReport:
    """Initialise the encoder of a U-Net from classification weights, and report on every key.

    Left out by rule: the classifier; blocks that the weights have behind the last one of a stage of the encoder, as
    VM-UNet takes the first two blocks of every stage of VMamba-S. VM-UNet's decoder takes over the blocks of the stages
    that it mirrors. The first convolution is adapted to another `in_chans` than 3.

    Args:
        model: changed in place (not at all if this raises).
        weights: official file of the encoder's family or one of ours, as for `load_weights`; or a state dict.
        ema: prefer averaged weights where the file has both; the published U-Nets begin with those that are not.
        verbose: print the report.

    Raises:
        FileNotFoundError, CheckpointError: the file cannot be read, or its tensors do not fit the encoder.
    """
    encoder = model.encoder
    if not isinstance(encoder, Backbone):
        raise CheckpointError(
            f"{model.variant or type(model).__name__} has an encoder of its own, which no classification weights fit"
        )
    if isinstance(weights, Mapping):
        tensors, source = dict(weights), "state dict"
    else:
        source = str(weights)
        tensors = unwrap(read_checkpoint(weights), source, ema=ema)
    tensors = split_parts(tensors)[0]
    if encoder.recognises(set(tensors)):
        tensors = encoder.own_keys(tensors)
    behind = [key for key in tensors if _is_behind(key, encoder)]
    kept = {key: value for key, value in tensors.items() if key not in set(behind)}
    report = load_state_dict(encoder, kept, source=source, adapt_input=True)
    report.loaded = [f"encoder.{key}" for key in report.loaded]
    report.adapted = [f"encoder.{key}" for key in report.adapted]
    if behind:
        report.ignored["block behind the last one of the encoder's stage"] = behind
    model.load_mirrored(tensors, report)
    if verbose:
        print(report)
    return report


def _is_behind(key: str, encoder: Backbone) -> bool:
    match = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key)
    if match is None or int(match[1]) >= len(encoder.stages):
        return False
    return int(match[2]) >= len(encoder.stages[int(match[1])].blocks)

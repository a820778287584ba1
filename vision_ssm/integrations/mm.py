"""The door to OpenMMLab: every backbone of this library under the heads of mmsegmentation and mmdetection.

A config imports this module and names a family::

    custom_imports = dict(imports=["vision_ssm.integrations.mm"])
    model = dict(
        type="EncoderDecoder",
        backbone=dict(
            type="vision_ssm.VMamba",
            variant="vmamba_tiny_s1l8",
            out_indices=(0, 1, 2, 3),
            drop_path_rate=0.2,
            init_cfg=dict(type="Pretrained", checkpoint="vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        ),
        ...
    )

Importing it puts operators of torchvision in the place of mmcv's compiled ones where there are none (see `mmcv_ext`),
and enters one class per family, and the necks of `necks`, into ``vision_ssm.registry.MODELS``. Neither mmseg nor mmdet
has to be installed for that. Detectors that are trained in bfloat16 should name ``vision_ssm.SingleRoIExtractor`` where
mmdet's configs name theirs. `checks.check_config` finds misspelt names and heads that do not fit before anything is
built.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from torch import nn

from ..backbones.base import Backbone
from ..backbones.family import points_to_file
from ..factory import check_overrides, find_family, list_models
from ..published import find_weights
from ..registry import BACKBONES, MODELS, suggest
from ..weights import load_weights
from . import mmcv_ext, necks  # noqa: F401  (registers the necks)
from .packages import check_packages

_RESERVED = {"features_only", "num_classes"}
_TAKEN = {*_RESERVED, "out_indices"}
FROM_SCRATCH = "--cfg-options model.backbone.init_cfg=None"
_DOWNLOADED = "model.backbone.init_cfg.checkpoint=True"


check_packages()
mmcv_ext.install()


def check_backbone(cls: type[Backbone], variant: Any, overrides: Mapping[str, Any]) -> None:
    """Check the variant and the keywords of a backbone in a config.

    Args:
        cls: the family's class, or the class of it registered here.
        variant: name of a variant.
        overrides: the other keywords of the config.

    Raises:
        TypeError: no variant, or unknown keywords. KeyError: unknown variant, or one of another family. All with
            suggestions.
    """
    family = cls.registered()
    kind = f"{MODELS.scope}.{family.__name__}"
    if not isinstance(variant, str):
        raise TypeError(f"{kind} needs the name of a variant, variant=..., got {variant!r}.{_known(family)}")
    if variant not in family.variants:
        if variant in list_models():
            owner = find_family(variant).__name__
            raise KeyError(
                f"{variant!r} is a variant of {owner}, not of {family.__name__}: type='{MODELS.scope}.{owner}'"
            )
        raise KeyError(f"unknown variant {variant!r} of {kind}.{suggest(variant, family.variants) or _known(family)}")
    reserved = sorted(_RESERVED & set(overrides))
    if reserved:
        raise TypeError(f"{kind} is a dense backbone without a classifier and takes no {' or '.join(reserved)}")
    valid = [*DenseBackbone.own_keywords, *(key for key in family.keywords() if key not in _TAKEN)]
    check_overrides(f"{kind} ({variant})", overrides, valid)


def _known(family: type[Backbone]) -> str:
    return f" Known: {', '.join(sorted(family.variants))}."


def _pretrained(init_cfg: Any) -> dict[str, Any] | None:
    """The one thing an ``init_cfg`` may ask for, as keywords; whether the file exists is not looked at."""
    if not init_cfg:
        return None
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg
    if not isinstance(entries, Sequence) or len(entries) != 1 or not isinstance(entries[0], Mapping):
        raise TypeError(f"init_cfg of a backbone is one dict(type='Pretrained', checkpoint=FILE), got {init_cfg!r}")
    settings = dict(entries[0])
    kind = settings.pop("type", None)
    if kind not in ("Pretrained", "PretrainedInit", PretrainedInit):
        raise ValueError(
            f"init_cfg of a backbone is dict(type='Pretrained', checkpoint=FILE), got type {kind!r}: apart from that,"
            " every family initialises its weights itself"
        )
    unknown = sorted(set(settings) - {"checkpoint", "ema"})
    if unknown:
        raise TypeError(
            f"init_cfg has no key {', '.join(map(repr, unknown))}; it takes checkpoint and ema (prefixes of names and"
            " the device are dealt with)"
        )
    checkpoint = settings.get("checkpoint")
    if checkpoint is not True and (not isinstance(checkpoint, (str, os.PathLike)) or not str(checkpoint)):
        raise TypeError(
            "init_cfg.checkpoint is the path of a file, True for the published weights or the tag of one of several,"
            f" got {checkpoint!r}; init_cfg=None starts from scratch"
        )
    return settings


def check_weights(variant: str, init_cfg: Any) -> dict[str, Any] | None:
    """The keywords of an ``init_cfg``, ``checkpoint``, a file that exists, and ``ema``; None if it asks for no weights.

    Published weights are downloaded unless they are in the cache.

    Raises:
        FileNotFoundError: there is no such file; says where it is published and how to start from scratch.
        TypeError, ValueError: an ``init_cfg`` of another kind, or no weights are published. KeyError: not under that
            tag. DownloadError: they cannot be downloaded.
    """
    settings = _pretrained(init_cfg)
    if settings is None:
        return None
    family = find_family(variant)
    found = find_weights(family, variant, "", settings["checkpoint"], None)
    assert found.file is not None
    if os.path.isfile(found.file):
        return dict(checkpoint=found.file, ema=settings.get("ema", found.ema))
    origin = family.published.get(variant, {}).get("url")
    source = f"No official weights of {variant} are published; train it and name"
    if origin:
        source = f"Download {origin} and name"
        if points_to_file(origin):
            source = f"Let it be downloaded, --cfg-options {_DOWNLOADED}, or download {origin} and name"
    what = "is a folder, not a file" if os.path.isdir(found.file) else "does not exist"
    if re.match(r"\w+://", str(found.file)):
        what = "is a link, not a file"
    raise FileNotFoundError(
        f"no pretrained weights for {variant}: {found.file} {what}. {source} the file in"
        f" model.backbone.init_cfg.checkpoint, or start from scratch: {FROM_SCRATCH}"
    )


class DenseBackbone(Backbone):
    """What the class of every family has in addition here: a backbone as mmseg and mmdet build and train it.

    Parameters are named as in the family's class, so that a checkpoint of a run holds them as ``backbone.NAME``.

    Args:
        variant: one of the family's variants.
        out_indices: stages (blocks of a plain backbone) whose maps are returned; None: the family's default.
        frozen_stages: -1: everything learns; 0: the stem, with positions and class tokens, is frozen; n: so are the
            stages below n. Frozen parts stay in eval mode.
        norm_eval: batch norms keep the statistics they were loaded with; their weights learn all the same.
        with_cp: recompute each block's activations in backward instead of keeping them.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)``, a file for `load_weights`: official classification or
            dense weights or ours; True or a tag stand for weights as in `create_model`. Read in `init_weights`, which a
            training run calls and a test does not.
        **overrides: any keyword of the family, such as ``drop_path_rate`` or ``scan``.

    Raises:
        KeyError, TypeError, ValueError: unknown variant, unknown keyword, a stage that there is not.
    """

    own_keywords = ("out_indices", "frozen_stages", "norm_eval", "with_cp", "init_cfg")
    init_cfg: Any
    _is_init: bool

    def __init__(
        self,
        variant: str | None = None,
        *,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = None,
        **overrides: Any,
    ):
        check_backbone(type(self), variant, overrides)
        assert variant is not None
        settings = dict(overrides, features_only=True, num_classes=0, out_indices=out_indices)
        super().__init__(**self.variant_settings(variant, settings))
        self.take_name(variant)
        self.overrides = settings
        _pretrained(init_cfg)
        self.init_cfg = init_cfg
        self.frozen_stages = self._check_frozen(frozen_stages)
        self.norm_eval = norm_eval
        if with_cp:
            self.set_grad_checkpointing()
        for part in self._frozen_parts():
            part.requires_grad_(False)

    def _check_frozen(self, frozen_stages: int) -> int:
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= len(self.stages):
            raise ValueError(
                f"frozen_stages is -1 (nothing), 0 (the stem) or up to {len(self.stages)} (all stages of this model),"
                f" got {frozen_stages!r}"
            )
        return frozen_stages

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stem = re.compile(self.group_matcher()["stem"])
        front = [part for name, part in self.named_children() if stem.match(name)]
        return [*front, *self.stages[: self.frozen_stages]]

    def train(self, mode: bool = True) -> "DenseBackbone":
        """As `nn.Module.train`; frozen parts, and batch norms with `norm_eval`, stay in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names; everything else has its initial values since it was built.

        Raises:
            FileNotFoundError: see `check_weights`. CheckpointError: see `load_weights`.
        """
        if self._is_init:
            print_log(
                f"init_weights of {type(self).__name__} has been called more than once", "current", logging.WARNING
            )
            return
        assert self.variant is not None
        settings = check_weights(self.variant, self.init_cfg)
        if settings is not None:
            report = load_weights(self, settings["checkpoint"], ema=settings["ema"], adapt_input=True, verbose=False)
            print_log(str(report), "current")
        self._is_init = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """x: (B, in_chans, H, W). Returns one map (B, C, H', W') per entry of ``out_info``, finest first."""
        return tuple(self.forward_intermediates(x))


def _register(family: type[Backbone]) -> type[Backbone]:
    doc = f"`{family.__name__}` for mmseg and mmdet, with the arguments of `DenseBackbone`."
    # BaseModule comes last, so that the family's constructor reaches mmengine's without arguments
    bases = (DenseBackbone, family, BaseModule)
    cls = type(BaseModule)(family.__name__, bases, {"__doc__": doc, "__module__": __name__})
    MODELS.register_module(module=cls)
    return cls


@MODELS.register_module(name="SingleRoIExtractor")
def build_roi_extractor(**settings: Any) -> nn.Module:
    """`roi_extractor.SingleRoIExtractor`, which needs mmdet, as ``type="vision_ssm.SingleRoIExtractor"``."""
    from .roi_extractor import SingleRoIExtractor

    return SingleRoIExtractor(**settings)


globals().update({family.__name__: _register(family) for family in BACKBONES.module_dict.values()})

"""Published weights in configs and commands: the word "official" for a checkpoint; what ``model.pretrained`` names."""

import os
from pathlib import Path

from mmengine.config import Config
from torch import nn

from vision_ssm.backbones.family import ModelFamily
from vision_ssm.download import DownloadError, fetch
from vision_ssm.factory import encoder_file, find_family
from vision_ssm.integrations.official_models import OFFICIAL_MODELS
from vision_ssm.published import fetch_weights, find_weights, split_tag
from vision_ssm.unets.base import UNet

from .config import UsageError

WORD = "official"


def find_checkpoint(checkpoint: str, cfg: Config, config: str) -> str:
    """`checkpoint`, or for the word ``official`` the file that is published for `cfg`, from the cache or the net.

    Weights of whole segmentation, detection and pose models go by the name of the config, those of classifiers by that
    of the backbone.

    Args:
        checkpoint: file, or the word. A file of that name is a file.
        cfg: what is tested or predicts.
        config: its file.

    Raises:
        UsageError: none are published, or they cannot be downloaded; says where to put the file.
    """
    if checkpoint != WORD or Path(checkpoint).is_file():
        return checkpoint
    try:
        if Path(config).stem in OFFICIAL_MODELS:
            return str(fetch(*OFFICIAL_MODELS[Path(config).stem]))
        if cfg.model.type == "vision_ssm.ImageClassifier" and not cfg.model.backbone.name.startswith("timm:"):
            name = cfg.model.backbone.name
            return str(fetch_weights(find_family(name), name))
    except (DownloadError, ValueError) as error:
        raise UsageError(f"official weights for {config}: {error}") from error
    raise UsageError(
        f"no official weights are published for the whole model of {config}: they are for the configs that model "
        "cards link with weights, under their own names. Give a file"
    )


def find_pretrained(
    model: nn.Module, name: str, pretrained: bool | str | os.PathLike
) -> tuple[str | os.PathLike, bool | None]:
    """The weights that ``model.pretrained`` of a config names, for a backbone or for the encoder of a U-Net.

    Args:
        model: which is to be trained, of this library or of timm.
        name: by which it was built.
        pretrained: True for the published weights, from the cache or the net; the tag of one of several; or a file.

    Returns:
        Their file, which exists, and whether averaged weights are wanted where it has both; None: as `load_weights`
        decides.

    Raises:
        ValueError: none are published. KeyError: not under that tag. DownloadError: they cannot be downloaded.
        FileNotFoundError: no such file; says what else there is.
    """
    file, ema, published = pretrained, None, False
    if isinstance(model, ModelFamily):
        cls = type(model)
        variant, tag = split_tag(name)
        if isinstance(model, UNet):
            file = encoder_file(cls, variant, pretrained, model.overrides) or pretrained
            published = cls.encoder_of(variant, model.overrides) is not None
        else:
            found = find_weights(cls, variant, tag, pretrained, None)
            file, ema, published = found.file or pretrained, found.ema, bool(cls.weights_of(variant))
    if isinstance(file, bool):
        raise ValueError(f"{name} is one of timm's, whose weights are not fetched here: model.pretrained names a file")
    if not Path(file).is_file():
        fetched = "True for the published weights, which are downloaded once, " if published else ""
        raise FileNotFoundError(
            f"no weight file {file} for {name}: model.pretrained is a file, {fetched}or None for random weights"
        )
    return file, ema

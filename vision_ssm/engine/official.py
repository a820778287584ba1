"""The word "official" in the place of a checkpoint: the weights that are published for the model of a config."""

from pathlib import Path

from mmengine.config import Config

from vision_ssm.download import DownloadError, fetch
from vision_ssm.factory import find_family
from vision_ssm.integrations.official_models import OFFICIAL_MODELS
from vision_ssm.published import fetch_weights

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

"""The word "official" in the place of a checkpoint: the weights that are published for the model of a config."""

from pathlib import Path

from mmengine.config import Config

from vision_ssm.download import DownloadError, fetch
from vision_ssm.factory import find_family
from vision_ssm.published import fetch_weights

from .config import UsageError

WORD = "official"


def find_checkpoint(checkpoint: str, cfg: Config, config: str) -> str:
    """`checkpoint`, or for the word ``official`` the file that is published for `cfg`, from the cache or the net.

    Weights of whole segmentation, detection and pose models are named by their configs; those of classifiers by the
    backbone.

    Args:
        checkpoint: file, or the word. A file of that name is a file.
        cfg: what is tested or predicts.
        config: how messages call it.

    Raises:
        UsageError: none are published, or they cannot be downloaded; says where to put the file.
    """
    if checkpoint != WORD or Path(checkpoint).is_file():
        return checkpoint
    try:
        if WORD in cfg:
            return str(fetch(cfg[WORD]["url"], cfg[WORD]["file"]))
        if cfg.model.type == "vision_ssm.ImageClassifier" and not cfg.model.backbone.name.startswith("timm:"):
            name = cfg.model.backbone.name
            return str(fetch_weights(find_family(name), name))
    except (DownloadError, ValueError) as error:
        raise UsageError(f"official weights for {config}: {error}") from error
    raise UsageError(
        f"no official weights are published for the whole model of {config}; configs that have some say official=..."
        " at their end. Give a file"
    )

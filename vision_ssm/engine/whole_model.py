"""Checkpoints of a backbone with its heads: of a training run of ours, or official, whose backbone has other names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from vision_ssm.backbones.base import Backbone
from vision_ssm.weights import CheckpointError, LoadReport, load_state_dict, split_parts

_BACKBONE = "backbone."
_SHOWN = 4


def has_heads(model: nn.Module) -> bool:
    """Whether `model` is a backbone of this library, called ``backbone``, with weights beside it."""
    own = isinstance(getattr(model, "backbone", None), Backbone)
    return own and not all(key.startswith(_BACKBONE) for key in model.state_dict())


@contextmanager
def short_misfits(source: str | Path) -> Iterator[None]:
    """Makes a `CheckpointError` of a few lines of what ``load_state_dict`` finds wrong inside."""
    try:
        yield
    except RuntimeError as error:
        problems = str(error).splitlines()
        shown = "\n".join(problems[1:6]) + ("\n\t..." if len(problems) > 6 else "")
        raise CheckpointError(f"the weights of {source} are not those of this config's model:\n{shown}") from None


def load_whole_model(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """Load a state dict into a model with heads: the backbone under official names or ours, every other part exactly.

    Args:
        model: changed in place (not at all if this raises); see `has_heads`.
        tensors: names of the backbone begin with ``backbone.``, those of the other parts are the model's.
        source: how messages call the state dict.

    Returns:
        What became of the backbone's tensors.

    Raises:
        CheckpointError: a part is missing, unknown or of another shape, or the backbone does not fit.
    """
    own, parts = split_parts(tensors)
    given = {key: tensors[key] for keys in parts.values() for key in keys}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(_BACKBONE)}
    # pixel statistics, which older releases of OpenMMLab saved, come from the config
    given = {key: value for key, value in given.items() if key in wanted or not key.startswith("data_preprocessor.")}
    shapes, found = ({key: tuple(t.shape) for key, t in each.items()} for each in (wanted, given))
    wrong = [key for key in {**shapes, **found} if shapes.get(key) != found.get(key)]
    if wrong:
        listed = "\n".join(
            f"  {key}: {found.get(key, 'missing')} in the file, {shapes.get(key, 'missing')} in the model"
            for key in wrong[:_SHOWN]
        )
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"the weights of {source} are not those of this config's model, which has other heads:\n{listed}{more}\n"
            "Use the config of the checkpoint; for other classes start from its backbone alone: it is the file of "
            "model.backbone.init_cfg.checkpoint, for poses of model.pretrained."
        )
    report = load_state_dict(model.backbone, own, source=source)  # type: ignore[arg-type]
    model.load_state_dict(given, strict=False)
    return report

"""Registries of the library, all on `mmengine.Registry` with scope ``vision_ssm``.

`ROUTES`, `SCANS`, `BACKBONES` and `UNETS` are the library's own vocabulary. The others are children of mmengine's root
registries, so that a config may name our classes (``type="vision_ssm.ImageClassifier"``) wherever mmengine builds.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mmengine import registry as root
from mmengine.registry import Registry

from .arguments import check_values, without_numpy

SCOPE = "vision_ssm"

ROUTES = Registry("route", scope=SCOPE, locations=["vision_ssm.scans"])
SCANS = Registry("scan", scope=SCOPE, locations=["vision_ssm.scans"])
BACKBONES = Registry("backbone", scope=SCOPE, locations=["vision_ssm.backbones"])
UNETS = Registry("unet", scope=SCOPE, locations=["vision_ssm.unets"])


def _child(parent: Registry, *locations: str) -> Registry:
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=list(locations))


MODELS = _child(root.MODELS, "vision_ssm.engine")
HOOKS = _child(root.HOOKS, "vision_ssm.engine")
LOOPS = _child(root.LOOPS, "vision_ssm.engine")
METRICS = _child(root.METRICS, "vision_ssm.engine")
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS, "vision_ssm.engine")
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS, "vision_ssm.engine")
VISUALIZERS = _child(root.VISUALIZERS, "vision_ssm.engine")
LOG_PROCESSORS = _child(root.LOG_PROCESSORS, "vision_ssm.engine")
DATASETS = _child(root.DATASETS, "vision_ssm.data")
DATA_SAMPLERS = _child(root.DATA_SAMPLERS, "vision_ssm.data")
FUNCTIONS = _child(root.FUNCTIONS, "vision_ssm.data")


def suggest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Sentence naming the closest of `choices`, or all of them when nothing is close and there are few.

    Returns an empty string when there is nothing useful to say, so it can be appended to any message.
    """
    choices = sorted(set(choices))
    # a name that was cut short, by no more than twice its length
    longer = [choice for choice in choices if choice.startswith(name) and len(choice) <= 3 * len(name)][:count]
    near = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    close = [*longer, *(choice for choice in near if choice not in longer)][:count]
    if close:
        return f" Did you mean {' or '.join(repr(item) for item in close)}?"
    if 0 < len(choices) <= 30:
        return f" Known: {', '.join(choices)}."
    return ""


def check_keywords(function: Callable, keywords: Iterable[str], name: str) -> None:
    """Raise `TypeError` naming the valid keywords if `function` does not take one of `keywords`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    valid = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
    unknown = sorted(set(keywords) - set(valid))
    if unknown:
        hint = "".join(f" {key!r}:{text}" for key in unknown if (text := suggest(key, valid)).startswith(" Did"))
        raise TypeError(
            f"{name} got unknown keyword{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}.{hint}"
            f" Valid keywords: {', '.join(valid)}."
        )


def lookup(registry: Registry, name: str) -> Any:
    """The object `name` of `registry`; `KeyError` with suggestions if there is none."""
    registry.import_from_location()
    if name not in registry.module_dict:
        raise KeyError(f"unknown {registry.name} {name!r}.{suggest(name, registry.module_dict)}")
    return registry.module_dict[name]


def build(registry: Registry, spec: str | dict, *args: Any, **defaults: Any) -> Any:
    """Build an entry of `registry` from its name or from ``dict(type=name, **keywords)``.

    Keywords in `spec` win over `defaults`. Unknown names and keywords raise with suggestions, as do values of another
    type than their annotation.
    """
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, dict) or "type" not in spec:
        raise TypeError(f"a {registry.name} is given by name or as dict(type=name, ...), got {spec!r}")
    keywords = without_numpy({**defaults, **{key: value for key, value in spec.items() if key != "type"}})
    entry = lookup(registry, spec["type"]) if isinstance(spec["type"], str) else spec["type"]
    target = entry.__init__ if inspect.isclass(entry) else entry
    name = f"{registry.name} {spec['type']!r}"
    check_keywords(target, keywords, name)
    positional = [key for key in inspect.signature(entry).parameters][: len(args)]
    check_values([target], {**dict(zip(positional, args, strict=True)), **keywords}, name)
    return entry(*args, **keywords)

"""Optimizers of the training room: parameter groups that follow the model, and one wrapper for every precision."""

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import timm.optim
import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vision_ssm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, check_keywords, suggest

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _whole(norm: Tensor) -> Tensor:
    """A norm over all processes, of which each may hold a part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(keyword: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            endings = {name.rsplit(".", 1)[-1] for name in names}
            raise ValueError(
                f"paramwise_cfg: {keyword}={pattern!r} matches no trainable parameter of the model."
                f"{suggest(pattern.rsplit('.', 1)[-1].strip('*'), endings)}"
            )


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    decay: Iterable[str] = (),
    no_decay: Iterable[str] = (),
    only_named: bool = False,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters of `model`, each parameter in exactly one.

    A parameter is free of weight decay if it has at most one dimension, if ``no_weight_decay()`` of the model (or of
    its ``backbone``) names it, or if it matches one of the `no_decay` patterns; `decay` patterns win over the first
    two, and `only_named` leaves the patterns alone. With `layer_decay` d, layer i of n counted from the stem learns
    with ``lr * d ** (n - 1 - i)``, where the layers are those of ``group_matcher()``; what lies outside of the backbone
    belongs to the last layer.

    Args:
        model: any module; names and layers come from ``model.backbone`` when it follows the backbone contract.
        lr: learning rate of the last layer.
        weight_decay: decay of the parameters that are not exempt.
        decay, no_decay: `fnmatch` patterns of parameter names, with or without the prefix ``backbone.``.
        only_named: what no pattern of `no_decay` names is decayed.
        layer_decay: factor per layer in (0, 1], or None for one learning rate.

    Returns:
        List of dicts with ``params``, ``lr``, ``weight_decay``, ``name`` and ``param_names``.

    Raises:
        ValueError: a pattern that matches nothing, a parameter that matches both lists, `layer_decay` outside (0, 1],
            or `layer_decay` for a model without ``group_matcher``.
    """
    decay, no_decay = list(decay), list(no_decay)
    backbone: Any = getattr(model, "backbone", None)
    source: Any
    prefix, source = ("backbone.", backbone) if hasattr(backbone, "no_weight_decay") else ("", model)
    exempt = set(source.no_weight_decay()) if hasattr(source, "no_weight_decay") else set()

    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    short = {name: name.removeprefix(prefix) for name in trainable}
    both = list(trainable) + list(short.values())
    _check_patterns("decay", decay, both)
    _check_patterns("no_decay", no_decay, both)

    layers: dict[str, int] = {}
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
        if not hasattr(source, "group_matcher"):
            raise ValueError(f"layer_decay needs a model with group_matcher(), which {type(source).__name__} lacks")
        found = group_parameters(source, source.group_matcher(coarse=False), reverse=True)
        layers = {prefix + name: layer for name, layer in found.items()}
    last = max(layers.values(), default=0)

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        spellings = (name, short[name])
        forced = any(_matches(spelling, decay) for spelling in spellings)
        freed = any(_matches(spelling, no_decay) for spelling in spellings)
        if forced and freed:
            raise ValueError(f"paramwise_cfg: parameter {name!r} matches both decay={decay} and no_decay={no_decay}")
        spared = not only_named and (parameter.ndim <= 1 or short[name] in exempt)
        decayed = forced or not (freed or spared)
        layer = layers.get(name, last)
        if (layer, decayed) not in groups:
            scale = 1.0 if layer_decay is None else layer_decay ** (last - layer)
            label = "decay" if decayed else "no decay"
            groups[layer, decayed] = dict(
                params=[],
                lr=lr * scale,
                weight_decay=weight_decay if decayed else 0.0,
                name=label if layer_decay is None else f"layer {layer}, {label}",
                param_names=[],
            )
        groups[layer, decayed]["params"].append(parameter)
        groups[layer, decayed]["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def groups_table(groups: list[dict[str, Any]]) -> str:
    """Text table of parameter groups: name, learning rate, weight decay, tensors, numbers, examples."""
    rows = [("group", "lr", "weight decay", "tensors", "numbers", "for example")]
    for group in groups:
        rows.append(
            (
                group["name"],
                f"{group['lr']:.3g}",
                f"{group['weight_decay']:.3g}",
                str(len(group["params"])),
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                group["param_names"][0],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def optimizer_class(name: str | type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Optimizer of torch (``"AdamW"``) or of timm (``"lamb"``) by name; `ValueError` with suggestions otherwise.

    A class is itself.
    """
    if not isinstance(name, str):
        return name
    found = OPTIMIZERS.module_dict.get(name)
    if found is not None:
        return found
    if name in timm.optim.list_optimizers():
        return timm.optim.get_optimizer_class(name)
    choices = {*OPTIMIZERS.module_dict, *map(str, timm.optim.list_optimizers())}
    raise ValueError(f"unknown optimizer {name!r}.{suggest(name, choices)}")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParameterGroups:
    """Builds the optimizer wrapper of a config on `parameter_groups`.

    Used as ``optim_wrapper=dict(constructor="vision_ssm.ParameterGroups", optimizer=dict(type="AdamW", lr=1e-3,
    weight_decay=0.05), paramwise_cfg=dict(decay=[...], no_decay=[...], layer_decay=0.75))``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))
        self.options = dict(paramwise_cfg or {})
        check_keywords(parameter_groups, set(self.options), "paramwise_cfg")
        if "lr" not in self.optimizer_cfg:
            raise ValueError("optim_wrapper.optimizer needs a learning rate: lr=...")
        for key in ("lr", "weight_decay"):
            value = self.optimizer_cfg.get(key, 0.0)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"optim_wrapper.optimizer.{key} takes a number, got {value!r}")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        bare: Any = model.module if is_model_wrapper(model) else model
        keywords = dict(self.optimizer_cfg)
        build = optimizer_class(keywords.pop("type"))
        groups = parameter_groups(bare, keywords["lr"], keywords.get("weight_decay", 0.0), **self.options)
        print_log(f"Parameter groups:\n{groups_table(groups)}", logger="current", level=logging.INFO)
        for group in groups:
            del group["param_names"]
        # timm binds defaults with functools.partial
        check_keywords(getattr(build, "func", build), keywords, f"optimizer {self.optimizer_cfg['type']!r}")
        cfg = {"type": "vision_ssm.MixedPrecisionOptimWrapper", **self.wrapper_cfg}
        return OPTIM_WRAPPERS.build(cfg, default_args={"optimizer": build(groups, **keywords)})


@OPTIM_WRAPPERS.register_module()
class MixedPrecisionOptimWrapper(OptimWrapper):
    """Optimizer step in fp32, bf16 (CPU and GPU) or fp16 (GPU, scaled loss), with accumulation and clipping.

    Args:
        optimizer: the optimizer; its first parameter says which device autocast is for.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        loss_scale: keywords of `torch.amp.GradScaler` for fp16.
        accumulative_counts: iterations whose gradients are summed before a step.
        clip_grad: ``dict(max_norm=...)`` or ``dict(type="value", clip_value=...)``.

    Attributes:
        guards: callables ``(what, value)`` that see the loss and the gradient norm (not in fp16, where overflow is the
            scaler's business); they raise to stop the run, and weights are then still those before the step. A fused
            optimizer skips a step whose numbers are not finite by itself, so that guards look when the step has been
            launched and the host need not wait for the GPU before it; with others they look first.

    Raises:
        ValueError: an unknown precision, or one that the device does not offer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: str = "fp32",
        loss_scale: dict | None = None,
        accumulative_counts: int = 1,
        clip_grad: dict | None = None,
    ) -> None:
        clip_grad = None if clip_grad is None else dict(clip_grad)
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad)
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}.{suggest(precision, PRECISIONS)}")
        self.precision = precision
        self.device_type = optimizer.param_groups[0]["params"][0].device.type
        if precision == "fp16" and self.device_type == "cpu":
            raise ValueError("precision 'fp16' needs a GPU; on the CPU use 'bf16' (--amp bf16)")
        if precision == "bf16" and self.device_type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("this GPU has no bfloat16 arithmetic; use 'fp16' (--amp fp16)")
        self.scaler = torch.amp.GradScaler(self.device_type, **(loss_scale or {})) if precision == "fp16" else None
        self.guards: list[Callable[[str, Tensor], None]] = []
        self._watched: list[tuple[str, Tensor]] = []

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast of this precision; gradients are not synchronised while they only accumulate."""
        dtype = PRECISIONS[self.precision]
        with super().optim_context(model), torch.autocast(self.device_type, dtype, enabled=dtype is not None):
            yield

    def at_boundary(self, iterations: int) -> bool:
        """Whether no gradient is pending after `iterations` iterations, so that a run may be cut there."""
        return iterations % self._accumulative_counts == 0 or iterations == self._max_counts

    @property
    def accumulative_counts(self) -> int:
        """Iterations per optimizer step."""
        return self._accumulative_counts

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        if self.guards:
            self._watched = [("loss", loss.detach())]
            if not self._skips_by_itself():
                self._look()
        try:
            super().update_params(loss, step_kwargs=step_kwargs, zero_kwargs=zero_kwargs)
        finally:
            self._watched = []

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss if self.scaler is None else self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        guarded = bool(self.guards) and self.scaler is None
        by_norm = bool(self.clip_grad_kwargs) and self.clip_func is torch.nn.utils.clip_grad_norm_
        if guarded and not by_norm:  # before values are clipped, which would hide an infinity
            self._watched.append(("gradient", _whole(torch.nn.utils.get_total_norm(self._gradients()))))
        norm = self._clip_grad() if self.clip_grad_kwargs else None
        if guarded and norm is not None:
            self._watched.append(("gradient", norm.detach()))
        if self.scaler is None:
            self._watched_step(**kwargs)
        else:
            self.scaler.step(self.optimizer, **kwargs)
            self.scaler.update()
        if norm is not None:
            self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))

    def _skips_by_itself(self) -> bool:
        """Whether the optimizer can be told on the device to change nothing, and every loss is seen before a step."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)  # as torch's own loss scaler asks
        fused = fused and all(group.get("fused") for group in self.optimizer.param_groups)  # a checkpoint may unset it
        first = [parameter for group in self.optimizer.param_groups for parameter in group["params"][:1]]
        fused = fused and not any(isinstance(parameter, DTensor) for parameter in first)  # which take no plain flag
        return fused and self.scaler is None and self._accumulative_counts == 1

    def _look(self) -> None:
        watched, self._watched = self._watched, []
        for what, value in watched:
            for guard in self.guards:
                guard(what, value)

    def _watched_step(self, **kwargs: Any) -> None:
        if not (self._watched and self._skips_by_itself()):
            self._look()
            self.optimizer.step(**kwargs)
            return
        device = self._watched[-1][1].device
        finite = torch.stack([torch.isfinite(value).all().to(device) for _, value in self._watched]).all()
        optimizer: Any = self.optimizer
        optimizer.found_inf = finite.logical_not().float()
        try:
            optimizer.step(**kwargs)
        finally:
            del optimizer.found_inf
        self._look()

    def _gradients(self) -> list[Tensor]:
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def _clip_grad(self) -> Tensor | None:
        """Clip and return the norm before clipping (None when values are clipped)."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = self.clip_func([p for p in parameters if p.grad is not None], **self.clip_grad_kwargs)
        return None if norm is None else _whole(norm)

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        state = dict(state_dict)
        scaler = state.pop("scaler", None)
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state)

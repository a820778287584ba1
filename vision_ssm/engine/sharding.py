"""FSDP: parameters, gradients and optimizer states are split over the processes of a run; weights come together block
by block where they are needed. Checkpoints are those of every other run."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vision_ssm.registry import HOOKS

_LISTED = re.compile(r"(?:^|\.)(blocks|stages)\.\d+$")
OPTIMIZERS = ("adam", "adamw", "sgd", "lamb", "lion")
"""Those whose every state is a number or as large as the parameter; trained on shards in the tests."""


def check_sharding(cfg: Any, distributed: bool) -> None:
    """Check that a run with ``fsdp=True`` can be one, as far as its config says.

    Args:
        cfg: config of the run.
        distributed: whether the run has a process group.

    Raises:
        ValueError: it cannot; every obstacle is named with what to do about it.
    """
    problems = []
    if not distributed:
        problems.append(
            "there is one process, whose parameters nobody shares: start several with torchrun --nproc_per_node=N "
            "tools/train.py CONFIG --fsdp --launcher pytorch"
        )
    if isinstance(cfg.get("model"), Mapping) and cfg.model.get("cuda_graphs"):
        problems.append(
            "the config sets model.cuda_graphs: a recording cannot hold the communication before every block"
        )
    if cfg.get("compile") not in (None, False):  # an empty dict compiles with the defaults
        problems.append("the config sets compile, which would compile the communication too: use one of the two")
    if cfg.get("model_wrapper_cfg") is not None:
        problems.append("the config sets model_wrapper_cfg, another way to distribute the model: use one of the two")
    if cfg.get("activation_checkpointing") is not None:
        problems.append(
            "the config sets activation_checkpointing, which replaces forward methods: recompute blocks with with_cp "
            "of the backbone"
        )
    wrapper = cfg.get("optim_wrapper") or {}
    if not isinstance(wrapper, Mapping):
        problems.append("the optimizer is an object, which steps whole parameters: give the config of optim_wrapper")
        wrapper = {}
    if wrapper.get("precision") == "fp16" or _name(wrapper.get("type")) == "AmpOptimWrapper":
        problems.append(
            "the loss is scaled for fp16, which was not tried on parts of gradients: use bf16 (--amp bf16, "
            'optim_wrapper.type="vision_ssm.MixedPrecisionOptimWrapper")'
        )
    optimizer = wrapper.get("optimizer") or {}
    if not isinstance(optimizer, Mapping):
        problems.append("the optimizer is an object, which steps whole parameters: give the config of it")
    elif "type" in optimizer and _name(optimizer["type"]).lower() not in OPTIMIZERS:
        name = _name(optimizer["type"])
        problems.append(f"the optimizer {name} was not tried on parts of parameters: use {', '.join(OPTIMIZERS)}")
    if float((wrapper.get("clip_grad") or {}).get("norm_type", 2)) == math.inf:
        problems.append("clip_grad takes the infinity norm, which an empty part of a gradient has not: use norm_type=2")
    for hook in cfg.get("custom_hooks") or []:
        if isinstance(hook, EMAHook):
            problems.append('the EMAHook is an object, which averages whole models: give it as dict(type="EMAHook")')
    _refuse(problems)


def _name(kind: Any) -> str:
    """Name, without a scope, of what a config gives as a class or by its name."""
    return getattr(kind, "__name__", str(kind)).rpartition(".")[2]


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"fsdp=True (--fsdp) cannot be used here, switch it off or:\n  {listed}")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on `model`."""
    return isinstance(model, FSDPModule)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """What a backbone or U-Net repeats, by name: entries of ``blocks``, or of ``stages`` that have none of their own.

    Inner ones come before outer ones.
    """
    found = {}
    for name, module in reversed(list(model.named_modules())):
        listed = _LISTED.search(name)
        if listed and (listed[1] == "blocks" or not hasattr(module, "blocks")) and list(module.parameters()):
            found[name] = module
    return found


def shard(model: nn.Module) -> None:
    """Split the parameters of `model` over all processes, in place: each keeps its rows of every tensor.

    Blocks gather their weights before their forward and backward pass and drop them after it; everything else does so
    with the whole model, which must therefore be called as a module in training. ``load_state_dict`` goes on taking
    whole weights. Gradients are means over the processes, as in DDP. What autocast makes of the weights of a block
    lives until its backward pass, unless the block is recomputed there.

    Args:
        model: on the device of training, with the same weights in every process.

    Raises:
        ValueError: a parameter without dimensions, or one that two blocks, or a block and what lies outside, share.
    """
    blocks = _blocks(model)
    problems = []
    owners: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = max((block for block in blocks if name.startswith(f"{block}.")), key=len, default="")
        if owners.setdefault(parameter, owner) != owner:
            problems.append(f"parameter {name} is shared between blocks: give each its own")
        if parameter.ndim == 0:
            problems.append(f"parameter {name} is one number without dimensions, which cannot be split: make it (1,)")
    _refuse(problems)
    mesh = init_device_mesh(next(model.parameters()).device.type, (get_world_size(),))
    for block in blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also the outermost, so that it is whole nowhere else
    _take_whole_weights(model)


def _take_whole_weights(model: nn.Module) -> None:
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_split_loaded)


def _split_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        key = prefix + name
        if key in state and state[key].shape == parameter.shape:  # otherwise torch's own message is to come
            state[key] = _split_like(state[key], parameter)


def _split_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, which every process has, split and placed like the parameter `like`."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def split_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The ``state_dict()`` of an optimizer over whole parameters as one over the parts that `optimizer` has."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def split(value: Any, like: Tensor) -> Any:
        return _split_like(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    found = {
        index: {name: split(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": found}


def whole_on_cpu(state: Any, keep: bool = True) -> Any:
    """`state`, a structure with tensors, with whole tensors on the CPU. Every process has to call this if it has parts.

    Args:
        state: nested dicts and sequences.
        keep: False leaves None for every tensor, in processes that only have to contribute their parts.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if keep else None

    return apply_to(state, lambda item: isinstance(item, Tensor), gather)


def gather(model: nn.Module) -> None:
    """Let every process hold all weights of a sharded model until `release`, and run it without the others.

    Gradients then stay in the process. Between validation batches, whose number may differ, nobody waits for anybody.
    """
    for part in _sharded(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
        part.unshard()


def release(model: nn.Module) -> None:
    """Undo `gather`."""
    for part in _sharded(model):
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)
        part.set_reshard_after_backward(True, recurse=False)
        part.set_requires_gradient_sync(True, recurse=False)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """`gather` and `release` around what is inside; nothing for a model that is not sharded."""
    if not is_sharded(model):
        yield
        return
    gather(model)
    try:
        yield
    finally:
        release(model)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _tensors_of(module: nn.Module, made: dict[Any, Any] | None = None) -> nn.Module:
    """A module without methods that has copies of the parameters and buffers of `module` under the same names."""
    made = {} if made is None else made  # what stands in several places is copied once, so that the order is the same
    if module in made:
        return made[module]
    copy = made[module] = nn.Module()
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        copy.register_parameter(name, None if parameter is None else made[parameter])
    for name, buffer in module._buffers.items():
        own = None if buffer is None else buffer.clone()
        copy.register_buffer(name, own, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        copy.add_module(name, None if child is None else _tensors_of(child, made))
    return copy


@HOOKS.register_module()
class ShardedEMAHook(EMAHook):
    """mmengine's moving average where each process averages its parts of the parameters.

    The Runner takes it for an ``EMAHook`` of the config in a run with ``fsdp=True``. Checkpoints hold whole weights.
    """

    def before_run(self, runner: Any) -> None:
        self.src_model = runner.bare_model
        # A sharded model cannot be copied; of the average, only its tensors are ever used.
        self.ema_model = MODELS.build(self.ema_cfg, default_args=dict(model=_tensors_of(self.src_model)))
        _take_whole_weights(self.ema_model)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["ema_state_dict"] = whole_on_cpu(self.ema_model.state_dict(), keep=is_main_process())
        self._swap_ema_state_dict(checkpoint)


def sharded_hook(hook: Hook | dict) -> Hook | dict:
    """`hook` as it is registered in a run with ``fsdp=True``."""
    if isinstance(hook, dict) and hook.get("type") in ("EMAHook", "mmengine.EMAHook", EMAHook):
        return {**hook, "type": "vision_ssm.ShardedEMAHook"}
    return hook

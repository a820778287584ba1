"""Multiply-accumulates of a model, operator by operator and module by module.

Convention: one image, one forward pass in evaluation. Matrix products and convolutions count one per
multiply-accumulate, biases nothing. A scan adds 9 operations per step, channel and state and one for its skip
connection, as in the tables of VMamba and its successors, which add them to multiply-accumulates as they are.
Norms, activations, additions, pooling, resizing and the copies along routes have no formula; they are listed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops import flops
from ..scans.core import RouteCore

SCAN_FORMULAS = {
    "9BLDN": "a scan of L steps, D channels and N states adds 9*L*D*N + L*D operations",
    "products": "matrix products and convolutions alone: the recurrence of a scan counts nothing",
    "modules": "linear layers and convolutions alone, as thop sees them: the core of a scan counts nothing",
}
"""How scans may be counted."""
CONVENTION = (
    "multiply-accumulates (MACs) of one forward pass for one image: one, which is two FLOPs, for each of a matrix"
    " product or convolution"
)
_FREE = ("empty", "_unsafe_view", "lift_fresh")  # nothing is computed


def _expansion_2d(*shapes: Any) -> int:
    """FLOPs of the expansion of step sizes, which is a matrix product, in `scan_2d`."""
    rank = 0 if shapes[8] is None else shapes[8][2]
    batch, (routes, steps), dim = shapes[0][0], shapes[6], shapes[0][-1]
    return flops.scan_2d_flops(batch, steps, routes, dim, 0, rank=rank, skip=False)


def _local_expansion(*shapes: Any) -> int:
    """The same in `local_selective_scan`."""
    (batch, length, groups, dim), rank = shapes[0], 0 if shapes[6] is None else shapes[6][2]
    return 2 * batch * length * groups * dim * rank


def _nothing(*_: Any) -> int:
    return 0


# FLOPs of every operator that scans, and those of them that are matrix products
_SCANS: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
    "scan_2d": (flops.scan_2d_shapes, _expansion_2d),
    "local_selective_scan": (flops.local_selective_scan_shapes, _local_expansion),
    "selective_scan": (flops.selective_scan_shapes, _nothing),
    "ssd": (flops.ssd_shapes, _nothing),
}


def _scan_flops(all_of_it: Callable[..., int], products: Callable[..., int], recurrence: bool) -> Callable[..., int]:
    """FLOPs as FlopCounterMode adds them up: halved in the end, so that operations of a recurrence stand twice here."""

    def formula(*shapes: Any, **_: Any) -> int:
        return 2 * all_of_it(*shapes) - products(*shapes) if recurrence else products(*shapes)

    return formula


_WITHOUT_FORMULA = ("layer_norm",)  # counted by none of the papers


@dataclass
class Count:
    """What `count_operations` found.

    Attributes:
        macs: multiply-accumulates in all.
        parameters: number of parameters.
        operators: multiply-accumulates of every operator that has a formula, the largest first.
        calls: how often each of them ran.
        uncounted: how often each operator without a formula ran, the most frequent first. Views, and what computes
            indices, such as the tables of routes, are left out.
        modules: multiply-accumulates of every module that ran or holds parameters, those of its children included,
            by its name; "" is the model.
        sizes: parameters of the same modules, those of their children included.
    """

    macs: int
    parameters: int
    operators: dict[str, int]
    calls: dict[str, int]
    uncounted: dict[str, int]
    modules: dict[str, int]
    sizes: dict[str, int]


@dataclass
class _Tally:
    """FLOPs by innermost module and operator, while a model runs.

    `hide` is a kind of modules in which nothing is counted.
    """

    hide: type[nn.Module] | None = None
    stack: list[str] = field(default_factory=lambda: [""])
    hidden: list[bool] = field(default_factory=lambda: [False])
    flops: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    calls: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)

    def watch(self, model: nn.Module) -> None:
        """Keep `stack` up to date while modules of `model` run."""

        def enter(name: str, module: nn.Module, *_: Any) -> None:
            self.stack.append(name)
            self.hidden.append(self.hidden[-1] or self.hide is not None and isinstance(module, self.hide))

        def leave(*_: Any) -> None:
            self.stack.pop()
            self.hidden.pop()

        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(enter, name))
            module.register_forward_hook(leave)


class _Counter(FlopCounterMode):
    """`FlopCounterMode` that knows the module at work and the operators that it has no formula for."""

    def __init__(self, tally: _Tally, mapping: dict[Any, Callable[..., int]], without: set[Any]):
        super().__init__(display=False, custom_mapping=mapping)
        self.tally = tally
        self.mod_tracker: Any = nullcontext()  # `tally` knows the module, and knows it faster
        for operator in without:
            self.flop_registry.pop(operator, None)

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        tally = self.tally
        if func_packet in self.flop_registry and not tally.hidden[-1]:
            name = _name(func_packet)
            tally.flops[tally.stack[-1]][name] += self.flop_registry[func_packet](*args, **kwargs, out_val=out)
            tally.calls[name] += 1
        elif _holds_numbers(out) and not _is_free(func_packet):
            tally.uncounted[_name(func_packet)] += 1
        return out


@cache
def _name(packet: Any) -> str:
    return str(packet).replace(".", "::", 1)


@cache
def _is_free(packet: Any) -> bool:
    """Whether an operator makes a view or nothing."""
    return packet.__name__ in _FREE or any(getattr(packet, overload).is_view for overload in packet.overloads())


def _holds_numbers(out: Any) -> bool:
    """Whether there is more in an output than indices."""
    outputs = out if isinstance(out, (tuple, list)) else [out]
    return any(isinstance(output, torch.Tensor) and output.is_floating_point() for output in outputs)


def count_operations(
    build: Callable[[], nn.Module],
    size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    scan_formula: str = "9BLDN",
) -> Count:
    """Multiply-accumulates of one forward pass for one image. Nothing is computed and no memory is taken.

    Args:
        build: makes the model, which takes images (B, in_chans, H, W); called on the meta device.
        size: height and width of the image, or one number for both.
        in_chans: channels of the image.
        scan_formula: one of `SCAN_FORMULAS`.

    Raises:
        ValueError: no such formula.
    """
    if scan_formula not in SCAN_FORMULAS:
        raise ValueError(f"scan_formula is one of {', '.join(SCAN_FORMULAS)}, got {scan_formula!r}")
    height, width = (size, size) if isinstance(size, int) else size
    operators, recurrence = torch.ops.vision_ssm, scan_formula == "9BLDN"
    mapping = {getattr(operators, name): _scan_flops(*parts, recurrence) for name, parts in _SCANS.items()}
    tally = _Tally(RouteCore if scan_formula == "modules" else None)
    with torch.device("meta"):
        model = build().eval()
    tally.watch(model)
    counter = _Counter(tally, mapping, {getattr(operators, name) for name in _WITHOUT_FORMULA})
    with FakeTensorMode(), torch.no_grad(), counter:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors}
        torch.func.functional_call(model, fakes, torch.empty(1, in_chans, height, width), tie_weights=False)
    return _count(model, tally)


def _count(model: nn.Module, tally: _Tally) -> Count:
    by_operator: Counter[str] = Counter()
    by_module: Counter[str] = Counter()
    for name, found in tally.flops.items():
        by_operator.update(found)
        total = sum(found.values())
        by_module[""] += total
        parts = name.split(".") if name else []
        for depth in range(len(parts)):
            by_module[".".join(parts[: depth + 1])] += total
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    return Count(
        macs=by_module[""] // 2,
        parameters=sizes[""],
        operators={name: value // 2 for name, value in by_operator.most_common()},
        calls=dict(tally.calls),
        uncounted=dict(tally.uncounted.most_common()),
        modules={name: by_module[name] // 2 for name in sizes if by_module[name] or sizes[name]},
        sizes=sizes,
    )


def count_macs(build: Callable[[], nn.Module], size: int | tuple[int, int] = 224, in_chans: int = 3) -> int:
    """The total of `count_operations`, which see."""
    return count_operations(build, size, in_chans).macs

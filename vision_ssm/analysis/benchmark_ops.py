"""Speed of the operators, and only of operators whose outputs and gradients are right.

An operator to be timed is a row of `CASES`: inputs of some shape, and the operator bound to them. Its twin is the same
call in float64 on the reference backend. Peers take turns with it in the same run.
"""

import fnmatch
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import dcnv4, layer_norm, plstm2d, scan_2d, selective_scan, ssd, state_fusion
from ..registry import suggest
from ..scans import build_routes
from ..scans.multi_direction import MultiDirectionScan
from .timing import (
    SHORTEST_SAMPLE,
    WARMUP,
    BenchmarkError,
    GraphedStep,
    RecordingError,
    Timing,
    allocated,
    copy_bandwidth,
    describe_backends,
    fits_in_memory,
    on_device,
    peak_memory,
    release_memory,
    second_level_cache,
    synchronize,
    time_in_turns,
    use_backend,
    used_backends,
)

# Relative error of every output and gradient against the twin, as the tests of the operators demand it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PEERS = ("chunked", "mamba_ssm")
QUANTITIES = ("forward", "forward+backward", "backward")
_MOST_INPUT_SETS = 64
_CACHE_MULTIPLE = 4  # inputs that take turns fill the L2 cache this often, so that none is still in it when it is due
_STRIDES = (4, 8, 16, 32)  # of the four stages of a model
_CHECK_BATCH = 2


class Bound(NamedTuple):
    """An operator bound to inputs: `call` gives its output; `leaves` are the inputs that get a gradient."""

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]


def _leaves(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().requires_grad_() if value.is_floating_point() else value for name, value in values.items()
    }


def _autocast(value: Tensor) -> Any:
    """Autocast to the dtype of `value` where that is a half precision, as in a model that runs under it."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(value.device.type, dtype=value.dtype) if half else nullcontext()


@dataclass(frozen=True)
class OperatorCase:
    """One operator at one shape. Activations have the dtype asked for, parameters are float32.

    Attributes:
        batch: images or sequences.
        about: what the shape is taken from.
    """

    batch: int
    about: str

    @property
    def shape(self) -> str:
        """The sizes, as a short text."""
        raise NotImplementedError

    def small(self) -> "OperatorCase":
        """The same kind of input, with the same channels, states, rank and routes, but few steps, for the twin."""
        raise NotImplementedError

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Fresh random inputs by name."""
        raise NotImplementedError

    def bind(self, values: dict[str, Tensor]) -> Bound:
        """The operator, to be called on `values`. In float64 no autocast applies."""
        raise NotImplementedError

    def exponentials(self) -> int:
        """Exponentials of a forward pass that no rewriting avoids: one per route, step, channel and state."""
        raise NotImplementedError

    def of_image(self, size: int) -> "OperatorCase":
        """The same operator in the same place of the model for images of `size` x `size` pixels.

        Raises:
            BenchmarkError: the case does not belong to a stage of a model.
        """
        raise BenchmarkError(f"the operator of {self.shape} belongs to no stage of a model; sweep core_* or scan_2d_*")


@dataclass(frozen=True)
class MapCase(OperatorCase):
    """An operator on the map of one stage of a model. `width` is that of the stage; D = expand * width."""

    stage: int
    height: int
    width: int
    expand: int
    states: int

    @property
    def dim(self) -> int:
        return self.channels * self.expand

    @property
    def channels(self) -> int:
        return 96 * 2 ** (self.stage - 1)

    @property
    def rank(self) -> int:
        return math.ceil(self.channels / 16)

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def shape(self) -> str:
        return f"B={self.batch} {self.height}x{self.width} D={self.dim} K=4 N={self.states} R={self.rank}"

    def small(self) -> "OperatorCase":
        return replace(self, batch=_CHECK_BATCH, height=7, width=9)

    def of_image(self, size: int) -> "OperatorCase":
        side = math.ceil(size / _STRIDES[self.stage - 1])
        return replace(self, height=side, width=side)

    def exponentials(self) -> int:
        return self.batch * 4 * self.length * self.dim * self.states


@dataclass(frozen=True)
class CoreCase(MapCase):
    """From the activated map to the normalised sum of its routes: projections, scan, merge and norm of a mixer."""

    def _mixer(self) -> MultiDirectionScan:
        return MultiDirectionScan(
            self.channels, expand=self.expand, state_dim=self.states, routes="cross", conv_kernel=1, gate=False
        )

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        x = F.silu(torch.randn(self.batch, self.height, self.width, self.dim, device=device, dtype=dtype))
        mixer = self._mixer()
        parts = {"core": mixer.core, "norm": mixer.out_norm}
        return {"x": x} | {
            f"{part}.{name}": parameter.detach().to(device)
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        x = values["x"].detach().requires_grad_()
        mixer = self._mixer()
        core, norm = (module.to(x.device, values["norm.weight"].dtype) for module in (mixer.core, mixer.out_norm))
        leaves = {"x": x}
        for part, module in (("core", core), ("norm", norm)):
            for name, parameter in module.named_parameters():
                parameter.data = values[f"{part}.{name}"]
                leaves[f"{part}.{name}"] = parameter

        def call() -> Tensor:
            with _autocast(x):
                return run_core(core, norm, x)

        return Bound(call, leaves)


def run_core(core: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """The core and the norm behind it, as `MultiDirectionScan` runs them: in one call where the core takes the norm."""
    y = core(x, norm=norm) if "norm" in inspect.signature(core.forward).parameters else norm(core(x))
    return y.to(x.dtype)


@dataclass(frozen=True)
class Scan2dCase(MapCase):
    """The bare scan of a map along the four cross routes, on given projections of low rank."""

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        draw = partial(torch.randn, device=device)
        place = (self.batch, self.length, 4)
        return {
            "x": draw(self.batch, self.length, self.dim, dtype=dtype),
            "delta": draw(*place, self.rank, dtype=dtype),
            "A": -0.1 - torch.rand(4, self.dim, self.states, device=device),
            "B": draw(*place, self.states, dtype=dtype),
            "C": draw(*place, self.states, dtype=dtype),
            "D": draw(4, self.dim),
            "dt_weight": draw(4, self.dim, self.rank) / self.rank,
            "dt_bias": draw(4, self.dim) - 3,
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        (table,) = build_routes("cross").tables(self.height, self.width, leaves["x"].device)
        return Bound(lambda: scan_2d(**leaves, read=table.read, write=table.write), leaves)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SelectiveScanCase(OperatorCase):
    """The bare 1-D operator, with softplus, skip and bias, and B and C shared by all channels."""

    dim: int
    length: int
    states: int
    gate: bool = False

    @property
    def shape(self) -> str:
        return f"B={self.batch} D={self.dim} L={self.length} N={self.states}{' z' if self.gate else ''}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, length=67)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        draw = partial(torch.randn, device=device)
        full, shared = (self.batch, self.dim, self.length), (self.batch, self.states, self.length)
        values = {
            "u": draw(full, dtype=dtype),
            "delta": draw(full, dtype=dtype),
            "A": -0.1 - torch.rand(self.dim, self.states, device=device),
            "B": draw(shared, dtype=dtype),
            "C": draw(shared, dtype=dtype),
            "D": draw(self.dim),
            "delta_bias": draw(self.dim) - 3,
        }
        return values | ({"z": draw(full, dtype=dtype)} if self.gate else {})

    def bind(self, values: dict[str, Tensor]) -> Bound:
        return self.bind_to(selective_scan, values)

    def bind_to(self, function: Callable, values: dict[str, Tensor]) -> Bound:
        """`function` has the signature of `selective_scan`, which is mamba_ssm's too."""
        leaves = _leaves(values)
        return Bound(lambda: function(**leaves, delta_softplus=True), leaves)

    def exponentials(self) -> int:
        return self.batch * self.dim * self.length * self.states


@dataclass(frozen=True)
class SSDCase(OperatorCase):
    """The bare Mamba-2 scan."""

    length: int
    heads: int
    head_width: int
    groups: int
    states: int

    @property
    def shape(self) -> str:
        return f"B={self.batch} L={self.length} {self.heads} heads of {self.head_width} G={self.groups} N={self.states}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, length=67)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        draw = partial(torch.randn, device=device)
        shared = (self.batch, self.length, self.groups, self.states)
        return {
            "x": draw(self.batch, self.length, self.heads, self.head_width, dtype=dtype),
            "dt": draw(self.batch, self.length, self.heads, dtype=dtype),
            "A": -0.1 - torch.rand(self.heads, device=device),
            "B": draw(shared, dtype=dtype),
            "C": draw(shared, dtype=dtype),
            "D": draw(self.heads),
            "dt_bias": draw(self.heads) - 3,
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        return Bound(lambda: ssd(**leaves, dt_softplus=True), leaves)  # type: ignore[arg-type,return-value]

    def exponentials(self) -> int:
        return self.batch * self.length * self.heads  # one decay per head and step


@dataclass(frozen=True)
class StateFusionCase(OperatorCase):
    """Fusion of the states of one stage and their read-out; states are float32, as the scan leaves them."""

    stage: int
    height: int
    width: int

    @property
    def dim(self) -> int:
        return 128 * 2 ** (self.stage - 1)

    @property
    def shape(self) -> str:
        return f"B={self.batch} {self.height}x{self.width} D={self.dim}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, height=7, width=9)

    def of_image(self, size: int) -> OperatorCase:
        side = math.ceil(size / _STRIDES[self.stage - 1])
        return replace(self, height=side, width=side)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        draw = partial(torch.randn, device=device)
        place = (self.batch, self.height, self.width)
        return {
            "states": draw(*place, self.dim),
            "kernels": draw(3, self.dim, 3, 3),
            "alpha": draw(3),
            "C": draw(*place, 1, dtype=dtype),
            "D": draw(self.dim),
            "x": draw(*place, self.dim, dtype=dtype),
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        return Bound(lambda: state_fusion(**leaves), leaves)

    def exponentials(self) -> int:
        return 0


@dataclass(frozen=True)
class DeformableCase(OperatorCase):
    """DCNv4 with nine points and offsets of about one cell, on one branch of a high-resolution network."""

    branch: int
    height: int
    width: int

    @property
    def dim(self) -> int:
        return 64 * 2**self.branch

    @property
    def groups(self) -> int:
        return self.dim // 32

    @property
    def shape(self) -> str:
        return f"B={self.batch} {self.height}x{self.width} D={self.dim} G={self.groups}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, height=7, width=9)

    def of_image(self, size: int) -> OperatorCase:
        side = math.ceil(size / _STRIDES[self.branch])
        return replace(self, height=side, width=side)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        place = (self.batch, self.height, self.width)
        numbers = 8 * math.ceil(27 * self.groups / 8)  # offsets and weights of nine points, padded as the model does
        return {
            "value": torch.randn(*place, self.dim, device=device, dtype=dtype),
            "offset_mask": torch.randn(*place, numbers, device=device, dtype=dtype),
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        return Bound(lambda: dcnv4(**leaves, groups=self.groups), leaves)

    def exponentials(self) -> int:
        return 0


@dataclass(frozen=True)
class RMSNormCase(OperatorCase):
    """RMS norm of the sum of a stream, in float32, and what the block before it returned.

    The output is the norm: the sum, which is written beside it, is in no floor.
    """

    length: int
    dim: int

    @property
    def shape(self) -> str:
        return f"B={self.batch} L={self.length} C={self.dim}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, length=67)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        place = (self.batch, self.length, self.dim)
        return {
            "x": torch.randn(place, device=device),
            "residual": torch.randn(place, device=device, dtype=dtype),
            "weight": 1 + torch.randn(self.dim, device=device) / 2,
        }

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        return Bound(lambda: layer_norm(**leaves, center=False, out_dtype=leaves["residual"].dtype)[1], leaves)

    def exponentials(self) -> int:
        return 0


def _deformable_cases() -> dict[str, OperatorCase]:
    sides = [(branch, 224 // _STRIDES[branch]) for branch in range(4)]
    return {
        f"dcnv4_branch{branch}": DeformableCase(128, f"HRVMamba-S, branch {branch}", branch, side, side)
        for branch, side in sides
    }


def _state_fusion_cases() -> dict[str, OperatorCase]:
    sides = [(stage, 224 // _STRIDES[stage - 1]) for stage in range(1, 5)]
    return {
        f"state_fusion_stage{stage}": StateFusionCase(128, f"Spatial-Mamba-T, stage {stage}", stage, side, side)
        for stage, side in sides
    }


@dataclass(frozen=True)
class PLSTMCase(OperatorCase):
    """The recurrence on a grid in four orientations, with the direct term; gates are float32."""

    height: int
    width: int
    heads: int
    turns: tuple[str, ...]
    head_width: int = 64

    @property
    def shape(self) -> str:
        return f"B={self.batch} {self.height}x{self.width} {self.heads} heads of {self.head_width}"

    def small(self) -> OperatorCase:
        return replace(self, batch=_CHECK_BATCH, height=5, width=6)

    def values(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        draw, gate = partial(torch.randn, device=device), partial(torch.rand, device=device)
        nodes = (self.batch, self.height, self.width, self.heads)
        values = {name: draw(*nodes, self.head_width, dtype=dtype) for name in "QKV"}
        values |= {name: gate(*nodes, 4, 1) for name in ("S_r", "S_d", "M_l", "M_u")}
        values |= {name: draw(*nodes, 4, 1, 1).tanh() for name in ("T_rl", "T_du", *self.turns)}
        return values | {"D": gate(*nodes)}

    def bind(self, values: dict[str, Tensor]) -> Bound:
        leaves = _leaves(values)
        absent = dict.fromkeys({"T_dl", "T_ru"} - set(self.turns))
        return Bound(lambda: plstm2d(**leaves, **absent), leaves)  # type: ignore[arg-type]

    def exponentials(self) -> int:
        return 0  # gates are given


def _map_cases(kind: type[MapCase], name: str) -> dict[str, OperatorCase]:
    cases: dict[str, OperatorCase] = {}
    for stage in range(1, 5):
        side = 224 // _STRIDES[stage - 1]
        cases[f"{name}_stage{stage}"] = kind(128, f"VMamba-T s1l8, stage {stage}", stage, side, side, 1, 1)
    for stage in range(1, 5):
        side = 224 // _STRIDES[stage - 1]
        cases[f"{name}_stage{stage}_n16"] = kind(64, f"vanilla VMamba-T, stage {stage}", stage, side, side, 2, 16)
    return cases


CASES: dict[str, OperatorCase] = {
    **_map_cases(CoreCase, "core"),
    **_map_cases(Scan2dCase, "scan_2d"),
    "selective_scan_1": SelectiveScanCase(128, "one state, a map of 56 x 56", 384, 3136, 1),
    "selective_scan_2": SelectiveScanCase(64, "16 states, a map of 56 x 56", 768, 3136, 16),
    "selective_scan_3": SelectiveScanCase(16, "Vim-T at 1248 x 1248", 384, 6085, 16, gate=True),
    "selective_scan_4": SelectiveScanCase(128, "Vim-T at 224 x 224", 384, 197, 16, gate=True),
    "selective_scan_5": SelectiveScanCase(1, "one long sequence", 768, 16384, 16),
    "ssd_tokens": SSDCase(128, "Adventurer-T at 224 x 224", 198, 8, 64, 1, 64),
    "ssd_stage1": SSDCase(128, "vmamba_tiny_m2, stage 1, four routes as groups", 3136, 24, 16, 4, 64),
    **_state_fusion_cases(),
    **_deformable_cases(),
    "plstm_propagation": PLSTMCase(64, "pLSTM-Vis-T at 224 x 224", 14, 14, 3, ("T_dl", "T_ru")),
    "plstm_diffusion": PLSTMCase(64, "pLSTM-Vis-T at 224 x 224", 14, 14, 3, ("T_ru",)),
    "plstm_large": PLSTMCase(4, "pLSTM-Vis-T at 1024 x 1024", 64, 64, 3, ("T_ru",)),
    "rms_norm_tokens": RMSNormCase(128, "Vim-T at 224 x 224", 197, 192),
}


def find_cases(patterns: Sequence[str]) -> list[str]:
    """Names of cases, in the order given; a name may be a shell-style pattern such as ``"core_*"``.

    Raises:
        KeyError: no case matches; the message suggests some.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(CASES, pattern)
        if not names:
            hint = suggest(pattern, CASES) or f" Known: {', '.join(CASES)}."
            raise KeyError(f"unknown operator case {pattern!r}.{hint}")
        found |= dict.fromkeys(names)
    return list(found)


def _results(bound: Bound, cotangent: Tensor, gradients: bool) -> dict[str, Tensor]:
    output = bound.call()
    results = {"output": output.detach()}
    if not gradients:
        return results
    found = torch.autograd.grad(output, list(bound.leaves.values()), cotangent.to(output.dtype))
    return results | {f"gradient of {name}": gradient for name, gradient in zip(bound.leaves, found)}


def _compare(name: str, have: dict[str, Tensor], want: dict[str, Tensor], bound: float, reference: str) -> None:
    for key, expected in want.items():
        expected = expected.double()
        size = expected.norm()
        error = ((have[key].double() - expected).norm() / torch.where(size > 0, size, 1)).item()
        if not error <= bound:  # so that NaN is an error too
            raise BenchmarkError(
                f"{name} is not timed: its {key} is {error:.1e} away from {reference} (allowed {bound:.0e}); "
                "run the operator tests first"
            )


def check_operator(
    name: str,
    case: OperatorCase,
    dtype: torch.dtype,
    device: torch.device,
    peer: Callable[[dict[str, Tensor]], Bound] | None = None,
) -> None:
    """Compare an operator with its twin in float64 on a small input of the same kind: output and all gradients.

    Kernels may treat long routes otherwise than short ones. So where something faster than the chunked path runs, it is
    compared with that path too, on one element of the batch at full length.

    Args:
        name: what messages call it.
        case: operator and shape.
        dtype: of the activations.
        device: where to run.
        peer: binds somebody else's operator to the inputs, in place of ours. Of that only the output is checked, at
            the small size: enough to know that it was called with the same meaning.

    Raises:
        BenchmarkError: an output or gradient differs by more than `TOLERANCE`.
    """
    small, ours = case.small(), peer is None
    values = small.values(dtype, device)
    exact = {key: value.double() for key, value in values.items()}
    bind = peer or small.bind
    used, _ = describe_backends(used_backends(bind(values).call))
    cotangent = _cotangent(bind(values))
    with use_backend("reference"):
        want = _results(small.bind(exact), cotangent, gradients=ours)
    have = _results(bind(values), cotangent, gradients=ours)
    _compare(name, have, want, TOLERANCE[dtype], "the reference operator's")
    if not ours or used in ("chunked", "reference"):
        return
    one = replace(case, batch=1)
    values = one.values(dtype, device)
    cotangent = _cotangent(one.bind(values))
    with use_backend("chunked"):
        want = _results(one.bind(values), cotangent, gradients=True)
    have = _results(one.bind(values), cotangent, gradients=True)
    # both sides may be off by the bound
    _compare(name, have, want, 2 * TOLERANCE[dtype], "the chunked operator's at full size")


def _cotangent(bound: Bound) -> Tensor:
    with torch.no_grad():
        return torch.randn_like(bound.call())


@dataclass
class OperatorMeasurement:
    """Timing of one implementation of one operator. Times are seconds per call, sizes bytes.

    Attributes:
        case, about, shape, batch, dtype: what ran on what.
        implementation: "vision_ssm", or the peer.
        backend, reason: what ran inside, and why nothing faster.
        input_sets: sets of inputs that took turns, so that none was found in the cache.
        times: `Timing` by name: "forward" without gradients, "forward+backward", and "backward" of a kept forward pass.
        peak_memory: bytes allocated at most during one call (the longest one timed), beside its inputs; None on a CPU.
        floor_bytes: bytes that must move at least, by the same names: inputs read and outputs written once each.
        bandwidth: floor bytes per second, by the same names.
        copy_share: that over the bandwidth of a large copy in the same run.
        exponentials: of one forward pass.
        note: why there are no times; "" if there are.
    """

    case: str
    about: str
    shape: str
    batch: int
    dtype: str
    implementation: str
    backend: str
    reason: str
    input_sets: int
    times: dict[str, Timing]
    peak_memory: int | None
    floor_bytes: dict[str, int]
    bandwidth: dict[str, float]
    copy_share: dict[str, float]
    exponentials: int
    note: str = ""


def floor_bytes(bound: Bound) -> dict[str, int]:
    """Bytes that no implementation of this signature avoids: each tensor read or written once.

    A backward pass reads the inputs and the gradient of the output and writes the gradients of the inputs.
    """
    inputs = sum(leaf.nbytes for leaf in bound.leaves.values())
    with torch.no_grad():
        output = bound.call().nbytes
    return {"forward": inputs + output, "forward+backward": 3 * inputs + 2 * output, "backward": 2 * inputs + output}


def _steps(sets: Sequence[Bound], backward: bool, around: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Steps by name; each goes through all sets of inputs. `around` gives the context that everything runs in.

    Results are kept until the end of a pass: the next set's must not go to the memory, and the cache, of the last's.
    """
    cotangents: list[Tensor] = []
    kept: list[Tensor] = []

    def once(store: list[Tensor], make: Callable[[Bound], Tensor]) -> list[Tensor]:
        if not store:
            store.extend(make(bound) for bound in sets)
        return store

    def forward() -> list[Tensor]:
        with around(), torch.no_grad():
            return [bound.call() for bound in sets]

    def both() -> list[tuple[Tensor, ...]]:
        with around():
            gradients = once(cotangents, _cotangent)
            return [
                torch.autograd.grad(bound.call(), list(bound.leaves.values()), gradient)
                for bound, gradient in zip(sets, gradients)
            ]

    def alone() -> list[tuple[Tensor, ...]]:
        with around():
            gradients = once(cotangents, _cotangent)
            outputs = once(kept, lambda bound: bound.call())
            return [
                torch.autograd.grad(output, list(bound.leaves.values()), gradient, retain_graph=True)
                for bound, output, gradient in zip(sets, outputs, gradients)
            ]

    return dict(zip(QUANTITIES, (forward, both, alone))) if backward else {"forward": forward}


def input_sets(bound: Bound, device: torch.device) -> int:
    """How many sets of inputs like these must take turns so that none is found in the L2 cache; 1 on a CPU."""
    size = sum(leaf.nbytes for leaf in bound.leaves.values())
    return min(max(1, math.ceil(_CACHE_MULTIPLE * second_level_cache(device) / size)), _MOST_INPUT_SETS)


@dataclass
class _Contender:
    binding: Callable[[dict[str, Tensor]], Bound] | None  # None: the operator of ours
    around: Callable[[], Any]
    backend: str = "-"
    reason: str = ""
    note: str = ""
    peak: int | None = None
    steps: dict[str, Callable[[], Any]] = field(default_factory=dict)


def find_peers(case: OperatorCase, peers: Sequence[str]) -> tuple[dict[str, Callable | None], list[str]]:
    """Those of `peers` that can run `case`, as functions (None for backends of ours), and the others as remarks."""
    found: dict[str, Callable | None] = {}
    missing = []
    for peer in peers:
        if peer == "chunked":
            found[peer] = None
        elif isinstance(case, SelectiveScanCase):
            try:
                module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
            except ImportError:
                missing.append(f"{peer} is not installed")
            else:
                found[peer] = module.selective_scan_fn
    return found, missing


@dataclass(frozen=True)
class OperatorSettings:
    """How operators are timed.

    Attributes:
        dtype: of the activations; parameters are float32.
        device: where to run.
        backward: also time forward and backward together, and the backward pass alone.
        repeats: samples, after warm-up.
        warmup: passes over all sets of inputs before.
        graph: replay CUDA graphs, so that launches from Python do not count.
        peers: of `PEERS`; those that do not apply or are not installed are left out.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    backward: bool = False
    repeats: int = 20
    warmup: int = WARMUP
    graph: bool = False
    peers: Sequence[str] = ()


def benchmark_operator(
    name: str, case: OperatorCase, settings: OperatorSettings, *, copy: float | None = None, check: bool = True
) -> list[OperatorMeasurement]:
    """Check and time one operator, and its peers in turns with it.

    Args:
        name: name of the case in the result.
        case: operator and shape.
        settings: how to time it.
        copy: bytes per second of a large copy, measured now if not given.
        check: compare with the twin first.

    Returns:
        One row per implementation, ours first. What ran out of memory, and a peer that computes something else, has a
        note instead of times.

    Raises:
        BenchmarkError: the operator computes something else than its twin, or CUDA graphs are asked for without a GPU.
    """
    dtype, device = settings.dtype, settings.device
    if settings.graph and device.type != "cuda":
        raise BenchmarkError(f"CUDA graphs need a CUDA device, not {device}")
    with on_device(device):
        if check:
            check_operator(name, case, dtype, device)
        contenders = {"vision_ssm": _Contender(None, nullcontext)}
        for peer, function in find_peers(case, settings.peers)[0].items():
            if function is None:
                contenders[peer] = _Contender(None, partial(use_backend, peer))
                continue
            assert isinstance(case, SelectiveScanCase)
            contenders[peer] = _Contender(partial(case.bind_to, function), nullcontext)
            try:
                check_operator(peer, case, dtype, device, contenders[peer].binding)
            except BenchmarkError as error:
                contenders[peer].note = str(error)
        return _time_contenders(name, case, contenders, settings, copy or copy_bandwidth(device))


def _time_contenders(
    name: str, case: OperatorCase, contenders: dict[str, _Contender], settings: OperatorSettings, copy: float
) -> list[OperatorMeasurement]:
    device, backward = settings.device, settings.backward
    release_memory(device)
    values: list[dict[str, Tensor]] = []
    floors: dict[str, int] = {}

    def make_inputs() -> None:
        values.append(case.values(settings.dtype, device))
        first = case.bind(values[0])
        floors.update(floor_bytes(first))
        values.extend(case.values(settings.dtype, device) for _ in range(input_sets(first, device) - 1))

    def prepare(contender: _Contender) -> None:
        bind = contender.binding or case.bind
        sets = [bind(inputs) for inputs in values]
        with contender.around():
            contender.backend, contender.reason = describe_backends(used_backends(sets[0].call))
        longest = _steps(sets[:1], backward, contender.around)["forward+backward" if backward else "forward"]
        longest()  # makes what it keeps
        contender.peak = peak_memory(longest, device, allocated(device))
        contender.steps = _steps(sets, backward, contender.around)
        if settings.graph:
            contender.steps = {key: GraphedStep(step, device) for key, step in contender.steps.items()}
        for step in contender.steps.values():
            for _ in range(settings.warmup):
                step()
        synchronize(device)

    fits = fits_in_memory(make_inputs, device)
    for contender in contenders.values():
        if contender.note:
            continue
        try:
            if not (fits and fits_in_memory(partial(prepare, contender), device)):
                contender.note = "out of memory"
        except RecordingError as error:
            contender.note = str(error)
        if contender.note:
            contender.steps = {}
    turns = {
        (label, quantity): step for label, contender in contenders.items() for quantity, step in contender.steps.items()
    }
    timings = time_in_turns(turns, device, settings.repeats, SHORTEST_SAMPLE if device.type == "cuda" else 0.0)
    rows = []
    for label, contender in contenders.items():
        timed = {quantity: timings[label, quantity] for quantity in contender.steps if (label, quantity) in timings}
        if len(timed) < len(contender.steps):
            contender.note = "out of memory"
        rows.append(_measurement(name, case, settings, label, contender, len(values), timed, floors, copy))
    return rows


def _measurement(
    name: str,
    case: OperatorCase,
    settings: OperatorSettings,
    label: str,
    contender: _Contender,
    sets: int,
    timed: dict[str, Timing],
    floors: dict[str, int],
    copy: float,
) -> OperatorMeasurement:
    # what was timed is a pass over all sets
    times = {key: Timing(time.median / sets, time.lower / sets, time.upper / sets) for key, time in timed.items()}
    bandwidth = {key: floors[key] / time.median for key, time in times.items()}
    return OperatorMeasurement(
        case=name,
        about=case.about,
        shape=case.shape,
        batch=case.batch,
        dtype=str(settings.dtype).removeprefix("torch."),
        implementation=label,
        backend=contender.backend,
        reason=contender.reason,
        input_sets=sets,
        times=times,
        peak_memory=contender.peak,
        floor_bytes=floors,
        bandwidth=bandwidth,
        copy_share={key: value / copy for key, value in bandwidth.items()},
        exponentials=case.exponentials(),
        note=contender.note,
    )

"""Inputs, error metric and tolerances for the tests of the operators."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vision_ssm.ops import scan_2d, selective_scan, ssd
from vision_ssm.ops.reference import scan_2d_reference, selective_scan_reference, ssd_reference
from vision_ssm.ops.workspace import release_scratch

# Relative RMS error of every output and gradient against the twin. The only tolerances of operator tests.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "selective_scan": (selective_scan, selective_scan_reference),
    "scan_2d": (scan_2d, scan_2d_reference),
    "ssd": (ssd, ssd_reference),
}
# Parameters that models keep in float32 whatever the activations are.
PARAMETERS = {"A", "D", "delta_bias", "dt_bias", "dt_weight", "initial_states", "norm_weight", "norm_bias"}
PARAMETERS |= {"weight", "bias", "kernels", "alpha"}


def fresh_seed() -> int:
    """Seed the inputs of a test: 0, another number from OPS_TEST_SEED, or the system's for OPS_TEST_SEED=random.

    The seed is printed, so that a failure can be repeated.
    """
    given = os.environ.get("OPS_TEST_SEED", "0")
    seed = int.from_bytes(os.urandom(4), "little") if given == "random" else int(given)
    torch.manual_seed(seed)
    print(f"OPS_TEST_SEED={seed}")
    return seed


def selective_scan_inputs(
    batch: int = 2,
    dim: int = 24,
    length: int = 19,
    states: int = 3,
    groups: int | None = None,
    constant: str = "",
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    last_state: bool = True,
) -> dict[str, Any]:
    """Keyword arguments of `selective_scan`; `constant` lists which of B and C do not change over time."""
    delta = torch.randn(batch, dim, length)
    inputs = {
        "u": torch.randn(batch, dim, length),
        "delta": delta if softplus else delta.abs() / 2,
        "A": -0.1 - torch.rand(dim, states),
        "delta_softplus": softplus,
        "return_last_state": last_state,
    }
    for name in "BC":
        shape = (batch, states, length) if groups is None else (batch, groups, states, length)
        inputs[name] = torch.randn((dim, states) if name in constant else shape)
    if skip:
        inputs["D"] = torch.randn(dim)
    if gate:
        inputs["z"] = torch.randn(batch, dim, length)
    if bias:
        inputs["delta_bias"] = torch.randn(dim) - 1
    return inputs


def scan_2d_inputs(
    batch: int = 2,
    size: tuple[int, int] = (4, 5),
    dim: int = 24,
    states: int = 3,
    rank: int | None = 2,
    routes: str = "cross",
    steps: int | None = None,
    write: bool = False,
    segment: int | None = None,
    skip: bool = True,
    bias: bool = True,
    softplus: bool = True,
    norm: bool = False,
    per_route: bool = False,
    merge: bool = True,
) -> dict[str, Any]:
    """Keyword arguments of `scan_2d`.

    Rank None gives full step sizes, `steps` truncates the routes, `per_route` gives each route a map of its own.
    """
    length = size[0] * size[1]
    cells = torch.arange(length).view(size)
    if routes == "cross":
        tables = [cells.flatten(), cells.t().flatten()]
        read = torch.stack(tables + [table.flip(0) for table in tables])
    else:
        read = torch.randint(0, length, (int(routes), length))  # some positions twice, some never
    read = read[:, :steps].contiguous()
    count = read.shape[0]
    inputs = {
        "x": torch.randn(batch, length, count, dim) if per_route else torch.randn(batch, length, dim),
        "delta": torch.randn(batch, length, count, dim if rank is None else rank),
        "A": -0.1 - torch.rand(count, dim, states),
        "B": torch.randn(batch, length, count, states),
        "C": torch.randn(batch, length, count, states),
        "read": read,
        "segment": segment,
        "merge": merge,
    }
    if norm:
        inputs["norm_weight"], inputs["norm_bias"] = torch.randn(dim), torch.randn(dim)
    if rank is not None:
        inputs["dt_weight"] = torch.randn(count, dim, rank) / rank
    if write:
        inputs["write"] = torch.stack([torch.randperm(length)[: read.shape[1]] for _ in range(count)])
    if skip:
        inputs["D"] = torch.randn(count, dim)
    if bias:
        inputs["dt_bias"] = torch.randn(count, dim) - 1
    if not softplus:
        inputs["delta_softplus"] = False
        for name in {"delta", "dt_weight", "dt_bias"} & inputs.keys():  # step sizes are positive
            inputs[name] = inputs[name].abs() / 2
    return inputs


def pack_projections(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of `scan_2d` with delta, B and C in one tensor "packed", as the projection of a model gives them."""
    parts = [inputs[name] for name in ("delta", "B", "C")]
    others = {name: value for name, value in inputs.items() if name not in ("delta", "B", "C")}
    return others | {"packed": torch.cat(parts, dim=-1)}


def unpacked(operator: Callable) -> Callable:
    """`operator` of what `pack_projections` gives: it is called with views of the packed tensor."""

    def of_views(packed: Tensor, **others: Any) -> Tensor:
        rank, states = others["dt_weight"].shape[2], others["A"].shape[2]
        delta, B, C = packed.split([rank, states, states], dim=-1)
        return operator(delta=delta, B=B, C=C, **others)

    return of_views


def ssd_inputs(
    batch: int = 2,
    length: int = 21,
    groups: int = 2,
    heads: int = 6,
    width: int = 5,
    states: int = 7,
    chunk_size: int = 8,
    skip: str | None = "channel",
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = True,
    final: bool = True,
) -> dict[str, Any]:
    """Keyword arguments of `ssd`."""
    dt = torch.randn(batch, length, heads)
    inputs = {
        "x": torch.randn(batch, length, heads, width),
        "dt": dt if softplus else dt.abs() / 2,
        "A": -0.1 - torch.rand(heads),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
        "dt_softplus": softplus,
        "chunk_size": chunk_size,
        "return_final_states": final,
    }
    if skip is not None:
        inputs["D"] = torch.randn(heads, width) if skip == "channel" else torch.randn(heads)
    if gate:
        inputs["z"] = torch.randn(batch, length, heads, width)
    if bias:
        inputs["dt_bias"] = torch.randn(heads) - 1
    if initial:
        inputs["initial_states"] = torch.randn(batch, heads, width, states)
    return inputs


INPUTS: dict[str, Callable[..., dict[str, Any]]] = {
    "selective_scan": selective_scan_inputs,
    "scan_2d": scan_2d_inputs,
    "ssd": ssd_inputs,
}


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Activations in `dtype`; parameters too, but in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: value.to(wide if name in PARAMETERS else dtype) if is_float(value) else value
        for name, value in inputs.items()
    }


def run(operator: Callable, inputs: dict[str, Any], cotangents: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name. `cotangents`, one per output, are all ones if not given."""
    leaves = {
        name: value.detach().clone().requires_grad_() if is_float(value) else value for name, value in inputs.items()
    }
    outputs = operator(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        cotangents = [torch.ones_like(output) for output in outputs]
    torch.autograd.backward(outputs, [grad.to(out.dtype) for grad, out in zip(cotangents, outputs, strict=True)])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if is_float(leaf)}


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """`got` is finite and its RMS error is below `tolerance` times the RMS of `want`.

    What underflows in float32 counts as 0.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(want).all(), f"{name}: the reference is not finite"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    got, want = got.double(), want.double()
    scale, tiny = want.abs().max(), torch.finfo(torch.float32).tiny
    if scale < tiny:
        assert got.abs().max() < tiny, f"{name}: {float(got.abs().max()):.2e} where the reference is 0"
        return
    # divided by the largest value, so that the squares of very large ones stay finite
    error, size = ((got - want) / scale).square().mean().sqrt(), (want / scale).square().mean().sqrt()
    assert error <= tolerance * size, f"{name}: relative RMS error {float(error / size):.2e} exceeds {tolerance:.0e}"


def compare(name: str, operator: Callable, twin: Callable, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs and all gradients of `operator` in `dtype` against those of `twin` in float64 on the same values."""
    inputs = cast(inputs, dtype)
    exact = {key: value.double() if is_float(value) else value for key, value in inputs.items()}
    with torch.no_grad():
        outputs = twin(**exact)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(output).to(dtype) for output in outputs]
    want = run(twin, exact, cotangents)
    got = run(operator, inputs, cotangents)
    assert got.keys() == want.keys()
    for key, value in want.items():
        check(f"{name} {key}", got[key], value, TOLERANCE[dtype])
    for key, value in inputs.items():
        if is_float(value):
            assert got[f"gradient of {key}"].dtype == value.dtype


def compare_with_twin(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """An operator in `dtype` against its twin in float64; `inputs` may come from `pack_projections`."""
    operator, twin = OPERATORS[op]
    if "packed" in inputs:
        operator, twin = unpacked(operator), unpacked(twin)
    compare(op, operator, twin, inputs, dtype)


class Poison:
    """Fills with NaN what the package takes as uninitialised memory, so that reading it shows."""

    def __init__(self, monkeypatch: Any):
        self.count = 0
        release_scratch()
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable) -> Callable:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("vision_ssm.ops", "vision_ssm.kernels")) and result.is_floating_point():
                self.count += 1
                result.fill_(torch.nan)
            return result

        return poisoned

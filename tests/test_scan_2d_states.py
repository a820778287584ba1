"""Gradients of `scan_2d` with several states per channel: Triton kernels, interpreted, against the twin in float64."""

import pytest
import torch
from ops_support import cast, compare_with_twin, fresh_seed, run, scan_2d_inputs, selective_scan_inputs

from vision_ssm.ops import scan_2d

SMALL = {"batch": 1, "size": (3, 3), "dim": 7, "routes": "2"}

CASES = {
    "two states": SMALL | {"states": 2},
    "whole step sizes": SMALL | {"rank": None},
    "more channels than a block": SMALL | {"routes": "1", "dim": 40, "states": 16},
    "two images, four routes": SMALL | {"batch": 2, "size": (2, 3), "routes": "cross"},
    "several chunks": SMALL | {"size": (7, 10), "routes": "1"},
    "several chunks, whole step sizes": SMALL | {"size": (7, 10), "routes": "1", "rank": None},
    "whole tiles": SMALL | {"size": (4, 8), "routes": "1"},
    "one step": SMALL | {"size": (1, 1)},
    "part of the map": SMALL | {"steps": 5},
    "other places to write": SMALL | {"write": True},
    "segments": SMALL | {"size": (4, 5), "routes": "1", "segment": 10},
    "map per route": SMALL | {"per_route": True},
    "map per route, not merged": SMALL | {"per_route": True, "merge": False},
    "no skip, no bias": SMALL | {"skip": False, "bias": False},
}


@pytest.fixture(autouse=True)
def _kernels(interpreter, monkeypatch):
    monkeypatch.setenv("VISION_SSM_BACKEND", "triton")
    fresh_seed()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_twin(case):
    compare_with_twin("scan_2d", scan_2d_inputs(**CASES[case]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("states", [3, 16])
def test_half_precision(states, rank, dtype):
    compare_with_twin("scan_2d", scan_2d_inputs(**SMALL | {"states": states, "rank": rank}), dtype)


@pytest.mark.parametrize("states", [24, 64])
def test_many_states(states):
    compare_with_twin("scan_2d", scan_2d_inputs(**SMALL | {"states": states, "routes": "1"}), torch.float32)


def test_step_sizes_without_softplus():
    inputs = scan_2d_inputs(**SMALL | {"rank": None, "bias": False})
    inputs |= {"delta": inputs["delta"].abs() / 2, "delta_softplus": False}
    compare_with_twin("scan_2d", inputs, torch.float32)


@pytest.mark.parametrize("length", [16, 19])
def test_gradient_of_the_last_state(length):
    compare_with_twin("selective_scan", selective_scan_inputs(batch=1, dim=7, length=length), torch.float32)


def test_projections_in_one_tensor():
    inputs = scan_2d_inputs(**SMALL)
    names = ("delta", "B", "C")
    packed = torch.cat([inputs[name] for name in names], dim=-1)
    parts = packed.requires_grad_().split([inputs[name].shape[-1] for name in names], dim=-1)
    scan_2d(**inputs | dict(zip(names, parts, strict=True))).square().sum().backward()
    leaves = [inputs[name].requires_grad_() for name in names]
    scan_2d(**inputs).square().sum().backward()
    torch.testing.assert_close(packed.grad, torch.cat([leaf.grad for leaf in leaves], dim=-1))


@pytest.mark.parametrize("rank", [None, 2])
def test_two_runs_are_equal_bit_for_bit(rank):
    inputs = cast(scan_2d_inputs(**SMALL | {"rank": rank, "size": (4, 5)}), torch.bfloat16)
    first, second = run(scan_2d, inputs), run(scan_2d, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

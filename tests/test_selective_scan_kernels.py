"""The Triton kernels of `selective_scan`, in Triton's interpreter, against the twin."""

import pytest
import torch
from ops_support import (
    OPERATORS,
    Poison,
    cast,
    compare_with_twin,
    fresh_seed,
    is_float,
    run,
    selective_scan_inputs,
)
from vision_ssm.kernels import selective_scan as kernels

from vision_ssm.ops import select_backend, selective_scan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "one state": dict(states=1),
    "one state, whole tiles": dict(states=1, length=32),
    "one step": dict(states=1, length=1, batch=3),
    "two steps, 3 states": dict(states=3, length=2, batch=3),
    "3 states": dict(states=3),
    "16 states, several chunks": dict(states=16, length=70, batch=1, dim=7),
    "groups": dict(states=1, groups=3, length=33),
    "groups, 3 states": dict(states=3, groups=4),
    "more channels than lanes": dict(states=1, dim=40, length=17, batch=1),
    "constant B, groups of C": dict(states=2, dim=4, constant="B", groups=2, batch=1),
    "no gate, no last state": dict(states=1, gate=False, last_state=False),
    "bare": dict(states=2, skip=False, gate=False, bias=False, softplus=False, last_state=False),
}


@pytest.fixture(autouse=True)
def _kernels(interpreter):
    fresh_seed()
    assert select_backend(torch.zeros(1), "selective_scan") == ("triton", "")


def identify(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_twin(options):
    compare_with_twin("selective_scan", selective_scan_inputs(**options), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("states", [1, 3])
def test_twin_in_half_precision(states, dtype):
    compare_with_twin("selective_scan", selective_scan_inputs(states=states), dtype)


@pytest.mark.parametrize(
    "forward, backward",
    [
        (kernels._Cut(own=2, tile=16, warps=1), kernels._Cut(own=2, tile=8, warps=4)),
        (kernels._Cut(own=4, tile=32, warps=2), kernels._Cut(own=4, tile=8, warps=1)),
    ],
    ids=["2 states per lane", "4 states per lane"],
)
@pytest.mark.parametrize("states", [3, 16])
def test_every_cut(monkeypatch, forward, backward, states):
    """However states are shared among lanes, and steps among tiles."""
    monkeypatch.setattr(kernels, "_forward_cut", lambda *_: forward)
    monkeypatch.setattr(kernels, "_backward_cut", lambda *_: backward)
    compare_with_twin("selective_scan", selective_scan_inputs(states=states, length=45, dim=6), torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        dict(states=1),
        dict(states=5, batch=1),
        dict(states=2, groups=2, gate=False, dim=4, batch=1),
        dict(states=2, softplus=False, bias=False, batch=1),
        dict(states=1, length=64),  # whole tiles
    ],
    ids=str,
)
def test_stretches(monkeypatch, options):
    """A few long sequences are scanned in stretches at once."""
    monkeypatch.setattr(kernels, "_SHORTEST_STRETCH", 32)
    stretches = []
    entering = kernels._Call.entering
    monkeypatch.setattr(
        kernels._Call, "entering", lambda call, *args: stretches.append(call.stretches) or entering(call, *args)
    )
    compare_with_twin("selective_scan", selective_scan_inputs(**{"length": 71, **options}), torch.float32)
    assert len(stretches) == 2 and min(stretches) > 1  # forward and backward


@pytest.mark.parametrize("length", [1, 16, 17, 31, 33, 64])
def test_one_state_is_kept_within_tiles(length):
    """Forward takes more steps at a time than lie between the states that it keeps."""
    assert kernels._forward_cut(1, torch.bfloat16).tile > kernels._chunk(1)
    compare_with_twin("selective_scan", selective_scan_inputs(states=1, length=length), torch.bfloat16)


@pytest.mark.parametrize("scale", [dict(delta=1e4), dict(delta=-1e4), dict(u=1e15)], ids=str)
@pytest.mark.parametrize("states", [1, 3])
def test_large_values(states, scale):
    """Step sizes and inputs as large as they come: finite, and as exact as ever."""
    inputs = selective_scan_inputs(states=states, gate=False)
    for name, factor in scale.items():
        inputs[name] = inputs[name].abs() * factor
    compare_with_twin("selective_scan", inputs, torch.float32)


def test_no_uninitialised_memory_is_read(monkeypatch):
    poison = Poison(monkeypatch)
    compare_with_twin("selective_scan", selective_scan_inputs(states=1, length=21), torch.float32)
    assert poison.count > 0


def test_repetition_is_bit_equal():
    inputs = cast(selective_scan_inputs(batch=1, states=2, length=35), torch.bfloat16)
    first, second = run(selective_scan, inputs), run(selective_scan, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_strided_inputs():
    """Halves of a larger projection, as a gated block gives them, and sequences that lie channels last in memory."""
    inputs = selective_scan_inputs(states=1)
    both = torch.cat([inputs["u"], inputs["z"]], dim=1)
    strided = inputs | dict(zip("uz", both.chunk(2, dim=1))) | {"delta": inputs["delta"].mT.contiguous().mT}
    got, want = run(selective_scan, inputs), selective_scan(**strided)
    assert torch.equal(want[0], got["output 0"]) and torch.equal(want[1], got["output 1"])


def test_gradient_of_one_output():
    """The other output of the operator may go unused."""
    inputs = selective_scan_inputs(states=1, gate=False)
    leaves = {name: value.requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    for index in (0, 1):
        got, want = (torch.autograd.grad(f(**leaves)[index].sum(), leaves["u"])[0] for f in OPERATORS["selective_scan"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_images():
    got, want = (run(operator, selective_scan_inputs(batch=0, states=1)) for operator in OPERATORS["selective_scan"])
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_nothing_is_kept_without_gradients():
    inputs = selective_scan_inputs(states=1)
    with torch.no_grad():
        kept = torch.ops.vision_ssm.selective_scan(
            *(inputs[name] for name in ("u", "delta", "A")), inputs["B"][:, None], inputs["C"][:, None],
            inputs["D"], inputs["z"], inputs["delta_bias"], True, False,
        )[2:]  # fmt: skip
    assert all(tensor.numel() == 0 for tensor in kept)

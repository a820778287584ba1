"""The Triton kernels of `ssd`, in Triton's interpreter, against the twin."""

import pytest
import torch
from ops_support import OPERATORS, Poison, cast, compare_with_twin, fresh_seed, is_float, run, ssd_inputs
from vision_ssm.kernels import ssd as kernels

from vision_ssm.ops import select_backend, ssd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "several chunks": dict(length=75),
    "whole chunks": dict(length=32),
    "one step": dict(length=1, batch=4),
    "two steps": dict(length=2, batch=4),
    "one group": dict(groups=1),
    "groups of two heads": dict(heads=4, batch=2),
    "many states": dict(states=17, width=3),
    "skip per head": dict(skip="head"),
    "no initial states": dict(initial=False),
    "no softplus": dict(softplus=False, bias=False),
    "bare": dict(skip=None, gate=False, bias=False, softplus=False, initial=False, final=False),
}


@pytest.fixture(autouse=True)
def _kernels(interpreter):
    fresh_seed()
    assert select_backend(torch.zeros(1), "ssd") == ("triton", "")


@pytest.fixture
def one_stretch(monkeypatch):
    """As if there were sequences enough."""
    monkeypatch.setattr(kernels, "_FEW_PROGRAMS", 0)


def small(**options):
    """`ssd_inputs` of few sequences: each is a program of its own, which takes long in the interpreter."""
    return ssd_inputs(**dict(batch=1, heads=2) | options)


def identify(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_twin(options, one_stretch):
    compare_with_twin("ssd", small(**options), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=identify)
@pytest.mark.parametrize("length", [21, 40])
def test_twin_in_half_precision(dtype, length, one_stretch):
    """Enough heads that not all of their sums over time can come out close to 0 at once."""
    compare_with_twin("ssd", small(length=length, heads=8), dtype)


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 2), (torch.bfloat16, 8), (torch.float16, 8)], ids=identify)
def test_stretches(dtype, heads, monkeypatch):
    """A few long sequences are scanned in stretches at once."""
    monkeypatch.setattr(kernels, "_FEW_PROGRAMS", heads + 1)
    stretches, entering = [], kernels._Call.entering

    def watched(call, *args, **options):
        stretches.append((call.stretches, call.span))
        return entering(call, *args, **options)

    monkeypatch.setattr(kernels._Call, "entering", watched)
    compare_with_twin("ssd", small(length=75, heads=heads, groups=1), dtype)
    assert len(stretches) == 3 and min(stretches)[0] > 1  # forward, and both ways in backward


def test_blocks_of_channels(one_stretch):
    """A head that is wider than a program's tile."""
    compare_with_twin("ssd", small(width=70, heads=2, groups=1, length=40), torch.float32)


@pytest.mark.parametrize(
    "scale", [dict(dt=1e4), dict(dt=-1e4), dict(x=1e15)], ids=lambda scale: str(*scale.items())
)
def test_large_values(scale):
    """Step sizes and inputs as large as they come: finite, and as exact as ever."""
    inputs = small(length=40, gate=False)
    for name, factor in scale.items():
        inputs[name] = inputs[name].abs() * factor
    compare_with_twin("ssd", inputs, torch.float32)


def test_one_large_step(one_stretch):
    """After a step that forgets everything, the small decays that follow keep their precision."""
    inputs = small()
    inputs["dt"][:, 10] = 1e6
    compare_with_twin("ssd", inputs, torch.float32)


def test_growing_states():
    inputs = small(length=60)
    inputs["A"] = inputs["A"].abs() / 10
    compare_with_twin("ssd", inputs, torch.float32)


def test_no_uninitialised_memory_is_read(monkeypatch):
    poison = Poison(monkeypatch)
    compare_with_twin("ssd", small(length=70), torch.float32)
    assert poison.count > 0


def test_repetition_is_bit_equal():
    inputs = cast(small(length=70), torch.bfloat16)
    first, second = run(ssd, inputs), run(ssd, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_strided_inputs():
    """Parts of one projection, as a model gives them."""
    inputs = small(gate=False, groups=1, width=4, heads=3, states=6)
    names = ("x", "dt", "B", "C")
    packed = torch.cat([inputs[name].flatten(2) for name in names], dim=-1)
    parts = packed.split([inputs[name][0, 0].numel() for name in names], dim=-1)
    strided = inputs | {name: part.view(inputs[name].shape) for name, part in zip(names, parts)}
    got, want = ssd(**strided), run(ssd, inputs)
    assert torch.equal(got[0], want["output 0"]) and torch.equal(got[1], want["output 1"])
    turned = inputs | {"x": inputs["x"].mT.contiguous().mT}
    assert torch.equal(ssd(**turned)[0], want["output 0"])


def test_mixed_dtypes():
    """One input of full precision keeps that of the products."""
    inputs = small(gate=False)
    inputs["x"] = inputs["x"].bfloat16()
    got, want = (operator(**inputs)[1] for operator in OPERATORS["ssd"])  # final states, in float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_output():
    """The other output of the operator may go unused."""
    inputs = small(gate=False)
    leaves = {name: value.requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    for index in (0, 1):
        got, want = (torch.autograd.grad(f(**leaves)[index].sum(), leaves["x"])[0] for f in OPERATORS["ssd"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_images():
    got, want = (run(operator, small(batch=0)) for operator in OPERATORS["ssd"])
    for name, value in want.items():
        assert torch.equal(got[name], value), name

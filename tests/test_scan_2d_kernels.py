"""The Triton kernels of `scan_2d`, in Triton's interpreter: outputs and gradients against the twin, and what is kept.

With one state per channel; test_scan_2d_states.py has more states, test_gpu_kernels.py real sizes on a GPU.
"""

import pytest
import torch
from ops_support import (
    OPERATORS,
    TOLERANCE,
    Poison,
    cast,
    check,
    compare_with_twin,
    fresh_seed,
    is_float,
    pack_projections,
    run,
    scan_2d_inputs,
    unpacked,
)

import vision_ssm
from vision_ssm import kernels
from vision_ssm.ops import scan_2d, select_backend
from vision_ssm.ops.reference import scan_2d_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter; kernels mean infinity
HALVES = (torch.bfloat16, torch.float16)
SCHEMA = [
    *("x", "delta", "A", "B", "C", "D", "read", "write", "dt_weight", "dt_bias", "norm_weight", "norm_bias"),
    *("norm_eps", "delta_softplus", "segment", "merge", "save"),
]


@pytest.fixture(autouse=True)
def _kernels_on_fresh_inputs(interpreter, monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    assert select_backend(torch.zeros(1), "scan_2d").name == "triton"
    fresh_seed()


def identify(value):
    return str(value).removeprefix("torch.")


def small(**options):
    """Inputs with one image, a random route that visits some positions twice and some never, and one state."""
    return scan_2d_inputs(**dict(batch=1, routes="1", states=1, size=(3, 6)) | options)


def schema_arguments(inputs, save):
    """Inputs in the order of the operator's schema."""
    defaults = {"delta_softplus": True, "norm_eps": 1e-5, "merge": True, "save": save}
    return [(defaults | inputs).get(name) for name in SCHEMA]


# Shapes and options. A program walks tiles of 16 steps for 32 or 64 channels.
CASES = {
    "one position": dict(size=(1, 1), batch=4),
    "two positions": dict(size=(1, 2), batch=4, dim=7),
    "odd grid": dict(size=(7, 9), dim=7, rank=1, routes="cross"),
    "two images, two routes": dict(batch=2, dim=5, size=(3, 3), routes="2"),
    "whole tiles": dict(size=(4, 4), routes="cross", dim=8),
    "one whole block of channels": dict(dim=32),
    "a block and a part": dict(dim=40, rank=6),
    "64 channels": dict(dim=64),
    "rank 17": dict(rank=17, dim=9),
    "full step sizes": dict(rank=None, routes="2", size=(3, 5)),
    "full step sizes, no bias, 40 channels": dict(rank=None, bias=False, dim=40),
    "full step sizes, no softplus": dict(rank=None, softplus=False),
    "no softplus": dict(softplus=False),
    "no bias, no skip": dict(bias=False, skip=False),
    "part of the map": dict(routes="cross", steps=7, dim=7),
    "part of the map, whole tile": dict(routes="cross", steps=16, dim=7),
    "written elsewhere": dict(write=True),
    "written elsewhere, whole tile": dict(write=True, size=(4, 4), routes="2"),
    "written elsewhere, part": dict(write=True, steps=9, routes="2"),
    "three routes": dict(routes="3", size=(3, 4), dim=7),
    "segments": dict(segment=5, size=(2, 5), dim=7, routes="2"),
    "segments of whole tiles": dict(segment=16, size=(4, 8), dim=7),
    "segments, written elsewhere": dict(segment=4, write=True, steps=12, dim=7),
    "map per route": dict(per_route=True, size=(3, 5), routes="2"),
    "map per route, full step sizes, segments": dict(per_route=True, rank=None, size=(2, 5), segment=5, routes="2"),
    "map per route, written elsewhere, whole tile": dict(per_route=True, write=True, size=(4, 4), routes="2"),
    "routes apart": dict(merge=False, size=(3, 5), routes="2"),
    "routes apart, part, written elsewhere": dict(merge=False, write=True, steps=9, routes="2"),
    "map per route, routes apart": dict(merge=False, per_route=True, size=(4, 4), routes="2"),
    "norm": dict(norm=True),
    "norm, 40 channels": dict(norm=True, dim=40),
    "norm, part, written elsewhere": dict(norm=True, write=True, steps=9, routes="2"),
    "norm, map per route, routes apart": dict(norm=True, per_route=True, merge=False, size=(3, 5), routes="2"),
    "norm, segments, routes apart": dict(norm=True, size=(2, 5), segment=5, merge=False, routes="2"),
}
IN_HALF_PRECISION = [
    *("two images, two routes", "whole tiles", "a block and a part", "full step sizes", "no softplus"),
    *("no bias, no skip", "written elsewhere, part", "map per route", "norm", "norm, segments, routes apart"),
]


@pytest.mark.parametrize("case", CASES)
def test_twin(case):
    compare_with_twin("scan_2d", small(**CASES[case]), torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=identify)
@pytest.mark.parametrize("case", IN_HALF_PRECISION)
def test_twin_in_half_precision(case, dtype):
    compare_with_twin("scan_2d", small(**CASES[case]), dtype)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(size=(4, 4), routes="2", batch=2, norm=True),
        dict(segment=5, size=(2, 5), routes="2", batch=1),
        dict(write=True, steps=9, routes="2"),
        dict(per_route=True, size=(3, 5), routes="2"),
    ],
    ids=str,
)
def test_high_rank_in_half_precision(monkeypatch, options):
    """Gradients of low-rank step sizes are matrix products over all images then."""
    products = []
    contract = kernels.scan_2d._contract
    monkeypatch.setattr(kernels.scan_2d, "_contract", lambda *args: products.append(1) or contract(*args))
    inputs = small(**dict(rank=18, dim=40) | options)
    compare_with_twin("scan_2d", inputs, torch.bfloat16)
    compare_with_twin("scan_2d", pack_projections(inputs), torch.bfloat16)
    assert len(products) == 2


@pytest.mark.parametrize(
    "options",
    [
        dict(size=(5, 16)),
        dict(size=(5, 7), routes="2", batch=1, dim=40),
        dict(states=3, size=(5, 16)),
        dict(states=3, size=(5, 15), write=True, routes="2", batch=1),
        dict(rank=None, size=(7, 7), bias=False),
        dict(rank=None, states=2, size=(6, 13), softplus=False),
        dict(size=(10, 10), segment=50, write=True),
        dict(per_route=True, merge=False, size=(6, 8), routes="2"),
    ],
    ids=str,
)
def test_stretches(monkeypatch, options):
    """A few long routes are scanned in stretches at once."""
    monkeypatch.setattr(kernels.scan_2d, "_SHORTEST_STRETCH", 16)
    stretches = []
    hand_on = kernels.scan_2d.hand_on
    monkeypatch.setattr(
        kernels.scan_2d,
        "hand_on",
        lambda carry, *args, **kw: stretches.append(carry.shape[1]) or hand_on(carry, *args, **kw),
    )
    compare_with_twin("scan_2d", small(**options), torch.float32)
    assert len(stretches) == 2 and min(stretches) > 1  # forward and backward


def test_stretches_of_high_rank(monkeypatch):
    monkeypatch.setattr(kernels.scan_2d, "_SHORTEST_STRETCH", 16)
    inputs = small(rank=18, dim=40, size=(5, 7), routes="2", batch=1, norm=True)
    compare_with_twin("scan_2d", pack_projections(inputs), torch.bfloat16)


def test_norm_without_bias():
    inputs = small(norm=True)
    del inputs["norm_bias"]
    compare_with_twin("scan_2d", inputs, torch.float32)


def test_norm_eps_counts():
    inputs = small(norm=True)
    for eps in (1e-5, 10.0):
        want = scan_2d_reference(**cast(inputs, torch.float64), norm_eps=eps)
        check(f"norm_eps={eps}", scan_2d(**inputs, norm_eps=eps), want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", [dict(), dict(rank=None)], ids=["low rank", "full step sizes"])
def test_forward_with_three_states(options):
    inputs = small(states=3, **options)
    want = scan_2d_reference(**cast(inputs, torch.float64))
    check("output", scan_2d(**inputs), want, TOLERANCE[torch.float32])


# Projections that lie in one tensor are read in other ways than three tensors.
PACKED = {
    "even rank": (torch.bfloat16, 2),
    "odd rank": (torch.bfloat16, 3),
    "float16": (torch.float16, 2),
    "float32": (torch.float32, 6),
}


@pytest.fixture
def launched(monkeypatch):
    """Compile-time constants of the scan kernels that are launched."""
    module, constants = kernels.find("scan_2d"), []
    launch = module.launch

    def spy(*arguments, **options):
        constants.append(options)
        launch(*arguments, **options)

    monkeypatch.setattr(module, "launch", spy)
    return constants


@pytest.mark.parametrize("case", PACKED)
def test_packed_projections(case, launched):
    """Views of one tensor against the twin, and bit for bit what separate tensors give."""
    dtype, rank = PACKED[case]
    inputs = cast(small(rank=rank, dim=9, norm=True), dtype)
    packed = pack_projections(inputs)
    compare_with_twin("scan_2d", packed, dtype)
    assert launched[0]["LAYOUT"] == "packed"  # of forward
    got, want = run(unpacked(scan_2d), packed), run(scan_2d, inputs)
    assert torch.equal(got["output 0"], want["output 0"])
    views = got.pop("gradient of packed").split([rank, 1, 1], dim=-1)
    got |= dict(zip(("gradient of delta", "gradient of B", "gradient of C"), views))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_views_that_only_look_packed(launched):
    """B and C of one tensor in the other order, and delta of another: nothing is read from the wrong place."""
    inputs = small(rank=2, dim=9)
    C, B, delta = torch.cat([inputs["C"], inputs["B"], inputs["delta"]], dim=-1).split([1, 1, 2], dim=-1)
    want = scan_2d(**inputs)
    assert torch.equal(scan_2d(**inputs | {"B": B, "C": C, "delta": delta}), want)
    assert torch.equal(scan_2d(**inputs | {"B": B, "C": C}), want)
    assert {constants["LAYOUT"] for constants in launched} == {"apart"}


@pytest.mark.parametrize(
    "options", [dict(), dict(per_route=True, merge=False, routes="2", size=(3, 5)), dict(rank=None, norm=True)], ids=str
)
def test_strided_inputs(options):
    """Channels far apart, a slice of channels, broadcast values and an expanded gradient: as if contiguous."""
    inputs = small(dim=6, **options)
    inputs["B"] = inputs["B"][:, :1].expand_as(inputs["B"])
    want = run(scan_2d, inputs | {"B": inputs["B"].contiguous()})
    x = inputs["x"]
    for strided in (x.mT.contiguous().mT, torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., :6]):
        leaves = inputs | {"x": strided, "delta": inputs["delta"].mT.contiguous().mT}
        leaves = {name: value.requires_grad_() if is_float(value) else value for name, value in leaves.items()}
        y = scan_2d(**leaves)
        assert torch.equal(y, want["output 0"])
        names = [name for name, value in leaves.items() if is_float(value)]
        for name, grad in zip(names, torch.autograd.grad(y.sum(), [leaves[name] for name in names])):
            assert torch.equal(grad, want[f"gradient of {name}"]), name


@pytest.mark.parametrize(
    ("rank", "scale", "dtype"),
    [
        (None, dict(delta=1e4), torch.float32),
        (None, dict(delta=-1e4), torch.float32),
        (None, dict(x=1e15), torch.float32),
        (None, dict(x=1e15), torch.bfloat16),
        (2, dict(delta=1e4), torch.float32),
        (2, dict(x=1e15), torch.float32),
        (2, dict(x=1e15), torch.bfloat16),
    ],
    ids=identify,
)
def test_large_values(rank, scale, dtype):
    """Step sizes and inputs as large as they come: finite, and as exact as ever."""
    inputs = small(rank=rank, size=(10, 10))
    if rank:
        inputs["dt_weight"] = inputs["dt_weight"].abs()
    for name, factor in scale.items():
        inputs[name] = inputs[name].abs() * factor
    compare_with_twin("scan_2d", inputs, dtype)


def test_steps_that_vanish():
    """Low-rank step sizes of exp(-100) and less: y as exact as ever, and every gradient finite.

    Gradients are compared in `test_large_values` with whole step sizes, some of which are near 0. Here what is left of
    them comes from such exponentials alone, which float32 rounds by more than the tolerance (the chunked path as well).
    """
    inputs = small(rank=2, size=(10, 10))
    inputs["dt_weight"], inputs["delta"] = inputs["dt_weight"].abs(), -1e4 * inputs["delta"].abs()
    got, want = (run(operator, inputs) for operator in OPERATORS["scan_2d"])
    check("scan_2d output", got["output 0"], want["output 0"], TOLERANCE[torch.float32])
    assert all(torch.isfinite(value).all() for value in got.values())


def test_strong_decay():
    """A little of the state that is left, 1e-5 of what comes in, keeps its precision: decays are learnt from it."""
    inputs = small(rank=None, bias=False)
    inputs["A"], inputs["delta"] = -1 - inputs["A"].abs(), 8 + inputs["delta"].abs()
    compare_with_twin("scan_2d", inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=identify)
def test_small_steps(dtype):
    """Steps of 1e-4, the smallest that models begin with, are as precise as others."""
    inputs = small(rank=None)
    inputs["dt_bias"] = inputs["dt_bias"] / 8 - 9
    compare_with_twin("scan_2d", inputs, dtype)


def test_one_large_step():
    """After a step that forgets everything, the small decays that follow keep their precision."""
    inputs = small(rank=None)
    inputs["delta"][:, 9] = 1e6
    compare_with_twin("scan_2d", inputs, torch.float32)


def test_growing_states():
    inputs = small()
    inputs["A"] = inputs["A"].abs() / 10
    compare_with_twin("scan_2d", inputs, torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(rank=None, write=True, steps=9),
        dict(norm=True, segment=9, routes="2"),
        dict(per_route=True, merge=False, norm=True, write=True, steps=9, routes="2"),
    ],
    ids=str,
)
def test_no_uninitialised_memory_is_read(options, monkeypatch):
    """Whatever the kernels fill is NaN beforehand, and every element of it is written."""
    poison = Poison(monkeypatch)
    compare_with_twin("scan_2d", small(**options), torch.float32)
    assert poison.count >= 8


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=identify)
def test_repetition_is_bit_equal(dtype):
    inputs = cast(small(norm=True, dim=40), dtype)
    first = run(scan_2d, inputs)
    run(scan_2d, small())  # leaves other values in freed memory
    second = run(scan_2d, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "options", [dict(batch=0), dict(batch=0, norm=True, merge=False), dict(batch=0, rank=None, per_route=True)], ids=str
)
def test_no_images(options):
    inputs = small(**options)
    got, want = (run(function, inputs) for function in (scan_2d, scan_2d_reference))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_autocast_changes_nothing():
    inputs = cast(small(norm=True), torch.bfloat16)
    plain = run(scan_2d, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(scan_2d, inputs)
    for name, value in plain.items():
        assert torch.equal(value, mixed[name]), name


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
def test_what_is_kept(norm, monkeypatch):
    """Without gradients forward keeps nothing, and with them the states between tiles and what the norm needs."""
    module, saves = kernels.find("scan_2d"), []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *inputs: saves.append(inputs[-1]) or forward(*inputs))
    inputs = small(norm=norm, size=(5, 7))
    with torch.no_grad():
        plain = scan_2d(**inputs)
    inputs["A"].requires_grad_()
    assert torch.equal(scan_2d(**inputs).detach(), plain)
    assert saves == [False, True]
    kept = {save: torch.ops.vision_ssm.scan_2d(*schema_arguments(inputs, save))[1:] for save in (False, True)}
    assert [value.shape for value in kept[False]] == [(0,)] * 3
    of_norm = [(1, 35, 24), (1, 35, 2)] if norm else [(0,), (0,)]
    assert [tuple(value.shape) for value in kept[True]] == [*of_norm, (1, 1, 3, 1, 24)]


@pytest.mark.parametrize("options", [dict(), dict(norm=True), dict(norm=True, merge=False, segment=9)], ids=str)
def test_backward_from_nothing_kept(options):
    """`torch.compile` may run forward without knowing of a backward pass, which then runs forward again."""
    inputs = small(dim=7, **options)
    outcomes = []
    for save in (True, False):
        arguments = schema_arguments(inputs, save)
        y, *kept = torch.ops.vision_ssm.scan_2d(*arguments)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y)
        outcomes.append(torch.ops.vision_ssm.scan_2d_backward(grad, *kept, *arguments))
    for got, want in zip(*outcomes, strict=True):
        assert want.any() and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=identify)
def test_table_types(dtype):
    inputs = small(write=True, dim=7)
    tables = {name: inputs[name].to(dtype) for name in ("read", "write")}
    assert torch.equal(scan_2d(**inputs | tables), scan_2d(**inputs))
    compare_with_twin("scan_2d", inputs | tables, torch.float32)


@pytest.mark.parametrize("inference", [False, True], ids=["normal mode", "inference mode"])
def test_changed_table(inference):
    """Plans of tables are remembered between calls; a table that is changed in place is planned again."""
    with torch.inference_mode(inference):
        inputs = small(dim=7, write=True)
        for name in ("read", "write", "read"):
            want = scan_2d_reference(**cast(inputs, torch.float64))
            check("output", scan_2d(**inputs), want, TOLERANCE[torch.float32])
            inputs[name].copy_(inputs[name].flip(1))


def test_one_table_for_several_maps():
    """Of several lengths, and with several segments."""
    inputs = small(dim=7, size=(4, 4))
    for length, segment in ((16, None), (16, 8), (20, None), (16, None)):
        others = small(dim=7, size=(length // 4, 4), segment=segment) | {"read": inputs["read"]}
        want = run(scan_2d_reference, cast(others, torch.float64))
        for name, value in run(scan_2d, others).items():
            check(name, value, want[name], TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["read", "write"])
@pytest.mark.parametrize(("change", "position"), [(-18, "-[0-9]+"), (18, "[123][0-9]")], ids=["below", "above"])
def test_position_outside_of_the_map(name, change, position, monkeypatch):
    """Noticed before anything runs."""
    monkeypatch.setattr(kernels.find("scan_2d"), "_scan", lambda *_: pytest.fail("kernels ran"))
    inputs = small(write=True)
    inputs[name] = inputs[name] + change
    with pytest.raises(IndexError, match=f"^scan_2d: a route visits position {position}, but x has 18 positions"):
        scan_2d(**inputs)


@pytest.mark.parametrize("options", [dict(), dict(write=True), dict(per_route=True, merge=False, routes="2")], ids=str)
def test_wide_addresses(options, monkeypatch, launched):
    """Addresses of 64 bits change no result."""
    inputs = pack_projections(cast(small(dim=7, **options), torch.bfloat16))
    narrow = run(unpacked(scan_2d), inputs)
    monkeypatch.setattr(kernels.find("scan_2d"), "_INT32_LIMIT", 0)
    for name, value in run(unpacked(scan_2d), inputs).items():
        assert torch.equal(value, narrow[name]), name
    assert [constants["WIDE"] for constants in launched] == [False, False, True, True]


def virtual_memory(elements):
    """Uninitialised bfloat16, of which only the pages that are touched take memory."""
    try:
        return torch.empty(elements, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine does not hand out {2 * elements} bytes of virtual memory: {error}")


def test_positions_far_apart():
    """Positions more than 2**31 elements away: a view of virtual memory of which a few pages are touched."""
    inputs = small(dim=4, size=(2, 3), rank=2)
    far = virtual_memory(5 * 2**30 + 8).as_strided((1, 6, 4), (0, 2**30, 1))
    far.copy_(inputs["x"])
    with torch.no_grad():
        assert torch.equal(scan_2d(**inputs | {"x": far}), scan_2d(**inputs | {"x": far.contiguous()}))


def test_maps_far_apart():
    """Maps of routes up to 3 * 2**30 elements away, in virtual memory that is valid around them too."""
    inputs = small(dim=4, size=(2, 3), rank=2, routes="4", per_route=True)
    far = virtual_memory(6 * 2**30).as_strided((1, 6, 4, 4), (0, 4, 2**30, 1), 2**31)
    far.copy_(inputs["x"])
    with torch.no_grad():
        assert torch.equal(scan_2d(**inputs | {"x": far}), scan_2d(**inputs | {"x": far.contiguous()}))


def test_opcheck():
    arguments = schema_arguments(small(batch=1, dim=3, size=(1, 3), routes="1", norm=True), True)
    grads = [torch.randn_like(value) for value in torch.ops.vision_ssm.scan_2d(*arguments)]
    torch.library.opcheck(torch.ops.vision_ssm.scan_2d_backward.default, [*grads, *arguments])
    leaves = [value.requires_grad_() if is_float(value) else value for value in arguments]
    torch.library.opcheck(torch.ops.vision_ssm.scan_2d.default, leaves)


def test_model_equals_the_chunked_path(monkeypatch):
    """vmamba_micro, forward and backward: all its kernels together."""
    model = vision_ssm.create_model("vmamba_micro", num_classes=5).train()
    image = torch.randn(1, 3, 32, 32)
    results = {}
    for backend in ("triton", "chunked"):
        monkeypatch.setenv("VISION_SSM_BACKEND", backend)
        model.zero_grad()
        logits = model(image)
        logits.square().sum().backward()
        results[backend] = {"logits": logits.detach()}
        results[backend] |= {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, want in results["chunked"].items():
        check(name, results["triton"][name], want, 1e-4)


@pytest.mark.parametrize("change", [lambda v: v[:1].expand(len(v)), lambda v: torch.stack([v, v], 1)[:, 0]])
def test_norms_of_any_strides(change):
    inputs = small(size=(2, 3), dim=5)
    norm = dict(norm_weight=change(torch.rand(5) + 0.5), norm_bias=change(torch.randn(5)))
    found = scan_2d(**inputs, **norm)
    torch.testing.assert_close(found, scan_2d(**inputs, **{k: v.contiguous() for k, v in norm.items()}))

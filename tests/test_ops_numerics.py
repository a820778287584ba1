"""Every operator against its twin: outputs and all gradients, on fresh random inputs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops_support import (
    INPUTS,
    OPERATORS,
    TOLERANCE,
    Poison,
    cast,
    check,
    compare_with_twin,
    fresh_seed,
    is_float,
    run,
    scan_2d_inputs,
    selective_scan_inputs,
    ssd_inputs,
)

from vision_ssm.ops import chunked, scan_2d, selective_scan, ssd

GOLDEN = Path(__file__).parent / "golden" / "ops"
FLOATS = (torch.float64, torch.float32)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fresh_inputs_one_thread():
    """The twins run thousands of tiny operations, for which a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fresh_seed()
    yield
    torch.set_num_threads(threads)


def identify(value):
    return str(value).removeprefix("torch.")


# Shapes and options. Gradients of few numbers might happen to cancel, so one-step cases have more images.

SELECTIVE_SCAN = {
    "one step": dict(length=1, batch=16),
    "two steps": dict(length=2, batch=16),
    "63 steps": dict(length=63),
    "1000 steps": dict(length=1000, batch=1, dim=12, states=2),
    "one state": dict(states=1, length=70),
    "16 states": dict(states=16, dim=7, length=70),
    "groups": dict(groups=4, length=70),
    "group per channel": dict(groups=24),
    "constant B, groups": dict(constant="B", groups=8),
    "constant B": dict(constant="B"),
    "constant C, groups": dict(constant="C", groups=3),
    "constant B and C": dict(constant="BC", length=70),
    "bare": dict(skip=False, gate=False, bias=False, softplus=False, last_state=False),
    "no softplus": dict(softplus=False, bias=False, length=70),
}
SCAN_2D = {
    "one position": dict(size=(1, 1), batch=16),
    "two positions": dict(size=(1, 2), batch=16),
    "odd grid": dict(size=(7, 9)),
    "column": dict(size=(11, 1)),
    "chunks": dict(size=(9, 13), dim=13),
    "1000 positions": dict(size=(25, 40), batch=1, dim=8, states=1),
    "one state": dict(states=1, size=(8, 9)),
    "16 states": dict(states=16, dim=7, batch=1, size=(8, 9)),
    "part of the map": dict(steps=7),
    "part of the map, chunks": dict(size=(9, 11), steps=83),
    "written elsewhere": dict(write=True),
    "written elsewhere, part, chunks": dict(write=True, size=(9, 11), steps=80),
    "repeated positions": dict(routes="3", size=(6, 7)),
    "segments": dict(segment=5),
    "segments in chunks": dict(size=(3, 70), segment=70, write=True),
    "full step sizes": dict(rank=None, size=(8, 9)),
    "full step sizes, no bias": dict(rank=None, bias=False),
    "no bias, no skip": dict(bias=False, skip=False),
    "no softplus": dict(softplus=False),
    "norm": dict(norm=True),
    "norm, chunks, one state": dict(norm=True, size=(8, 9), states=1),
    "norm, part of the map": dict(norm=True, steps=7),
    "norm, written elsewhere": dict(norm=True, write=True, steps=12),
    "map per route": dict(per_route=True),
    "map per route, chunks": dict(per_route=True, size=(8, 9), rank=None),
    "map per route, part, written elsewhere": dict(per_route=True, steps=7, write=True),
    "map per route, segments": dict(per_route=True, segment=5),
    "map per route, norm": dict(per_route=True, norm=True),
    "routes apart": dict(merge=False),
    "routes apart, chunks": dict(merge=False, size=(8, 9)),
    "routes apart, part, written elsewhere": dict(merge=False, steps=7, write=True),
    "routes apart, repeated positions": dict(merge=False, routes="3", size=(6, 7)),
    "routes apart, segments": dict(merge=False, segment=5),
    "routes apart, norm": dict(merge=False, norm=True),
    "map per route, routes apart": dict(per_route=True, merge=False),
    "map per route, routes apart, norm, segments": dict(per_route=True, merge=False, norm=True, segment=4),
}
SSD = {
    "one step": dict(length=1, batch=16),
    "two steps": dict(length=2, batch=16),
    "63 steps": dict(length=63),
    "1000 steps": dict(length=1000, batch=1, heads=16, width=3, chunk_size=64),
    "whole chunks": dict(length=24),
    "one chunk": dict(chunk_size=64),
    "chunks of one step": dict(chunk_size=1),
    "one group": dict(groups=1),
    "group per head": dict(groups=6),
    "16 states": dict(states=16, width=3),
    "skip per head": dict(skip="head"),
    "no initial states": dict(initial=False),
    "no softplus": dict(softplus=False, bias=False),
    "bare": dict(skip=None, gate=False, bias=False, softplus=False, initial=False, final=False),
}
CASES = [
    pytest.param(op, options, id=f"{op}: {name}")
    for op, table in (("selective_scan", SELECTIVE_SCAN), ("scan_2d", SCAN_2D), ("ssd", SSD))
    for name, options in table.items()
]


@pytest.mark.parametrize("dtype", FLOATS, ids=identify)
@pytest.mark.parametrize(("op", "options"), CASES)
def test_twin(op, options, dtype):
    compare_with_twin(op, INPUTS[op](**options), dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_no_images(op):
    got, want = (run(operator, INPUTS[op](batch=0)) for operator in OPERATORS[op])
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", HALVES, ids=identify)
@pytest.mark.parametrize("op", OPERATORS)
def test_twin_in_half_precision(op, dtype):
    compare_with_twin(op, INPUTS[op](), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=identify)
@pytest.mark.parametrize("options", [dict(), dict(per_route=True, merge=False)], ids=["merged", "routes apart"])
def test_norm_in_half_precision(options, dtype):
    """The scan and the norm are computed in float32; only the result is rounded."""
    inputs = scan_2d_inputs(norm=True, **options)
    compare_with_twin("scan_2d", inputs, dtype)
    inputs = cast(inputs, dtype)
    result = scan_2d(**inputs)
    assert result.dtype == dtype
    wide = scan_2d(**{name: value.float() if is_float(value) else value for name, value in inputs.items()})
    assert torch.equal(result, wide.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=identify)
def test_norm_without_bias(dtype):
    inputs = scan_2d_inputs(norm=True)
    del inputs["norm_bias"]
    compare_with_twin("scan_2d", inputs, dtype)


def test_norm_eps_counts():
    """Next to a large `norm_eps` the deviation of the map is nothing, so that the result shrinks to the bias."""
    inputs = cast(scan_2d_inputs(norm=True), torch.float64)
    for eps in (1e-5, 1.0, 1e20):
        got, want = (function(**inputs, norm_eps=eps) for function in OPERATORS["scan_2d"])
        check(f"scan_2d with norm_eps={eps}", got, want, TOLERANCE[torch.float64])
    assert (got - inputs["norm_bias"]).abs().max() < 1e-6


def test_norm_is_the_layer_norm_of_the_result():
    inputs = scan_2d_inputs(norm=True)
    bare = {name: value for name, value in inputs.items() if not name.startswith("norm")}
    want = torch.nn.functional.layer_norm(scan_2d(**bare), (24,), inputs["norm_weight"], inputs["norm_bias"])
    check("scan_2d", scan_2d(**inputs), want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("per_route", [False, True], ids=["one map", "map per route"])
def test_routes_apart_add_up(per_route):
    """The merged result is the sum of the routes, and route k is what it is alone."""
    inputs = cast(scan_2d_inputs(merge=False, per_route=per_route, write=True, steps=9), torch.float64)
    apart = scan_2d(**inputs)
    assert apart.shape == (2, 20, 4, 24)
    check("the sum", scan_2d(**inputs | {"merge": True}), apart.sum(2), TOLERANCE[torch.float64])
    of_route = {"A", "D", "read", "write", "dt_weight", "dt_bias"}
    for k in range(4):
        alone = {name: value[k : k + 1] if name in of_route else value for name, value in inputs.items()}
        alone |= {name: inputs[name][:, :, k : k + 1] for name in ("delta", "B", "C")}
        alone["x"] = inputs["x"][:, :, k] if per_route else inputs["x"]
        check(f"route {k}", apart[:, :, k], scan_2d(**alone | {"merge": True}), TOLERANCE[torch.float64])


@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_are_float32_islands(op):
    """Autocast changes nothing, and half-precision inputs are computed as their float32 values are."""
    inputs = cast(INPUTS[op](), torch.bfloat16)
    operator = OPERATORS[op][0]
    plain = run(operator, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(operator, inputs)
    for name, value in plain.items():
        assert torch.equal(value, mixed[name]), name
    wide = run(operator, {name: value.float() if is_float(value) else value for name, value in inputs.items()})
    assert torch.equal(plain["output 0"], wide["output 0"].to(plain["output 0"].dtype))
    assert plain["output 0"].dtype == (torch.float32 if op == "scan_2d" else torch.bfloat16)
    if "output 1" in plain:
        assert plain["output 1"].dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS, ids=identify)
@pytest.mark.parametrize("scale", [dict(delta=1e4, dt=1e4), dict(u=1e15, x=1e15), dict(delta=-1e4, dt=-1e4)], ids=str)
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", dict(length=100, gate=False)),
        ("scan_2d", dict(size=(10, 10), rank=None)),
        ("ssd", dict(length=40, gate=False)),
    ],
    ids=list(OPERATORS),
)
def test_large_values(op, options, scale, dtype):
    """Step sizes and inputs as large as they come: finite, and as exact as ever."""
    inputs = INPUTS[op](**options)
    for name, factor in scale.items():
        if name in inputs:
            inputs[name] = inputs[name].abs() * factor
    compare_with_twin(op, inputs, dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_one_large_step(op):
    """After a step that forgets everything, the small decays that follow keep their precision."""
    inputs = INPUTS[op](
        **{"selective_scan": dict(length=100), "scan_2d": dict(size=(10, 10), rank=None), "ssd": {}}[op]
    )
    name, axis = {"selective_scan": ("delta", 2), "scan_2d": ("delta", 1), "ssd": ("dt", 1)}[op]
    inputs[name].select(axis, inputs[name].shape[axis] // 2).fill_(1e6)
    compare_with_twin(op, inputs, torch.float32)


@pytest.mark.parametrize("op", OPERATORS)
def test_growing_states(op):
    """A is meant to be negative; where it is not, states grow as in the twin.

    By factors up to 1e4: exp(x) in float32 has a relative error of x times the rounding of x, which the tolerance must
    leave room for.
    """
    inputs = INPUTS[op](**{"selective_scan": dict(length=100), "scan_2d": dict(size=(10, 10)), "ssd": {}}[op])
    inputs["A"] = inputs["A"].abs() / 20
    compare_with_twin(op, inputs, torch.float32)


@pytest.mark.parametrize("elements", [1, 300])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", dict(length=70, groups=3)),
        ("scan_2d", dict(size=(8, 9), write=True)),
        ("scan_2d", dict(size=(8, 9), rank=None)),
        ("scan_2d", dict(size=(8, 9), norm=True, per_route=True, merge=False)),
        ("scan_2d", dict(size=(8, 9), per_route=True, write=True)),
        ("ssd", dict(length=30)),
    ],
)
def test_blocks(op, options, elements, monkeypatch):
    """How the work is cut changes nothing."""
    monkeypatch.setattr(chunked, "block_elements", lambda device: elements)
    compare_with_twin(op, INPUTS[op](**options), torch.float64)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", dict(length=70)),
        ("scan_2d", dict(size=(8, 9), steps=70)),
        ("scan_2d", dict(write=True, steps=7, rank=None)),
        ("scan_2d", dict(write=True, steps=7, norm=True)),
        ("scan_2d", dict(write=True, steps=7, per_route=True, merge=False)),
        ("scan_2d", dict(write=True, steps=8, segment=4, norm=True, merge=False)),
        ("ssd", {}),
    ],
)
def test_no_uninitialised_memory_is_read(op, options, monkeypatch):
    poison = Poison(monkeypatch)
    compare_with_twin(op, INPUTS[op](**options), torch.float64)
    assert poison.count > 0 or op == "ssd"  # ssd asks for none


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", dict(length=200)),
        ("scan_2d", dict(size=(13, 15))),
        ("scan_2d", dict(size=(13, 15), norm=True, per_route=True)),
        ("scan_2d", dict(size=(13, 15), norm=True, merge=False)),
        ("ssd", dict(length=99)),
    ],
)
def test_repetition_is_bit_equal(op, options):
    inputs = INPUTS[op](**options)
    first = run(OPERATORS[op][0], inputs)
    run(OPERATORS[op][0], INPUTS[op]())  # leaves other values in scratch memory
    second = run(OPERATORS[op][0], inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("selective_scan", dict(batch=1, dim=2, length=5, states=2)),
        ("scan_2d", dict(batch=1, size=(2, 3), dim=2, states=2, rank=1)),
        ("ssd", dict(batch=1, length=5, groups=1, heads=2, width=2, states=2, chunk_size=2)),
    ],
)
def test_gradcheck(op, options):
    inputs = cast(INPUTS[op](**options), torch.float64)
    names = [name for name, value in inputs.items() if is_float(value)]

    def function(*values):
        return OPERATORS[op][0](**inputs | dict(zip(names, values)))

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    "options",
    [dict(), dict(norm=True), dict(per_route=True, merge=False), dict(per_route=True, merge=False, norm=True)],
    ids=str,
)
def test_strided_inputs(options):
    """Views of a larger tensor, as projections give them, channels that lie far apart, and an expanded gradient."""
    inputs = scan_2d_inputs(**options)
    packed = torch.cat([inputs["delta"], inputs["B"], inputs["C"]], dim=-1)
    views = packed.split([2, 3, 3], dim=-1)
    x = inputs["x"].mT.contiguous().mT
    strided = inputs | dict(zip(("delta", "B", "C"), views)) | {"x": x}
    leaves = {name: value.requires_grad_() if is_float(value) else value for name, value in strided.items()}
    y = scan_2d(**leaves)
    want = run(scan_2d, inputs)
    assert torch.equal(y, want["output 0"])
    names = [name for name, value in leaves.items() if is_float(value)]
    for name, grad in zip(names, torch.autograd.grad(y.sum(), [leaves[name] for name in names])):
        assert torch.equal(grad, want[f"gradient of {name}"]), name


def test_gradient_of_one_output():
    """The other output of an operator may go unused."""
    inputs = selective_scan_inputs(gate=False)
    leaves = {name: value.double().requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    for index in (0, 1):
        got, want = (torch.autograd.grad(f(**leaves)[index].sum(), leaves["u"])[0] for f in OPERATORS["selective_scan"])
        check(f"gradient of u through output {index}", got, want, TOLERANCE[torch.float64])


def test_changed_route_table():
    """Tables are remembered between calls; one that is changed in place is read again."""
    inputs = cast(scan_2d_inputs(), torch.float64)
    for _ in range(2):
        check("scan_2d", scan_2d(**inputs), OPERATORS["scan_2d"][1](**inputs), TOLERANCE[torch.float64])
        inputs["read"].copy_(inputs["read"].flip(1))
    with torch.inference_mode():
        table = inputs["read"].clone()
        for _ in range(2):
            got, want = (f(**inputs | {"read": table}) for f in OPERATORS["scan_2d"])
            check("scan_2d", got, want, TOLERANCE[torch.float64])
            table.copy_(table.flip(1))


def test_threads_share_no_scratch():
    inputs = [scan_2d_inputs(size=(20, 20)) for _ in range(2)]
    want = [scan_2d(**one) for one in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(lambda one: scan_2d(**one), inputs), want):
                assert torch.equal(got, expected)


def test_different_groups_of_B_and_C():
    inputs = selective_scan_inputs(groups=6)
    for groups in (1, 2, 3, 4, 12):
        inputs["C"] = torch.randn(2, groups, 3, 19)
        compare_with_twin("selective_scan", inputs, torch.float64)


def test_inference_mode_and_training_share_scratch():
    inputs = scan_2d_inputs()
    with torch.inference_mode():
        first = scan_2d(**inputs).clone()
    assert torch.equal(run(scan_2d, inputs)["output 0"], first)


def test_int32_tables():
    inputs = scan_2d_inputs()
    assert torch.equal(scan_2d(**inputs | {"read": inputs["read"].int()}), scan_2d(**inputs))


def test_uncovered_positions_are_zero():
    inputs = scan_2d_inputs(size=(3, 4), steps=5)
    covered = torch.zeros(12, dtype=torch.bool)
    covered[inputs["read"].flatten()] = True
    y = scan_2d(**inputs)
    assert not y[:, ~covered].any() and y[:, covered].all()


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("norm_weight", lambda t: None, r"norm_bias is given without norm_weight, which turns the norm on"),
        ("norm_weight", lambda t: t[1:], r"norm_weight has shape \(23,\), expected \(D\) = \(24,\)"),
        ("norm_bias", lambda t: t[None], r"norm_bias has shape \(1, 24\), expected \(D\) = \(24,\)"),
        ("norm_bias", lambda t: t.to("meta"), r"norm_bias is on meta but x is on cpu; move both to one device"),
        (
            "x",
            lambda t: t[:, :, 1:],
            r"x has shape \(2, 20, 3, 24\), expected \(B, L, K routes of read, D\) = \(2, 20, 4",
        ),
        ("x", lambda t: t[:, :, None], r"x must be \(B, L, D\), got shape \(2, 20, 1, 4, 24\)"),
        ("x", lambda t: t[..., :0], r"x must be \(B, L, K, D\) without an empty dimension"),
        ("x", lambda t: t[..., 1:], r"A has shape \(4, 24, 3\), expected \(K, D, N\) = \(4, 23, 3\)"),
    ],
)
def test_bad_norm_or_map_per_route(name, spoil, message):
    inputs = scan_2d_inputs(norm=True, per_route=True)
    inputs[name] = spoil(inputs[name])
    with pytest.raises(ValueError, match=f"^scan_2d: {message}"):
        scan_2d(**inputs)


def golden_cases(op):
    cases = json.loads((GOLDEN / f"{op}.json").read_text())["cases"]
    return [pytest.param(case, id=case["tag"]) for case in cases]


def golden_tensor(stored):
    return torch.tensor(stored["values"], dtype=torch.float64).view(stored["shape"])


def check_golden(case, operator, **options):
    leaves = {name: golden_tensor(value).requires_grad_() for name, value in case["inputs"].items() if value}
    output, state = operator(**leaves, **options)
    output.backward(golden_tensor(case["cotangent"]))
    pairs = {"output": (output, case["output"])}
    pairs |= {f"gradient of {name}": (leaves[name].grad, value) for name, value in case["grads"].items()}
    if "final_state" in case:
        pairs["final state"] = (state, case["final_state"])
    for name, (got, want) in pairs.items():
        check(name, got.detach(), golden_tensor(want), 1e-9)  # stored with 12 digits


@pytest.mark.parametrize("case", golden_cases("selective_scan"))
@pytest.mark.parametrize("operator", OPERATORS["selective_scan"])
def test_golden_selective_scan(case, operator):
    check_golden(case, operator, delta_softplus=case["options"]["softplus"], return_last_state=True)


@pytest.mark.parametrize("case", golden_cases("ssd"))
@pytest.mark.parametrize("operator", OPERATORS["ssd"])
def test_golden_ssd(case, operator):
    options = {"dt_softplus": True, "return_final_states": True, "chunk_size": case["chunk"]}
    if case["initial_state"]:
        options["initial_states"] = golden_tensor(case["initial_state"])
    check_golden(case, operator, **options)


def test_last_state_continues_a_sequence():
    """Two halves, the second starting from the first one's final states, are the whole."""
    inputs = cast(ssd_inputs(length=20, initial=False), torch.float64)
    whole, final = ssd(**inputs)
    halves = [
        {name: value[:, part] if is_float(value) and value.dim() > 2 else value for name, value in inputs.items()}
        for part in (slice(None, 9), slice(9, None))
    ]
    first, middle = ssd(**halves[0])
    second, last = ssd(**halves[1], initial_states=middle)
    check("ssd", torch.cat([first, second], dim=1), whole, TOLERANCE[torch.float64])
    check("ssd final states", last, final, TOLERANCE[torch.float64])
    state = selective_scan(**selective_scan_inputs(length=5))[1]
    assert state.shape == (2, 24, 3)

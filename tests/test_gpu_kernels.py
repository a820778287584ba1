"""Triton kernels on a GPU: real sizes, graphs, addresses beyond 2**31, bad input. Run with ``pytest -m gpu``.

Most of the time goes into compiling kernels: ``-n 8`` of pytest-xdist shortens it where that is installed.

Operators are compared with the chunked path, which float64 takes, or with their twins. Tests share what Triton compiles
for: dtype, channels D, routes K, states N, rank R, number of segments, and the length of the map being odd.
"""

import copy
from functools import partial

import pytest
import torch
from ops_support import (
    TOLERANCE,
    Poison,
    cast,
    check,
    compare,
    fresh_seed,
    is_float,
    pack_projections,
    run,
    scan_2d_inputs,
    selective_scan_inputs,
    ssd_inputs,
    unpacked,
)

import vision_ssm
from vision_ssm import kernels
from vision_ssm.ops import depthwise_conv, layer_norm, scan_2d, select_backend, selective_scan, ssd
from vision_ssm.ops.torch_depthwise_conv import depthwise_conv_reference
from vision_ssm.ops.torch_layer_norm import layer_norm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*takes the chunked PyTorch path"),  # which float64 is there for
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMA = [
    *("x", "delta", "A", "B", "C", "D", "read", "write", "dt_weight", "dt_bias", "norm_weight", "norm_bias"),
    *("norm_eps", "delta_softplus", "segment", "merge", "save"),
]


@pytest.fixture(autouse=True)
def _kernels_on_fresh_inputs(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for op in ("scan_2d", "selective_scan", "ssd", "layer_norm", "depthwise_conv"):
        assert select_backend(torch.zeros(1, device="cuda"), op) == ("triton", "")
    fresh_seed()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def identify(value):
    return str(value).removeprefix("torch.")


def on_gpu(inputs):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def inputs_of(**options):
    """Keyword arguments of `scan_2d` on the GPU."""
    return on_gpu(scan_2d_inputs(**dict(states=1) | options))


def compare_with_chunked(inputs, dtype):
    """Outputs and all gradients against the chunked path in float64 on the same values."""
    operator = unpacked(scan_2d) if "packed" in inputs else scan_2d
    compare("scan_2d", operator, operator, inputs, dtype)


def assert_equal(got, want):
    """Bit for bit the same results of `run`."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def schema_arguments(inputs, save):
    """Inputs in the order of the operator's schema."""
    defaults = {"delta_softplus": True, "norm_eps": 1e-5, "merge": True, "save": save}
    return [(defaults | inputs).get(name) for name in SCHEMA]


# What VMamba-T scans for an image of 224 x 224: s1l8 with one state, the first version with 16.
STAGES = {
    "stage 1": dict(size=(56, 56), dim=96, rank=6),
    "stage 2": dict(size=(28, 28), dim=192, rank=12),
    "stage 3": dict(size=(14, 14), dim=384, rank=24),
    "stage 4": dict(size=(7, 7), dim=768, rank=48),
    "16 states": dict(size=(28, 28), dim=192, rank=6, states=16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("stage", STAGES)
def test_stage_of_a_model(stage, dtype):
    compare_with_chunked(pack_projections(inputs_of(norm=True, **STAGES[stage])), dtype)


@pytest.mark.parametrize("dim", [7, 24, 48, 64, 200])
def test_rows_of_any_width_are_merged(dim):
    """Positions are visited by different numbers of routes, so that every sum looks up where its rows begin."""
    inputs = inputs_of(size=(5, 7), dim=dim, rank=2, norm=True)
    inputs["read"] = inputs["read"].clamp(max=20)
    compare_with_chunked(inputs, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=identify)
@pytest.mark.parametrize(
    "options",
    [
        dict(size=(90, 77), dim=96, rank=6, norm=True),
        dict(size=(64, 64), dim=192, rank=24, batch=2),
        dict(size=(60, 51), dim=48, rank=3, states=16),
        dict(size=(48, 50), dim=40, rank=None, segment=1200, write=True),
    ],
    ids=str,
)
def test_stretches_of_long_routes(options, dtype):
    """One or two large images fill a GPU when their routes are cut into stretches."""
    compare_with_chunked(inputs_of(**dict(batch=1) | options), dtype)


# How states are shared among lanes depends on the number of channels in all; short batches are cut into segments.
SEQUENCES = {
    "many, gated": dict(batch=24, dim=768, length=70, states=16),
    "some, gated": dict(batch=4, dim=384, length=197, states=16),
    "few": dict(batch=1, dim=96, length=2100, states=16, gate=False),
    "one state": dict(batch=16, dim=384, length=320, states=1, gate=False),
    "few of one state, groups": dict(batch=1, dim=96, length=1111, states=1, groups=3),
    "64 states": dict(batch=2, dim=20, length=100, states=64, last_state=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences(options, dtype):
    inputs = on_gpu(selective_scan_inputs(**options))
    compare("selective_scan", selective_scan, selective_scan, inputs, dtype)


@pytest.mark.parametrize("options", [SEQUENCES["some, gated"], SEQUENCES["few"]], ids=["whole", "segments"])
def test_sequences_again_and_compiled(options):
    inputs = cast(on_gpu(selective_scan_inputs(**options)), torch.bfloat16)
    first = run(selective_scan, inputs)
    for _ in range(3):
        assert_equal(run(selective_scan, inputs), first)
    assert_equal(run(torch.compile(selective_scan, fullgraph=True), inputs), first)


HEADS = {
    "Adventurer": dict(batch=40, length=198, heads=8, groups=1, width=64, states=64, initial=False),
    "four routes": dict(batch=2, length=3136, heads=24, groups=4, width=16, states=64),
    "one long sequence": dict(batch=1, length=4000, heads=8, groups=2, width=48, states=128, gate=False),
    "wide heads, many states": dict(batch=3, length=77, heads=6, groups=3, width=100, states=130),
    "narrow": dict(batch=2, length=21, heads=6, groups=2, width=5, states=7, skip="head"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads(options, dtype):
    compare("ssd", ssd, ssd, on_gpu(ssd_inputs(**options)), dtype)


@pytest.mark.parametrize("options", [HEADS["Adventurer"], HEADS["one long sequence"]], ids=["whole", "stretches"])
def test_heads_again_and_compiled(options):
    inputs = cast(on_gpu(ssd_inputs(**options)), torch.bfloat16)
    first = run(ssd, inputs)
    for _ in range(3):
        assert_equal(run(ssd, inputs), first)
    assert_equal(run(torch.compile(ssd, fullgraph=True, backend="aot_eager"), inputs), first)


# Maps of odd sizes; what a route covers differs from call to call, what Triton compiles for does not.
FAMILIES = {
    "float32": (torch.float32, dict(dim=40, rank=3)),
    "bfloat16, packed, norm": (torch.bfloat16, dict(dim=96, rank=6, norm=True)),
    "float16, full step sizes, apart": (
        torch.float16,
        dict(dim=24, rank=None, routes="2", write=True, merge=False, skip=False, bias=False),
    ),
    "bfloat16, maps per route, segments": (torch.bfloat16, dict(dim=7, rank=2, routes="3", per_route=True)),
    "16 states": (torch.bfloat16, dict(dim=40, rank=3, states=16)),
}


def random_inputs(family):
    """Fresh inputs of one of FAMILIES, of any odd size."""
    options = dict(FAMILIES[family][1])
    height, width = (2 * int(half) + 1 for half in torch.randint(1, 17, (2,)))
    batch, length = int(torch.randint(1, 5, ())), height * width
    if "segments" in family:
        segment = int(torch.randint(1, length // 3 + 1, ()))
        segment -= segment > 1 and segment % 16 == 0  # whole tiles are another kernel
        options |= dict(segment=segment, steps=3 * segment)
    elif torch.rand(()) < 0.5:
        # the rounding of half precision shows in full where a gradient is the sum of one step
        least = 1 if FAMILIES[family][0] == torch.float32 else min(16, length)
        steps = int(torch.randint(least, length + 1, ()))
        options["steps"] = steps - (steps % 16 == 0)
    inputs = inputs_of(batch=batch, size=(height, width), **options)
    if "segments" in family:  # positions that are visited dozens of times
        inputs["read"] = inputs["read"] % max(1, length // 40)
    return pack_projections(inputs) if "packed" in family else inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_random_sizes(family, monkeypatch):
    """200 calls in all; whatever they allocate is NaN beforehand."""
    poison = Poison(monkeypatch)
    for _ in range(40):
        inputs = random_inputs(family)
        try:
            compare_with_chunked(inputs, FAMILIES[family][0])
        except AssertionError as error:
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            raise AssertionError(f"{shapes}, segment={inputs['segment']}") from error
    assert poison.count > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("scale", [dict(delta=1e4), dict(x=1e15)], ids=str)
def test_large_values(scale, dtype):
    """Step sizes and inputs as large as they come: finite, and as exact as ever."""
    inputs = inputs_of(size=(7, 9), dim=24, rank=None)
    for name, factor in scale.items():
        inputs[name] = inputs[name].abs() * factor
    compare_with_chunked(inputs, dtype)


def test_strong_decay():
    """A little of the state that is left, 1e-5 of what comes in, keeps its precision: decays are learnt from it."""
    inputs = inputs_of(size=(7, 9), dim=24, rank=None)
    inputs["A"], inputs["delta"] = -1 - inputs["A"].abs(), 8 + inputs["delta"].abs()
    compare_with_chunked(inputs, torch.float32)


def test_one_position():
    """A single step: nothing is left of an earlier state, so the decay has no gradient at all."""
    inputs = inputs_of(size=(1, 1), dim=40, rank=3, batch=16)
    compare_with_chunked(inputs, torch.float32)
    assert not run(scan_2d, inputs)["gradient of A"].any()


@pytest.mark.parametrize("batch", [0, 70000])
def test_any_number_of_images(batch):
    """None, or more than fit into the second axis of a grid, as windows of a map are."""
    inputs = inputs_of(batch=batch, size=(1, 3), dim=24, rank=2, routes="1", norm=True)
    if batch:
        compare_with_chunked(inputs, torch.float32)
    else:
        assert_equal(
            run(scan_2d, inputs), run(scan_2d, {k: v.double() if is_float(v) else v for k, v in inputs.items()})
        )


@pytest.mark.parametrize("case", [("stage 1", torch.bfloat16), ("16 states", torch.bfloat16)], ids=str)
def test_repetition_is_bit_equal(case):
    """Forward and backward at a large size, five times."""
    stage, dtype = case
    inputs = cast(pack_projections(inputs_of(batch=16, norm=True, **STAGES[stage])), dtype)
    first = run(unpacked(scan_2d), inputs)
    for _ in range(4):
        assert_equal(run(unpacked(scan_2d), inputs), first)


def test_any_alignment():
    """Tensors at odd addresses after aligned ones of the same shape: compiled kernels are not confused."""
    inputs = inputs_of(size=(7, 9), dim=40, rank=3)
    want = scan_2d(**inputs)
    for name in ("x", "delta", "B", "C"):
        value = inputs[name]
        shifted = torch.cat([value.new_full((1,), torch.nan), value.flatten()])[1:].view(value.shape)
        assert torch.equal(scan_2d(**inputs | {name: shifted}), want), name
        assert torch.equal(scan_2d(**inputs), want)


def test_strided_inputs():
    """Channels far apart, a slice of channels and an expanded gradient: as if contiguous."""
    inputs = inputs_of(size=(7, 9), dim=40, rank=3)
    want = run(scan_2d, inputs)
    x = inputs["x"]
    for strided in (x.mT.contiguous().mT, torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., :40]):
        leaves = {k: v.requires_grad_() if is_float(v) else v for k, v in (inputs | {"x": strided}).items()}
        y = scan_2d(**leaves)
        assert torch.equal(y, want["output 0"])
        names = [name for name, value in leaves.items() if is_float(value)]
        for name, grad in zip(names, torch.autograd.grad(y.sum(), [leaves[name] for name in names])):
            assert torch.equal(grad, want[f"gradient of {name}"]), name


def test_mixed_dtypes():
    """Every tensor may have a dtype of its own, as under autocast."""
    inputs = inputs_of(size=(7, 9), dim=40, rank=3)
    dtypes = dict(x=torch.bfloat16, B=torch.float16, C=torch.bfloat16, A=torch.float16, dt_weight=torch.bfloat16)
    inputs |= {name: inputs[name].to(dtype) for name, dtype in dtypes.items()}
    exact = {name: value.double() if is_float(value) else value for name, value in inputs.items()}
    got, want = run(scan_2d, inputs), run(scan_2d, exact)
    for name, value in want.items():
        check(name, got[name], value, TOLERANCE[torch.bfloat16])
    for name, value in inputs.items():
        if is_float(value):
            assert got[f"gradient of {name}"].dtype == value.dtype


@pytest.mark.parametrize("states", [1, 16])
def test_opcheck(states):
    arguments = schema_arguments(inputs_of(size=(3, 5), dim=40, rank=3, states=states, norm=True), True)
    outputs = torch.ops.vision_ssm.scan_2d(*arguments)
    backward = torch.ops.vision_ssm.scan_2d_backward.default
    torch.library.opcheck(backward, [torch.randn_like(outputs[0]), *outputs[1:], *arguments])
    leaves = [value.requires_grad_() if is_float(value) else value for value in arguments]
    torch.library.opcheck(torch.ops.vision_ssm.scan_2d.default, leaves)


# Graphs


@pytest.mark.parametrize("options", [dict(), dict(norm=True, states=16)], ids=["one state", "16 states, norm"])
def test_compiled_operator(options):
    """`torch.compile` of the operator alone, forward and training: bit for bit what eager gives."""
    inputs = inputs_of(size=(7, 9), dim=40, rank=3, **options)
    torch._dynamo.reset()
    compiled = torch.compile(scan_2d, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), scan_2d(**inputs))
    assert_equal(run(compiled, inputs), run(scan_2d, inputs))


def micro():
    """vmamba_micro on the GPU, without what is random in training."""
    return vision_ssm.create_model("vmamba_micro", num_classes=5, drop_path_rate=0.0).cuda().train()


def random_image():
    return torch.randn(2, 3, 64, 96, device="cuda")


def gradients(model, image, function):
    """Logits and gradients of a training step by name."""
    model.zero_grad()
    logits = function(image)
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_model():
    """`torch.compile` of vmamba_micro in one graph, forward and training: what eager gives."""
    model, image = micro(), random_image()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        check("logits", compiled(image), model(image), 1e-4)
    want = gradients(model, image, model)
    for name, value in gradients(model, image, compiled).items():
        check(name, value, want[name], 1e-4)


def warm_up(function):
    """Runs `function` a few times on another stream, as `torch.cuda.graph` wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
def test_graph_of_a_forward_pass(dtype):
    """Captured once, replayed on fresh images: what eager gives."""
    model, static = micro(), random_image()

    def infer(image):
        with torch.inference_mode(), torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            return model(image).float()

    warm_up(lambda: infer(static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = infer(static)
    for _ in range(3):
        image = random_image()
        static.copy_(image)
        graph.replay()
        check("logits", logits, infer(image), TOLERANCE[dtype])


def test_graph_of_a_training_step():
    """Forward, backward and optimiser step captured once, replayed on fresh images: what eager training gives."""
    model, static = micro(), random_image()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(model, optimizer, image):
        optimizer.zero_grad(set_to_none=True)
        loss = model(image).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    warm_up(lambda: step(model, optimizer, static))
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    others_optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, static)
    losses = set()
    for _ in range(3):
        image = random_image()
        static.copy_(image)
        graph.replay()
        check("loss", loss, step(other, others_optimizer, image), 1e-4)
        losses.add(float(loss))
    assert len(losses) == 3
    for (name, got), want in zip(model.named_parameters(), other.parameters()):
        check(f"change of {name}", got.detach() - before[name], want.detach() - before[name], 1e-3)


# Addresses that 32 bits do not hold


@pytest.mark.parametrize("family", ["bfloat16, packed, norm", "16 states"])
def test_wide_addresses(family, monkeypatch):
    """Kernels with addresses of 64 bits give bit for bit what the others give."""
    dtype, options = FAMILIES[family]
    inputs = inputs_of(size=(7, 9), **options)
    inputs = cast(pack_projections(inputs) if "packed" in family else inputs, dtype)
    operator = unpacked(scan_2d) if "packed" in inputs else scan_2d
    narrow = run(operator, inputs)
    monkeypatch.setattr(kernels.find("scan_2d"), "_INT32_LIMIT", 0)
    assert_equal(run(operator, inputs), narrow)


def need_memory(gigabytes):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"less than {gigabytes} GiB of GPU memory are free")


@pytest.mark.parametrize(
    ("strides", "options"),
    [((0, 2**29, 1), dict()), ((0, 40, 2**30, 1), dict(per_route=True))],
    ids=["positions far apart", "maps far apart"],
)
def test_views_beyond_int32(strides, options):
    """Elements up to 3 * 2**30 away from the first: forward and backward as for a contiguous copy."""
    need_memory(20)
    inputs = cast(inputs_of(batch=1, size=(1, 7), dim=40, rank=3, **options), torch.bfloat16)
    shape = inputs["x"].shape
    memory = torch.empty(6 * 2**30, dtype=torch.bfloat16, device="cuda")  # wrong addresses of 32 bits lie inside too
    far = memory.as_strided(shape, strides, 2**31)
    far.copy_(inputs["x"])
    inputs["delta"].requires_grad_()
    outcomes = []
    for x in (far, far.contiguous()):
        x.requires_grad_()
        y = scan_2d(**inputs | {"x": x})
        outcomes.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, inputs["delta"]])])
    for got, want in zip(*outcomes):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_tensor_beyond_int32(monkeypatch):
    """A map of more than 2**31 elements, walked in two segments, is what its halves are, forward and backward.

    Bit for bit, as long as neither is cut into stretches: of those the halves would have others than the whole.
    """
    need_memory(60)
    monkeypatch.setattr(kernels.find("scan_2d"), "_FEW_PROGRAMS", 0)
    half, dim = 2**24 + 8, 72  # half a map stays below 2**31
    assert half * dim < 2**31 < 2 * half * dim
    inputs = inputs_of(batch=1, size=(1, 1), dim=dim, rank=2, routes="1")
    of_position = {"x": (dim,), "delta": (1, 2), "B": (1, 1), "C": (1, 1)}
    inputs |= {
        name: torch.randn(1, 2 * half, *shape, device="cuda", dtype=torch.bfloat16)
        for name, shape in of_position.items()
    }
    inputs["read"] = torch.arange(2 * half, device="cuda")[None]

    def differentiate(inputs):
        leaves = {name: inputs[name].detach().requires_grad_() for name in of_position}
        y = scan_2d(**inputs | leaves)
        results = torch.autograd.grad(y, list(leaves.values()), y.detach())
        return [y.detach(), *results]

    whole = differentiate(inputs | {"segment": half})
    for first in (0, half):
        part = {name: inputs[name][:, first : first + half] for name in of_position}
        part["read"] = inputs["read"][:, :half].clone()
        for name, got, want in zip(("y", *of_position), whole, differentiate(inputs | part)):
            assert torch.equal(got[:, first : first + half], want), name


# Bad input

BAD = {
    "integers": (lambda t: dict(x=t["x"].int()), TypeError, "x must be floating-point"),
    "complex": (lambda t: dict(A=t["A"].to(torch.complex64)), TypeError, "A is complex"),
    "other routes": (lambda t: dict(B=t["B"][:, :, :3]), ValueError, "B has shape .* expected .*B, L, K, N"),
    "other states": (lambda t: dict(C=torch.cat([t["C"]] * 2, -1)), ValueError, "C has shape .* expected .*B, L, K, N"),
    "other rank": (lambda t: dict(dt_weight=t["dt_weight"][..., :2]), ValueError, "dt_weight has shape .* expected"),
    "other channels": (lambda t: dict(x=t["x"][..., :39]), ValueError, "A has shape .* expected"),
    "no position": (lambda t: dict(x=t["x"][:, :0]), ValueError, "x must be .* without an empty dimension"),
    "table on the CPU": (lambda t: dict(read=t["read"].cpu()), ValueError, "read is on cpu but x is on cuda:0"),
    "weights on the CPU": (lambda t: dict(D=t["D"].cpu()), ValueError, "D is on cpu but x is on cuda:0"),
    "position too large": (lambda t: dict(read=t["read"] + 1), IndexError, "visits position 63, but x has 63"),
    "position too small": (lambda t: dict(read=t["read"] - 1), IndexError, "visits position -1, but x has 63"),
    "output too far": (lambda t: dict(write=t["read"] + 9**9), IndexError, "visits position .*, but x has 63"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_gpu_usable(case):
    spoil, error, message = BAD[case]
    inputs = inputs_of(size=(7, 9), dim=40, rank=3)
    want = run(scan_2d, inputs)
    with pytest.raises(error, match=f"^scan_2d: .*{message}"):
        scan_2d(**inputs | spoil(inputs))
    torch.cuda.synchronize()
    assert_equal(run(scan_2d, inputs), want)


# The neighbours


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("channels", [96, 37])
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
def test_layer_norm(center, channels, dtype):
    """With a residual and drop path, and alone: against the twin in float64, and bit-equal on repetition."""
    shape = (3, 17, 19, channels)
    inputs = {"x": torch.randn(shape), "residual": torch.randn(shape)}
    inputs = on_gpu(inputs | {"weight": 1 + torch.randn(channels) / 2})
    if center:
        inputs["bias"] = torch.randn(channels, device="cuda")
    plain, plain_twin = (partial(function, center=center) for function in (layer_norm, layer_norm_reference))
    scale = torch.tensor([1.25, 0.0, 1.25], device="cuda")
    ours = partial(plain, row_scale=scale)
    compare("layer_norm", ours, partial(plain_twin, row_scale=scale), inputs, dtype)
    assert_equal(run(ours, cast(inputs, dtype)), run(ours, cast(inputs, dtype)))
    alone = {name: value for name, value in inputs.items() if name != "residual"}
    compare("layer_norm", plain, plain_twin, alone, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("size", [3, 5, 9])
@pytest.mark.parametrize("channels", [96, 37])
def test_depthwise_conv(channels, size, dtype):
    """The three ways of the kernels, with SiLU, against the twin in float64, and bit-equal on repetition."""
    inputs = {"x": torch.randn(2, 13, 11, channels), "weight": torch.randn(channels, 1, size, size) / size}
    inputs = on_gpu(inputs | {"bias": torch.randn(channels)})
    ours = partial(depthwise_conv, activation="silu")
    compare("depthwise_conv", ours, partial(depthwise_conv_reference, activation="silu"), inputs, dtype)
    assert_equal(run(ours, cast(inputs, dtype)), run(ours, cast(inputs, dtype)))

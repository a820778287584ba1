"""Choice of the implementation, and what bad arguments are told."""

import sys
import types
import warnings

import pytest
import torch
from ops_support import INPUTS, OPERATORS, cast, run

from vision_ssm import kernels
from vision_ssm.ops import (
    Backend,
    backend,
    chunked_ssd,
    plain,
    registration,
    scan_2d,
    select_backend,
    selective_scan,
    ssd,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_warned", set())
    backend._machine_obstacle.cache_clear()
    yield
    backend._machine_obstacle.cache_clear()


def gpu_tensor(monkeypatch, dtype=torch.float32, capability=(9, 0), hip=None):
    """What `select_backend` sees of a tensor on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    return types.SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype)


@pytest.fixture
def triton_kernel(monkeypatch):
    """A kernel module for ssd that computes what the chunked path does and counts its calls."""
    calls = []

    def forward(*inputs):
        calls.append("forward")
        return chunked_ssd.forward(*inputs)

    def backward(*inputs):
        calls.append("backward")
        return chunked_ssd.backward(*inputs)

    module = types.ModuleType("vision_ssm.kernels.counting")
    module.forward, module.backward = forward, backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(kernels.MODULES, "ssd", "counting")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    return calls


@pytest.mark.parametrize("op", OPERATORS)
def test_cpu_default_is_silent(op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name, reason = select_backend(torch.zeros(1), op)
        run(OPERATORS[op][0], INPUTS[op]())
    assert name == "chunked"
    assert "CUDA" in reason and "cpu" in reason


def test_unknown_operator():
    with pytest.raises(ValueError, match="unknown operator 'scan_3d'; known: selective_scan, scan_2d, ssd, depth"):
        select_backend(torch.zeros(1), "scan_3d")


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("VISION_SSM_BACKEND", "cuda")
    message = "VISION_SSM_BACKEND='cuda' names no backend; choose from triton, chunked, reference"
    with pytest.raises(ValueError, match=message):
        select_backend(torch.zeros(1), "ssd")
    with pytest.raises(ValueError, match=message):
        ssd(**INPUTS["ssd"]())


def test_impossible_demand(monkeypatch):
    monkeypatch.setenv("VISION_SSM_BACKEND", "triton")
    message = "VISION_SSM_BACKEND=triton, but ssd cannot run on Triton: Triton kernels need a CUDA tensor"
    with pytest.raises(RuntimeError, match=message):
        select_backend(torch.zeros(1), "ssd")
    with pytest.raises(RuntimeError, match=message):
        ssd(**INPUTS["ssd"]())


@pytest.mark.parametrize("op", OPERATORS)
def test_reference_on_demand(op, monkeypatch):
    operator, twin = OPERATORS[op]
    inputs = cast(INPUTS[op](), torch.float64)
    monkeypatch.setenv("VISION_SSM_BACKEND", "reference")
    assert select_backend(torch.zeros(1), op) == Backend("reference", "VISION_SSM_BACKEND=reference asks for it")
    results = run(operator, inputs)
    for name, value in run(twin, inputs).items():
        assert torch.equal(results[name], value), name


def test_chunked_on_demand(monkeypatch, triton_kernel):
    monkeypatch.setenv("VISION_SSM_BACKEND", "chunked")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend(torch.zeros(1), "ssd").name == "chunked"
    run(ssd, INPUTS["ssd"]())
    assert triton_kernel == []


def test_a_registered_kernel_runs(monkeypatch, triton_kernel):
    inputs = INPUTS["ssd"]()
    want = run(ssd, inputs)
    assert triton_kernel == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend(torch.zeros(1), "ssd") == Backend("triton", "")
    got = run(ssd, inputs)
    assert triton_kernel == ["forward", "backward"]
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    monkeypatch.delitem(kernels.MODULES, "scan_2d")
    assert "there is no Triton kernel for scan_2d" in select_backend(torch.zeros(1), "scan_2d").reason


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (dict(), ""),
        (dict(dtype=torch.bfloat16, capability=(8, 0)), ""),
        (dict(dtype=torch.bfloat16, capability=(7, 5)), "bfloat16 needs compute capability 8.0, this GPU has 7.5"),
        (dict(dtype=torch.float16, capability=(6, 1)), "Triton needs compute capability 7.0, this GPU has 6.1"),
        (dict(dtype=torch.float64), "the Triton kernels compute in float32, this tensor is float64"),
        (dict(hip="6.2"), "the Triton kernels are written for warps of 32 lanes, this is an AMD GPU"),
    ],
)
@pytest.mark.filterwarnings("ignore:ssd takes the chunked")
def test_capabilities(monkeypatch, triton_kernel, gpu, reason):
    tensor = gpu_tensor(monkeypatch, **gpu)
    assert select_backend(tensor, "ssd") == Backend("chunked" if reason else "triton", reason)


def test_missing_triton_is_reported_once(monkeypatch, triton_kernel):
    tensor = gpu_tensor(monkeypatch)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="ssd takes the chunked PyTorch path on cuda:0.*triton is not installed"):
        select_backend(tensor, "ssd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_backend(tensor, "ssd")
    monkeypatch.delitem(kernels.MODULES, "scan_2d")
    with pytest.warns(UserWarning, match="there is no Triton kernel for scan_2d"):
        select_backend(tensor, "scan_2d")


def resized(tensor, *shape):
    return torch.zeros(shape, dtype=tensor.dtype)


BAD = [
    # selective_scan: u (2, 24, 19), A (24, 3)
    (selective_scan, "u", lambda t: t[0], ValueError, r"u must be \(batch, dim, L\), got shape \(24, 19\)"),
    (selective_scan, "u", lambda t: t[..., :0], ValueError, r"u must be .* without an empty dimension, got"),
    (selective_scan, "u", lambda t: t.long(), TypeError, r"u must be floating-point, got torch.int64; convert"),
    (selective_scan, "u", lambda t: None, TypeError, r"u must be a tensor, got NoneType"),
    (selective_scan, "u", lambda t: [1.0], TypeError, r"u must be a tensor, got list"),
    (selective_scan, "A", lambda t: t.to(torch.complex64), TypeError, r"A is complex \(torch.complex64\); only real"),
    (selective_scan, "A", lambda t: t[:5], ValueError, r"A has shape \(5, 3\), expected \(dim, N\) = \(24, 3\)"),
    (selective_scan, "delta", lambda t: t[..., 1:], ValueError, r"delta has shape \(2, 24, 18\), expected .*19\)"),
    (selective_scan, "B", lambda t: t[:, :2], ValueError, r"B has shape \(2, 2, 19\), expected \(batch, N, L\)"),
    (selective_scan, "B", lambda t: t[0, 0], ValueError, r"B must be \(dim, N\), .* got shape \(19,\)"),
    (selective_scan, "C", lambda t: resized(t, 2, 5, 3, 19), ValueError, r"C has 5 groups, .* the 24 channels of u"),
    (selective_scan, "C", lambda t: resized(t, 2, 4, 3, 18), ValueError, r"C has shape .* \(batch, G, N, L\)"),
    (selective_scan, "D", lambda t: t[:-1], ValueError, r"D has shape \(23,\), expected \(dim\) = \(24,\)"),
    (selective_scan, "z", lambda t: t[0], ValueError, r"z has shape \(24, 19\), expected \(batch, dim, L\) like u"),
    (selective_scan, "delta_bias", lambda t: t[:-1], ValueError, r"delta_bias has shape \(23,\), expected \(dim\)"),
    (selective_scan, "C", lambda t: t.to("meta"), ValueError, r"C is on meta but u is on cpu; move both"),
    # scan_2d: x (2, 20, 24), 4 routes
    (scan_2d, "x", lambda t: t.view(2, 4, 5, 24), ValueError, r"x has shape \(2, 4, 5, 24\), expected \(B, L, K routes of read, D\)"),
    (scan_2d, "read", lambda t: t.float(), TypeError, r"read must be an int32 or int64 tensor .*got torch.float32"),
    (scan_2d, "read", lambda t: t.tolist(), TypeError, r"read must be an int32 or int64 tensor .*got list"),
    (scan_2d, "read", lambda t: t[0], ValueError, r"read must be \(K routes, T steps\) and not empty, got .*\(20,\)"),
    (scan_2d, "read", lambda t: t.to("meta"), ValueError, r"read is on meta but x is on cpu; move both"),
    (scan_2d, "read", lambda t: t + 1, IndexError, r"a route visits position 20, but x has 20 positions"),
    (scan_2d, "read", lambda t: t - 1, IndexError, r"a route visits position -1, but x has 20 positions"),
    (scan_2d, "write", lambda t: t[:, 1:], ValueError, r"write has shape \(4, 19\), expected \(K, T\) like read"),
    (scan_2d, "write", lambda t: t + 5, IndexError, r"a route visits position 24, but x has 20 positions"),
    (scan_2d, "A", lambda t: t[1:], ValueError, r"A has shape \(3, 24, 3\), expected \(K, D, N\) = \(4, 24, 3\)"),
    (scan_2d, "B", lambda t: t[..., 1:], ValueError, r"B has shape \(2, 20, 4, 2\), expected \(B, L, K, N\)"),
    (scan_2d, "C", lambda t: t[:1], ValueError, r"C has shape \(1, 20, 4, 3\), expected \(B, L, K, N\)"),
    (scan_2d, "D", lambda t: t[0], ValueError, r"D has shape \(24,\), expected \(K, D\)"),
    (scan_2d, "dt_bias", lambda t: t[0], ValueError, r"dt_bias has shape \(24,\), expected \(K, D\)"),
    (scan_2d, "dt_weight", lambda t: t.mT, ValueError, r"dt_weight has shape .* expected \(K, D, R\) = \(4, 24, 2\)"),
    (scan_2d, "dt_weight", lambda t: None, ValueError, r"delta has shape .* as there is no dt_weight, = \(2, 20, 4"),
    (scan_2d, "segment", lambda t: 6, ValueError, r"segment must divide the 20 steps of a route, got 6"),
    (scan_2d, "segment", lambda t: 0, ValueError, r"segment must divide the 20 steps of a route, got 0"),
    # ssd: x (2, 21, 6, 5), 2 groups, 7 states
    (ssd, "x", lambda t: t.flatten(2), ValueError, r"x must be \(B, L, heads, P\), got shape \(2, 21, 30\)"),
    (ssd, "A", lambda t: t[:, None], ValueError, r"A has shape \(6, 1\), expected \(heads\) = \(6,\)"),
    (ssd, "A", lambda t: t.to(torch.complex128), TypeError, r"A is complex \(torch.complex128\); only real"),
    (ssd, "dt", lambda t: t[..., 1:], ValueError, r"dt has shape \(2, 21, 5\), expected \(B, L, heads\)"),
    (ssd, "C", lambda t: t[..., 1:], ValueError, r"C has shape \(2, 21, 2, 6\), expected \(B, L, groups, N\)"),
    (ssd, "D", lambda t: t[:, 1:], ValueError, r"D has shape \(6, 4\), expected \(heads\) or \(heads, P\) = \(6, 5\)"),
    (ssd, "D", lambda t: t[1:, 0], ValueError, r"D has shape \(5,\), expected \(heads\) = \(6,\)"),
    (ssd, "z", lambda t: t[:1], ValueError, r"z has shape .* expected \(B, L, heads, P\) like x"),
    (ssd, "dt_bias", lambda t: t[1:], ValueError, r"dt_bias has shape \(5,\), expected \(heads\)"),
    (ssd, "initial_states", lambda t: t.mT, ValueError, r"initial_states has shape .* = \(2, 6, 5, 7\)"),
    (ssd, "chunk_size", lambda t: 0, ValueError, r"chunk_size must be at least 1, got 0"),
]


@pytest.mark.parametrize(("operator", "name", "spoil", "error", "message"), BAD)
def test_bad_arguments(operator, name, spoil, error, message):
    op = operator.__name__
    inputs = INPUTS[op](write=True) if op == "scan_2d" else INPUTS[op]()
    inputs[name] = spoil(inputs[name])
    with pytest.raises(error, match=rf"^{op}: .*{message}"):
        operator(**inputs)


def test_ssd_groups_must_divide_heads():
    inputs = INPUTS["ssd"](groups=4)
    with pytest.raises(ValueError, match="ssd: B and C have 4 groups, which do not divide the 6 heads of x"):
        ssd(**inputs)


def test_transforms_replace_nothing_for_others(monkeypatch):
    """A thread that differentiates forwards leaves the operators of all other threads alone."""
    plain_scan, seen = plain.OPERATORS["selective_scan"], []

    def watched(*inputs):
        seen.append(registration.are_replaced())
        return plain_scan(*inputs)

    monkeypatch.setitem(plain.OPERATORS, "selective_scan", watched)
    u = torch.rand(1, 2, 5)
    parts = torch.rand(1, 2, 5), -torch.rand(2, 3), torch.rand(1, 3, 5), torch.rand(1, 3, 5)
    torch.func.jvp(lambda u: selective_scan(u, *parts), (u,), (u,))
    assert seen == [False]
    selective_scan(u, *parts)
    assert seen == [False]

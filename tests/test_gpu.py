"""Operators and models on a GPU: the same results as on the CPU, and half precision. Run with ``pytest -m gpu``.

test_gpu_kernels.py has more about the kernels.
"""

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm.factory import families
from vision_ssm.ops import backend, scan_2d, select_backend, selective_scan, ssd
from vision_ssm.scans import build_routes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _cases() -> list[tuple[str, str]]:
    """Every case of VMamba, whose kernels all others share, and the two smallest models of each other family."""
    chosen = []
    for family in sorted(families()):
        names = golden_cases.names(family)
        if family != "vmamba":
            names = sorted(names, key=lambda name: golden_cases.load(name)["params"])[:2]
        chosen += [(family, name) for name in names]
    return chosen


@pytest.mark.parametrize("family,name", _cases(), ids=lambda value: value.replace("/", "-"))
def test_golden(family, name, monkeypatch):
    """What the original code computes, through the Triton kernels of every operator that has one."""
    case = golden_cases.load(name)
    model = vision_ssm.import_official(family, case["config"], golden_cases.weights(case)).cuda()
    image = golden_cases.images(case["input"]).cuda()
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    for op in ("scan_2d", "layer_norm", "depthwise_conv"):
        assert select_backend(image, op) == ("triton", "")
    outputs = case["outputs"]
    with torch.inference_mode():
        features = model.forward_intermediates(image) if outputs.get("features") else []
        logits = model(image) if outputs.get("logits") else None
    for expected, feature in zip(outputs.get("features", []), features, strict=True):
        assert golden_cases.sample_error(expected, feature.cpu()) < case["tolerance"]
    if logits is not None:
        assert golden_cases.sample_error(outputs["logits"], logits.cpu()) < case["tolerance"]


def _close(ours, twin, inputs):
    """Outputs and gradients of `ours` on the GPU in float32 against those on the CPU in float64."""
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        leaves = {key: value.to(device, dtype).requires_grad_() for key, value in inputs.items()}
        output = (ours if device == "cuda" else twin)(**leaves)
        weight = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view_as(output)
        (output * weight).sum().backward()
        results.append({"output": output.detach(), **{key: value.grad for key, value in leaves.items()}})
    for key, want in results[1].items():
        have = results[0][key].cpu().double()
        assert (have - want).norm() <= 1e-5 * want.norm(), key  # of a single step, the decay has no gradient at all


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (32, 31)])
@pytest.mark.parametrize("states", [1, 16])
def test_scan_2d(size, states):
    (table,) = build_routes("cross").tables(*size)
    length, dim, rank = size[0] * size[1], 24, 3
    inputs = dict(
        x=torch.randn(2, length, dim),
        delta=torch.randn(2, length, 4, rank),
        A=-torch.rand(4, dim, states) * 8,
        B=torch.randn(2, length, 4, states),
        C=torch.randn(2, length, 4, states),
        D=torch.randn(4, dim),
        dt_weight=torch.randn(4, dim, rank),
        dt_bias=torch.randn(4, dim) - 3,
    )
    device_table = table.to("cuda")
    _close(
        lambda **leaves: scan_2d(**leaves, read=device_table.read),
        lambda **leaves: scan_2d(**leaves, read=table.read),
        inputs,
    )


def test_selective_scan_and_ssd():
    inputs = dict(
        u=torch.randn(2, 6, 50), delta=torch.randn(2, 6, 50), A=-torch.rand(6, 4), B=torch.randn(2, 2, 4, 50),
        C=torch.randn(2, 2, 4, 50), D=torch.randn(6), z=torch.randn(2, 6, 50), delta_bias=torch.randn(6),
    )  # fmt: skip
    _close(*[lambda **leaves: selective_scan(**leaves, delta_softplus=True)] * 2, inputs)
    inputs = dict(
        x=torch.randn(2, 70, 4, 8), dt=torch.randn(2, 70, 4), A=-torch.rand(4), B=torch.randn(2, 70, 2, 5),
        C=torch.randn(2, 70, 2, 5), D=torch.randn(4), dt_bias=torch.randn(4),
    )  # fmt: skip
    _close(*[lambda **leaves: ssd(**leaves, dt_softplus=True)] * 2, inputs)


def test_backend_says_why_it_is_not_faster(monkeypatch):
    monkeypatch.delenv("VISION_SSM_BACKEND", raising=False)
    assert select_backend(torch.zeros(1, device="cuda"), "scan_2d") == ("triton", "")
    with pytest.warns(UserWarning, match="scan_2d takes the chunked PyTorch path on cuda:0, which is slow: .*float64"):
        monkeypatch.setattr(backend, "_warned", set())
        chosen = select_backend(torch.zeros(1, device="cuda", dtype=torch.float64), "scan_2d")
    assert chosen.name == "chunked" and "float64" in chosen.reason


@pytest.mark.parametrize("name", vision_ssm.list_models("*_micro"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_autocast(name, dtype, scale):
    model = vision_ssm.create_model(name, num_classes=5).cuda().train()
    image = scale * torch.randn(2, 3, 64, 96, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        outputs = model(image)
    heads = outputs if isinstance(outputs, tuple) else (outputs,)  # a distilled head returns two in training
    loss = sum(logits.float().square().mean() for logits in heads)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

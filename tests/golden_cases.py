"""Reference cases: what the original code of each paper computes, for weights and inputs that a rule makes.

A case (``tests/golden/FAMILY/NAME.json``) names the original's hyperparameters, the keys and shapes of its state dict,
and samples of its outputs. No weight is stored: every tensor follows from its key and shape, so the original and this
library see the same numbers.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent / "golden"


def names(family: str) -> list[str]:
    """Names of a family's cases."""
    return sorted(f"{family}/{path.stem}" for path in (ROOT / family).glob("*.json"))


def load(name: str) -> dict:
    return json.loads((ROOT / f"{name}.json").read_text())


_STREAM = np.random.RandomState()  # which is frozen: one stream on every version
_LATEST: dict[tuple, torch.Tensor] = {}


def _random(name: str) -> np.random.RandomState:
    _STREAM.seed(zlib.crc32(name.encode()))  # much cheaper than another RandomState, for tens of thousands of tensors
    return _STREAM


def tensor_for(key: str, shape: list[int], dtype: str = "float32") -> torch.Tensor:
    """Value of one checkpoint tensor, float32 on the CPU (integers: zeros)."""
    if "float" not in dtype:
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    rng, leaf = _random(key), key.rsplit(".", 1)[-1]
    noise = rng.standard_normal(tuple(shape))
    if leaf in ("A_log", "A_logs", "A_b_log"):
        value = np.log(1.0 + 15.0 * rng.random_sample(tuple(shape)))
    elif leaf in ("D", "Ds", "D_b"):
        value = 1.0 + 0.1 * noise
    elif leaf == "running_var":
        value = 1.0 + 0.5 * rng.random_sample(tuple(shape))
    elif leaf in ("dt_projs_bias", "dt_bias") or key.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        value = -3.0 + 0.5 * noise
    elif len(shape) >= 2:
        value, scale = np.empty(shape, np.float32), np.sqrt(max(int(np.prod(shape[1:])), 1))
        np.divide(noise, scale, out=value, casting="same_kind")
    elif leaf == "weight":
        value = 1.0 + 0.1 * noise
    else:
        value = 0.1 * noise
    return torch.from_numpy(np.asarray(value, dtype=np.float32).reshape(shape))


def weights(case: dict) -> dict[str, torch.Tensor]:
    """Checkpoint of a case under the original's keys; overrides replace a whole tensor by one number.

    Tensors that the case before had as well are used again, unless they were changed since.
    """
    skipped, dtypes = case.get("constructed", ()), case.get("dtypes", {})
    tensors, before = {}, dict(_LATEST)
    _LATEST.clear()
    for key, shape in case["state_dict"].items():
        if key in skipped:
            continue
        rule = key, tuple(shape), dtypes.get(key, "float32")
        known = before.get(rule)
        tensors[key] = tensor_for(*rule) if known is None or known._version else known
        _LATEST[rule] = tensors[key]
    for key, value in case.get("overrides", {}).items():
        tensors[key] = torch.full_like(tensors[key], value)
    return tensors


def images(spec: dict) -> torch.Tensor:
    """spec: {"name", "shape"}. Returns float32 noise of that shape."""
    return torch.from_numpy(_random(spec["name"]).standard_normal(spec["shape"]).astype(np.float32))


def array(spec: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor that a case stores in full: {"shape", "values"}, C order."""
    return torch.tensor(spec["values"], dtype=dtype).view(spec["shape"])


def check_operator(case: dict, module: torch.nn.Module, convert: Callable[[dict], dict]) -> None:
    """Output and all gradients of a channel-last module, in float64, against an operator case with NHWC or NCHW maps.

    `convert` turns original parameters into those of the module.
    """
    entries = [entry[:2] for entry in case["state_dict"]]
    originals = {key: tensor_for(key, shape, "float64").double() for key, shape in entries if "num_batches" not in key}
    module.double().eval().load_state_dict(convert(originals), strict=False)
    to_ours, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if case["layout"] == "NCHW" else ((0, 1, 2, 3),) * 2
    x = images(case["input"]).double().requires_grad_()
    y = module(x.permute(to_ours)).permute(back)
    (y * images(case["cotangent"]).double()).sum().backward()
    torch.testing.assert_close(y, array(case["output"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.grad, array(case["grad_input"]), rtol=1e-9, atol=1e-9)
    names = {ours: original for original in originals for ours in convert({original: originals[original]})}
    checked = set()
    for key, parameter in module.named_parameters():
        expected = case["param_grads"][names[key]]
        error = sample_error(expected, parameter.grad.reshape(expected["shape"]))
        assert error < 1e-5, (key, error)  # samples were stored in float32
        checked.add(names[key])
    assert checked == set(case["param_grads"])


def sample_error(expected: dict, tensor: torch.Tensor) -> float:
    """Largest difference to a stored sample, over the standard deviation of the whole expected tensor."""
    assert list(tensor.shape) == expected["shape"], f"shape {list(tensor.shape)}, expected {expected['shape']}"
    flat = tensor.detach().double().flatten()
    count = len(expected["values"])
    index = np.linspace(0, flat.numel() - 1, count).round().astype(np.int64)
    have, want = flat[torch.from_numpy(index)].numpy(), np.array(expected["values"])
    assert np.isfinite(have).all(), "not finite"
    return float(np.abs(want - have).max() / max(expected["std"], 1e-12))

"""Every backbone family against what its original code computes."""

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm.factory import families

CASES = [(family, name) for family in sorted(families()) for name in golden_cases.names(family)]


def test_every_family_has_cases():
    covered = {family for family, _ in CASES}
    assert covered == set(families()), f"no golden case for {set(families()) - covered}"


@pytest.mark.parametrize("family,name", CASES, ids=[name.replace("/", "-") for _, name in CASES])
def test_golden(family, name):
    case = golden_cases.load(name)
    dtype = getattr(torch, case.get("compute_dtype", "float32"))  # float64 where rounding grows with the depth
    model = vision_ssm.import_official(family, case["config"], golden_cases.weights(case)).to(dtype)
    image = golden_cases.images(case["input"]).to(dtype)
    stored = case["outputs"].get("features", [])  # none: the original has no dense backbone of that form
    with torch.inference_mode():
        features = model.forward_intermediates(image) if stored else []
        logits = model(image) if case["outputs"].get("logits") else None
    errors = {}
    if logits is not None:
        errors["logits"] = golden_cases.sample_error(case["outputs"]["logits"], logits)
    assert len(features) == len(stored)
    for i, (expected, feature) in enumerate(zip(stored, features)):
        errors[f"features[{i}]"] = golden_cases.sample_error(expected, feature)
    assert max(errors.values()) < case["tolerance"], errors
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]

"""Values of keywords: what fits an annotation, and what the message says of what does not."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import pytest
import torch

import vision_ssm
from vision_ssm.arguments import check_values
from vision_ssm.factory import families, unet_families


def example(
    dim: int, ratio: float, flag: bool, name: str | None, depths: Sequence[int], size: int | tuple[int, int],
    mode: Literal["a", "b"], parts: Mapping[str, Any], names: Iterable[str], free, directions: Sequence[Sequence[str]],
    drop_path_rate: float, dropout: float, scan: str | dict | Literal[False] | None, growth_rate: float,
    routes: str | list, heads: list, shape: Sequence, kernel: Literal[3, 5], mlp_ratio: float, dims: int | Sequence[int],
) -> None:  # fmt: skip
    """Takes one of each."""


@pytest.mark.parametrize(
    "key, value",
    [
        ("dim", 3), ("dim", np.int64(3)), ("ratio", 2), ("ratio", 0.5), ("ratio", np.float32(1)), ("flag", True),
        ("flag", 0), ("flag", np.bool_(True)), ("name", None), ("name", "x"), ("depths", [1, 2]), ("depths", ()),
        ("depths", range(3)), ("depths", np.array([1, 2])), ("size", 5), ("size", [5, 6]), ("mode", "b"),
        ("parts", {"a": 1}), ("names", ["a"]), ("free", object()), ("directions", [["a"], ("b", "c")]),
        ("drop_path_rate", 1), ("dropout", 0), ("scan", False), ("scan", {}), ("unknown", 1),
        ("growth_rate", 32), ("routes", ("a", "b")), ("heads", (1, "a")), ("shape", [1]), ("kernel", 3), ("mlp_ratio", 0),
    ],
)  # fmt: skip
def test_values_that_fit(key, value):
    check_values([example], {key: value}, "it")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dim", "3", "it: dim takes an integer, got '3'"),
        ("dim", True, "it: dim takes an integer, got True"),
        ("dim", 2.0, "it: dim takes an integer, got 2.0"),
        ("ratio", "x", "ratio takes a number"),
        ("flag", "yes", "flag takes True or False, got 'yes'"),
        ("flag", 2, "flag takes True or False"),
        ("name", 1, "name takes a string or None"),
        ("depths", "12", "depths takes a sequence of integers, got '12'"),
        ("depths", [1, "2"], "depths takes a sequence of integers"),
        ("depths", 4, "depths takes a sequence of integers, got 4"),
        ("size", (1, 2, 3), "size takes an integer or 2 integers"),
        ("mode", "c", "mode takes 'a' or 'b', got 'c'"),
        ("parts", [], "parts takes a dict"),
        ("names", "ab", "names takes a sequence of strings"),
        ("directions", ["ab"], "directions takes a sequence of sequences of strings"),
        ("scan", True, "scan takes a string or a dict or False or None, got True"),
        ("routes", 3, "routes takes a string or list, got 3"),
        ("kernel", np.array([3, 5]), "kernel takes 3 or 5, got array"),
    ],
)
def test_values_of_another_type(key, value, message):
    with pytest.raises(TypeError) as found:
        check_values([example], {key: value}, "it")
    assert message in str(found.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("dim", 0), ("drop_path_rate", 1.5), ("dropout", -0.1), ("dropout", np.nan), ("mlp_ratio", np.nan),
        ("mlp_ratio", -1), ("depths", (1, -1)), ("dims", [8, 0]), ("dims", -8),
    ],
)  # fmt: skip
def test_values_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"it: {key} must be .*, got"):
        check_values([example], {key: value}, "it")


def test_the_first_function_is_asked_first():
    def narrow(dim: str) -> None: ...

    check_values([narrow, example], {"dim": "wide", "ratio": 1.0}, "it")
    with pytest.raises(TypeError, match="dim takes a string"):
        check_values([narrow, example], {"dim": 1}, "it")


def test_annotations_that_cannot_be_read_are_passed_over():
    def later(dim: "Nowhere") -> None: ...  # noqa: F821

    def missing(dim: "np.Nope") -> None: ...

    class Shaped(Protocol):
        shape: tuple

    class Parts(TypedDict):
        a: int

    def odd(dim: Shaped, parts: Parts) -> None: ...

    class Called:
        def __call__(self, dim: int) -> None: ...

    for function in (later, missing, odd, functools.partial(example, 3), Called(), unhashable(Called)):
        check_values([function], {"dim": object(), "parts": {}}, "it")


def unhashable(cls: type) -> object:
    return type(cls.__name__, (cls,), {"__hash__": None})()


def test_numbers_of_numpy_become_those_of_python():
    """Classes that ask whether a keyword is an int need not know NumPy's."""
    mixer = vision_ssm.build_scan(dict(type="attention", heads=np.int64(2)), np.int64(8))
    assert mixer(torch.zeros(1, 2, 2, 8)).shape == (1, 2, 2, 8)
    options = dict(depth=np.int64(1), img_size=np.array([32, 48]), drop_path_rate=np.float32(0.5))
    model = vision_ssm.create_model("vim_micro", **options, scan=dict(dt_rank=np.int64(2)))
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 1000)
    assert vision_ssm.create_model("vim_micro", img_size=np.int64(48)).pos_embed.table.shape[2:] == (3, 3)


@pytest.mark.parametrize("cls", [cls for found in (families(), unet_families()) for group in found.values() for cls in group])
def test_every_variant_keeps_to_its_annotations(cls):
    for name in cls.variants:
        cls.variant_settings(name, cls.variants[name])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: vision_ssm.create_model(5), TypeError, "name is that of a model, such as .*, got 5"),
        (lambda: vision_ssm.create_model("vmamba_micro", depths="a"), TypeError, "vmamba_micro: depths takes a sequence"),
        (lambda: vision_ssm.create_model("vmamba_micro", drop_path_rate=1.5), ValueError, "between 0 and 1, got 1.5"),
        (lambda: vision_ssm.create_model("vim_micro", patch_size=0), ValueError, "patch_size must be 1 or more"),
        (lambda: vision_ssm.create_model("vim_micro", img_size=(64,)), TypeError, "an integer or 2 integers"),
        (lambda: vision_ssm.create_model("vmunet_micro", num_classes="a"), TypeError, "num_classes takes an integer"),
        (lambda: vision_ssm.create_model("vmamba_micro", scan=dict(state_dim=0)), ValueError, "state_dim must be 1 or more"),
        (lambda: vision_ssm.create_model("vmamba_micro", depths=()), ValueError, "of one at least; got none"),
        (lambda: vision_ssm.create_model("vmamba_micro", patch_size=1), ValueError, "stem 'conv' has patch_size 4, got 1; stem='patch'"),
        (lambda: vision_ssm.build_scan("causal", "64"), TypeError, "scan 'causal': dim takes an integer, got '64'"),
        (lambda: vision_ssm.build_scan("causal", 0), ValueError, "dim must be 1 or more"),
        (lambda: vision_ssm.build_scan(dict(type="causal", conv_kernel=0), 64), ValueError, "1 tap or more, got 0"),
        (lambda: vision_ssm.build_scan(dict(type="windowed", conv_kernel=-1), 64), ValueError, "must be odd.* got -1"),
        (lambda: vision_ssm.build_scan(dict(type="continuous", conv_kernel=-1), 64), ValueError, "must be odd.* got -1"),
    ],
)  # fmt: skip
def test_wrong_values_of_models_and_scans(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Settings and data shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small operations stall when threads wait for busy cores
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


def _interpret_kernels():
    """Without a GPU, define Triton's own functions and every kernel for Triton's interpreter.

    Triton decides when a function is defined, so this comes before any other import of it. Afterwards the variable is
    taken back: other tests run what users run, and a test that wants kernels asks for the fixture `interpreter`.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from vision_ssm import kernels

    for op in kernels.MODULES:
        kernels.find(op)
    del os.environ["TRITON_INTERPRET"]
    _patch_language_once_per_launch()


def _patch_language_once_per_launch():
    """Spare Triton's interpreter most of its time with kernels that call many functions.

    It patches `triton.language` when a kernel is launched, and again at every call of a device function, where nothing
    is left to patch unless the function's module sees other parts of the language. So once per module and launch is enough.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton, which has its own ways
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if function.__module__ in patched:
            return None  # only a launch, which comes first, needs what can be restored
        scope = patch(function)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: patched.clear() or restore()
        patched.add(function.__module__)
        return scope

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    _interpret_kernels()

from engine_support import write_pictures  # noqa: E402


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and with one thread, whatever the one before it set."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of small pictures of three classes in ImageNet layout; not to be changed."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def interpreter(monkeypatch):
    """CPU tensors run the Triton kernels, in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels were defined for the GPU, where test_gpu_kernels.py runs them")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small operations stall when threads wait for busy cores
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request):
    """Every test starts from one seed, and leaves no trace in the global random state of the next."""
    torch.manual_seed(0)
    yield

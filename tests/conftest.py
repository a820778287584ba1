"""Settings and data shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small operations stall when threads wait for busy cores
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from engine_support import write_pictures


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and with one thread, whatever the one before it set."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of small pictures of three classes in ImageNet layout; not to be changed."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))

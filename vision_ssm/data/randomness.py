"""Random numbers that belong to a sample, not to a process.

Augmentations draw from the three global generators of a process (`random`, `numpy.random`, torch's CPU generator), so
their outcome normally depends on which worker handles a sample and on everything drawn before. Here a sampler hands out
`Draw` indices that carry the coordinates of the draw, (seed, epoch, position in the epoch), and the dataset runs the
augmentation of that sample inside `seeded(*coordinates)`. The result is the same for any number of workers, for any
number of processes that share an epoch, and after resuming in the middle of an epoch.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS as ROOT_DATASETS
from torch.utils.data import Dataset

from vision_ssm.registry import DATASETS


class Draw(int):
    """Dataset index with the coordinates of its draw; usable wherever an `int` is.

    Args:
        index: Index into the dataset.
        coordinates: Non-negative integers that identify this draw, normally (seed, epoch, position in the epoch).

    Arithmetic gives a plain `int`: a wrapper that computes another index from it (`torch.utils.data.Subset`) also drops
    the coordinates, and its samples are augmented from the worker's own generators.
    """

    coordinates: tuple[int, ...]

    def __new__(cls, index: int, coordinates: tuple[int, ...]) -> "Draw":
        draw = super().__new__(cls, index)
        draw.coordinates = coordinates
        return draw

    def __reduce__(self) -> tuple:
        return Draw, (int(self), self.coordinates)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator from `entropy`, and put their states back on leaving.

    Nearby entropies give unrelated streams (`numpy.random.SeedSequence`). GPU generators are not touched.

    Raises:
        ValueError: An entropy is negative.
    """
    words = np.random.SeedSequence(entropy).generate_state(8)
    states = random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()
    random.seed(int.from_bytes(words[:2].tobytes(), "little"))
    np.random.seed(words[2:6])
    torch.default_generator.manual_seed(int.from_bytes(words[6:].tobytes(), "little"))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Another package's data set, whose sample of a `Draw` is made inside `seeded(*coordinates)`.

    Everything else (``metainfo``, ``get_data_info``, ...) is the inner data set's.

    Args:
        dataset: config of a data set whose transforms draw from the global generators, such as mmseg's and mmdet's.
    """

    def __init__(self, dataset: dict) -> None:
        self.dataset = ROOT_DATASETS.build(dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return self.dataset[index]
        with seeded(*index.coordinates):
            return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet while a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

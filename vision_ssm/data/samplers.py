"""Orders of samples that depend on (seed, epoch) only.

Every index is a `Draw` with the coordinates (seed, epoch, position), from which `ImageFolder` seeds the augmentation.
The position counts over all processes, so 2 processes with batch B see the augmented images of 1 process with batch 2B.
"""

import math
from collections.abc import Iterator, Sized

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import BatchSampler, Sampler

from vision_ssm.data.keywords import strict_keywords
from vision_ssm.data.randomness import Draw
from vision_ssm.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[int]):
    """Every sample once per epoch, dealt out to the processes in turn.

    Args:
        dataset: Anything with a length.
        shuffle: A new order in each epoch, else the order of the dataset.
        seed: Non-negative, the same in all processes; by default one random seed agreed on by all processes.
        round_up: Give each process the same number of samples by repeating the first ones. Otherwise the last processes
            may have one sample less.
        endless: Go on with the next epoch instead of stopping, for loops that count iterations. The length stays that
            of one epoch.

    Raises:
        ValueError: Empty dataset or negative seed.
    """

    @strict_keywords
    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        endless: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(f"cannot sample from an empty dataset ({type(dataset).__name__} of length 0)")
        if seed is not None and seed < 0:
            raise ValueError(f"the seed of a sampler must not be negative, got {seed}")
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else int(seed)
        self.endless = endless
        self.epoch = 0
        size = len(dataset)
        total = math.ceil(size / self.world_size) * self.world_size if round_up else size
        self._positions = range(self.rank, total, self.world_size)

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self.dataset)
        if not self.shuffle:
            return np.arange(size)
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]))
        return torch.randperm(size, generator=generator).numpy()

    def _index(self, order: np.ndarray, position: int) -> int:
        return int(order[position % len(order)])

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        while True:
            order = self._order(epoch)
            for position in self._positions:
                yield Draw(self._index(order, position), (self.seed, epoch, position))
            if not self.endless or len(self) == 0:
                return
            epoch += 1

    def __len__(self) -> int:
        """Samples per epoch in this process."""
        return len(self._positions)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs through."""
        self.epoch = int(epoch)


@DATA_SAMPLERS.register_module()
class RepeatedAugmentSampler(EpochSampler):
    """Repeated augmentation: the copies of a sample follow each other and go to different processes.

    Semantics of `timm.data.RepeatAugSampler`: `num_repeats` copies of each sample in a shuffled order, dealt out to the
    processes in turn, and cut off so that an epoch has as many samples as without repetition. Hoffer et al., "Augment
    your batch", CVPR 2020 (arXiv:1901.09335); Touvron et al., DeiT (arXiv:2012.12877). Every copy is augmented anew.

    Args:
        dataset: Anything with a length.
        num_repeats: Copies per sample, at least 1; a fraction such as 1.5 repeats every other sample.
        shuffle: A new order in each epoch.
        seed: As in `EpochSampler`.
        selected_round: An epoch is cut to a multiple of this many samples (0: not rounded). Smaller datasets are not
            rounded.
        selected_ratio: An epoch of one process is the dataset divided by this; 0 means the number of processes.
        endless: As in `EpochSampler`.

    Raises:
        ValueError: Empty dataset, negative seed, or an option out of range.
    """

    @strict_keywords
    def __init__(
        self,
        dataset: Sized,
        num_repeats: float = 3,
        shuffle: bool = True,
        seed: int | None = None,
        selected_round: int = 256,
        selected_ratio: float = 0,
        endless: bool = False,
    ) -> None:
        super().__init__(dataset, shuffle=shuffle, seed=seed, endless=endless)
        if num_repeats < 1:
            raise ValueError(f"num_repeats must be at least 1, got {num_repeats}")
        if selected_round < 0 or selected_ratio < 0:
            raise ValueError(
                f"selected_round and selected_ratio must not be negative, got {selected_round} and {selected_ratio}"
            )
        self.num_repeats = num_repeats
        size = len(dataset)
        ratio = selected_ratio or self.world_size
        if selected_round and size >= selected_round:
            selected = math.floor(size // selected_round * selected_round / ratio)
        else:
            selected = math.ceil(size / ratio)
        total = math.ceil(size * num_repeats / self.world_size) * self.world_size
        self._copies = math.ceil(size * num_repeats)
        self._positions = range(self.rank, total, self.world_size)[:selected]

    def _index(self, order: np.ndarray, position: int) -> int:
        return int(order[int(position % self._copies // self.num_repeats)])


@DATA_SAMPLERS.register_module()
class AspectRatioBatchSampler(BatchSampler):
    """Batches of images that are all higher than wide or all not, but for what is left at the end of an epoch.

    Every process has as many batches as its number of images says. With mmdet's sampler of that name it may not: where
    the images left at the end fill a batch, ``drop_last`` drops it, and other processes wait for it.

    Args:
        sampler: of a dataset with ``get_data_info(index)``, whose ``width`` and ``height`` count.
        batch_size: images per batch.
        drop_last: leave out the last batch if it is smaller.

    Raises:
        ValueError: `batch_size` is no positive integer, or `drop_last` no bool.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        buckets: tuple[list[int], list[int]] = ([], [])
        for index in self.sampler:
            info = self.sampler.dataset.get_data_info(index)
            bucket = buckets[info["width"] >= info["height"]]
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()
        rest = buckets[0] + buckets[1]
        for start in range(0, len(rest), self.batch_size):
            batch = rest[start : start + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

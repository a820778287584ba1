"""Training loops, by epochs and by iterations, that can be left and entered again at any iteration."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, set_random_seed
from torch.utils.data import DataLoader

from .checkpoint import preserved_rng, set_rng_state


def batch_size(loader: DataLoader) -> int:
    """Samples per batch of `loader`, also where a batch sampler of its own makes the batches."""
    return loader.batch_size or loader.batch_sampler.batch_size


def remaining_batches(loader: DataLoader, start: int) -> DataLoader:
    """A loader over the batches of this epoch from number `start` on; what comes before is not read from disk."""
    if loader.batch_sampler is None:
        raise ValueError("a loader without batches (batch_size=None) cannot be entered in mid-epoch")
    workers = loader.num_workers
    return DataLoader(
        loader.dataset,
        batch_sampler=islice(iter(loader.batch_sampler), start, None),
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if workers else None,
    )


def stop_workers(loop: Any) -> None:
    """End the processes that read for the loaders of a loop and wait for its next epoch.

    Python's collector of cycles closes the queue through which PyTorch tells a process to end before it does so: the
    process is then waited for in vain, 5 s each.
    """
    further = [loader for loader, _ in getattr(loop, "others", {}).values()]
    for loader in (getattr(loop, "dataloader", None), *further):
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            loader._iterator = None
            iterator._shutdown_workers()


class ExactLoop:
    """What makes a resumed run equal to an unbroken one, for either loop of mmengine.

    Creating a loader's iterator and validating leave the random generators as they were, so that their state depends
    on the training iterations alone; and a run that ended between an iteration and the validation due then validates
    first.

    Attributes:
        position: where a run continuing from now would start: ``epoch``, ``iter``, ``batch`` (batches of that epoch
            already used) and ``validation_due``. Valid in the hooks after an iteration and after an epoch.
    """

    runner: Any
    dataloader: DataLoader
    val_begin: int
    val_interval: int
    _epoch: int
    _iter: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = dict(epoch=0, iter=0, batch=0, validation_due=False)
        self._saved_rng: dict | None = None

    def restore(self, position: dict, rng: dict | None) -> None:
        """Continue from `position`; `rng` is the state of the random generators there (None: start from the seed)."""
        self.position = dict(position)
        self._epoch, self._iter = position["epoch"], position["iter"]
        self._saved_rng = rng

    def _start(self) -> None:
        """Random generators and the validation that is due as they were where the run was left."""
        if self._saved_rng is not None:
            set_rng_state(self._saved_rng)
        else:
            # Ranks share the seed up to here, for equal weights; from here on they must draw different noise.
            set_random_seed(self.runner.seed + self.runner.rank)
        if self.position["validation_due"]:
            self._validate()

    def _batches(self, start: int) -> Iterator:
        loader = self.dataloader if start == 0 else remaining_batches(self.dataloader, start)
        with preserved_rng():
            return iter(loader)

    def _validation_due(self, done: int, last: int) -> bool:
        wanted = done % self.val_interval == 0 or done == last
        return self.runner.val_loop is not None and done >= self.val_begin and wanted

    def _validate(self) -> None:
        with preserved_rng():
            self.runner.val_loop.run()
        self.position["validation_due"] = False


class EpochTrainLoop(ExactLoop, EpochBasedTrainLoop):
    """mmengine's epochs with an exact position in the epoch, see `position`."""

    def run(self) -> Any:
        """Train to the last epoch. Returns the model."""
        self.runner.call_hook("before_train")
        self._start()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self.position["validation_due"]:
                self._validate()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """Train on what is left of the current epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        start = self.position["batch"]
        for index, data_batch in enumerate(self._batches(start), start):
            self.run_iter(index, data_batch)
        done = self._epoch + 1
        due = self._validation_due(done, self._max_epochs)
        self.position = dict(epoch=done, iter=self._iter, batch=0, validation_due=due)
        self.runner.call_hook("after_train_epoch")
        self._epoch = done

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One iteration on batch number `idx` of the epoch."""
        self.runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.position = dict(epoch=self._epoch, iter=self._iter + 1, batch=idx + 1, validation_due=False)
        self.runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1


class IterTrainLoop(ExactLoop, IterBasedTrainLoop):
    """mmengine's loop over iterations with an exact position in the stream of batches.

    The sampler has to go on after each epoch: ``dict(type="vision_ssm.EpochSampler", endless=True)``, or mmengine's
    ``InfiniteSampler``. Hooks see one epoch that is as long as the training.
    """

    def run(self) -> Any:
        """Train to the last iteration. Returns the model."""
        self.runner.call_hook("before_train")
        self._start()
        self.runner.call_hook("before_train_epoch")
        batches = self._batches(self.position["batch"])
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            data_batch = next(batches, None)
            if data_batch is None:
                raise ValueError(
                    f"the training data ended after {self._iter} of {self._max_iters} iterations: the sampler of a run "
                    'that counts iterations must be endless, dict(type="vision_ssm.EpochSampler", endless=True)'
                )
            self.run_iter(data_batch)
            if self.position["validation_due"]:
                self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: Any) -> None:
        """One iteration."""
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        done = self._iter + 1
        self._decide_current_val_interval()
        due = self._validation_due(done, self._max_iters)
        self.position = dict(epoch=0, iter=done, batch=self.position["batch"] + 1, validation_due=due)
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1

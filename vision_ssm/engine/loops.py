"""Training loop whose epochs can be left and entered again at any iteration."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.runner import EpochBasedTrainLoop, set_random_seed
from torch.utils.data import DataLoader

from .checkpoint import preserved_rng, set_rng_state


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


class EpochTrainLoop(EpochBasedTrainLoop):
    """mmengine's epochs with an exact position in the epoch.

    Two rules make a resumed run equal to an unbroken one: creating a loader's iterator and validating leave the
    random generators as they were, so that their state depends on the training iterations alone; and a run that ended
    between an epoch and its validation validates first.

    Attributes:
        position: where a run continuing from now would start: ``epoch``, ``iter``, ``batch`` (batches of that epoch
            already used) and ``validation_due``. Valid in the hooks after an iteration and after an epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = dict(epoch=0, iter=0, batch=0, validation_due=False)
        self._saved_rng: dict | None = None

    def restore(self, position: dict, rng: dict | None) -> None:
        """Continue from `position`; `rng` is the state of the random generators there (None: start from the seed)."""
        self.position = dict(position)
        self._epoch, self._iter = position["epoch"], position["iter"]
        self._saved_rng = rng

    def run(self) -> Any:
        """Train to the last epoch. Returns the model."""
        self.runner.call_hook("before_train")
        if self._saved_rng is not None:
            set_rng_state(self._saved_rng)
        else:
            # Ranks share the seed up to here, for equal weights; from here on they must draw different noise.
            set_random_seed(self.runner.seed + self.runner.rank)
        if self.position["validation_due"]:
            self._validate()
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
        due = (
            self.runner.val_loop is not None
            and done >= self.val_begin
            and (done % self.val_interval == 0 or done == self._max_epochs)
        )
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

    def _batches(self, start: int) -> Iterator:
        loader = self.dataloader if start == 0 else remaining_batches(self.dataloader, start)
        with preserved_rng():
            return iter(loader)

    def _validate(self) -> None:
        with preserved_rng():
            self.runner.val_loop.run()
        self.position["validation_due"] = False

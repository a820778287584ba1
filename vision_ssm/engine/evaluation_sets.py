"""Validation and test over several data sets in one pass, such as pictures of several sizes."""

import copy
from typing import Any, ClassVar

from mmengine.config import ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.runner import TestLoop, ValLoop

from vision_ssm.registry import LOOPS


class _SeveralSets:
    """A loop over the loader of the config, and then over others.

    Args:
        runner, dataloader: as in mmengine's loop; the loader must be given as a config.
        also: by name, what another loader has different from `dataloader`, for example
            ``{"384": dict(batch_size=64, dataset=dict(split="val_384"))}``. Its metrics have the name before them
            (``384/top1``); those of `dataloader` keep theirs.
        **options: evaluator and fp16, as in mmengine's loop.

    Attributes:
        others: by name, the loader and the evaluator of each further set.

    Raises:
        TypeError: `dataloader` is not a config.
    """

    mode: ClassVar[str]
    runner: Any
    dataloader: Any
    evaluator: Evaluator
    run_iter: Any

    def __init__(self, runner: Any, dataloader: dict, *, also: dict[str, dict], **options: Any) -> None:
        if not isinstance(dataloader, dict):
            raise TypeError(f"evaluation on several sets needs the config of a loader, got {type(dataloader).__name__}")
        plain = copy.deepcopy(dataloader)  # building a loader takes its config apart
        super().__init__(**dict(options, runner=runner, dataloader=dataloader))
        self.others: dict[str, tuple[Any, Evaluator]] = {}
        for name, changes in also.items():
            config = ConfigDict(copy.deepcopy(plain))
            config.merge(ConfigDict(changes))
            loader = runner.build_dataloader(config, seed=runner.seed)
            own = copy.deepcopy(self.evaluator)
            own.dataset_meta = getattr(loader.dataset, "metainfo", None)
            for metric in own.metrics:
                metric.prefix = "/".join(filter(None, (name, metric.prefix)))
            self.others[name] = loader, own

    def run(self) -> dict[str, float]:
        """Evaluate on every set. Returns the metrics of all of them, which the hooks see together."""
        self.runner.call_hook(f"before_{self.mode}")
        self.runner.call_hook(f"before_{self.mode}_epoch")
        self.runner.model.eval()
        metrics: dict[str, float] = {}
        first = self.dataloader, self.evaluator
        try:
            for loader, evaluator in (first, *self.others.values()):
                self.dataloader, self.evaluator = loader, evaluator  # those that run_iter and the hooks see
                for index, batch in enumerate(loader):
                    self.run_iter(index, batch)
                metrics.update(evaluator.evaluate(len(loader.dataset)))
        finally:
            self.dataloader, self.evaluator = first
        self.runner.call_hook(f"after_{self.mode}_epoch", metrics=metrics)
        self.runner.call_hook(f"after_{self.mode}")
        return metrics


@LOOPS.register_module()
class SeveralValLoop(_SeveralSets, ValLoop):
    """Validation on several sets: ``val_cfg = dict(type="vision_ssm.SeveralValLoop", also={...})``."""

    mode = "val"


@LOOPS.register_module()
class SeveralTestLoop(_SeveralSets, TestLoop):
    """Test on several sets: ``test_cfg = dict(type="vision_ssm.SeveralTestLoop", also={...})``."""

    mode = "test"

"""What reaches the console: the log file gets everything, a person gets what tells them something."""

import logging
import sys
import warnings

from mmengine.logging import MMLogger

ROUTINE = (
    "Exp name:",
    "Config:\n",
    "Hooks will be executed",
    "Parameter groups:",
    "The prefix is not set in metric class",
    "Distributed training is not used, all SyncBatchNorm",
    "Failed to search registry with scope",
    "`save_param_scheduler` is True but",
)
"""Beginnings of log messages that say nothing new to someone who watches a run."""

HARMLESS = (
    r"Fail to import ``?MultiScaleDeformableAttention",
    r"Line NMS is not compiled",
    r".*faster_coco_eval.*is not installed",
    r"`?reduce_zero_label`? will be deprecated",
    r".*avg_non_ignore",
    r"__array__ implementation doesn't accept a copy keyword",
    r"__array_wrap__ must accept context",
    r"Warning: The (bbox|polygon|text) is out of bounds",
    r"The shape of value will convert from",
    r"The draw is False",
    r".*(FileClient|HardDiskBackend).* will be deprecated",
    r".*broadcast_buffers.*deprecated",
    r"Setting (OMP|MKL)_NUM_THREADS environment variable",
    r"Multi-processing start method",
    r"Detected call of `scheduler.step\(\)` before `optimizer.step\(\)`",
    r"FSDP2-wrapped module \(.*\) returned a view tensor",  # which no family changes in place
    r"This DataLoader will create \d+ worker processes",
)
"""Patterns of warnings of mmengine, mmcv, mmseg, mmdet and torch that concern nobody who uses this library."""


class RoutineFilter(logging.Filter):
    """Drops records that begin with one of `beginnings`."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def console_handlers(logger: logging.Logger) -> list[logging.StreamHandler]:
    """Handlers of `logger` that write to the terminal."""
    streams = [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in streams if handler.stream in (sys.stdout, sys.stderr)]


def quieten(logger: MMLogger) -> None:
    """Keep mmengine's routine messages out of the console; the log file keeps them."""
    for handler in console_handlers(logger):
        handler.addFilter(RoutineFilter(ROUTINE))


def ignore_harmless_warnings() -> None:
    """Filter, for this process, the warnings listed in `HARMLESS`. For entry points, not for a library's import."""
    for pattern in HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)

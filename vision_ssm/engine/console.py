"""What all commands share: parser with examples, tables that fit their output, errors without traceback."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console

from vision_ssm.download import DownloadError
from vision_ssm.integrations.export_checks import ExportError
from vision_ssm.integrations.packages import PackageConflictError
from vision_ssm.weights import CheckpointError

from .config import UsageError
from .hooks import NonFiniteError

PIPE_WIDTH = 240
TRACEBACK = "VISION_SSM_TRACEBACK"
EXPECTED = (
    UsageError, CheckpointError, DownloadError, NonFiniteError, PackageConflictError, ExportError, FileNotFoundError,
)  # fmt: skip
# What is wrong with a config shows when it is built, as one of these.
BUILDING = (*EXPECTED, ValueError, TypeError, KeyError, OSError)


def command_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Parser of a command whose help ends with examples."""
    return argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def wide_console() -> Console:
    """Console that never cuts a table short where its output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


@contextlib.contextmanager
def clear_errors(kinds: tuple[type[Exception], ...] = EXPECTED) -> Iterator[None]:
    """Errors of these kinds end the program with their message alone; all others keep their traceback."""
    try:
        yield
    except kinds as error:
        if os.environ.get(TRACEBACK):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}\n(set {TRACEBACK}=1 for the traceback)", file=sys.stderr)
        raise SystemExit(1) from None

"""Writing a data folder as a whole or not at all."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class PrepareError(Exception):
    """A data folder cannot be written or checked; the message says why and what to do."""


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block has succeeded and vanishes when it has not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PrepareError(f"cannot write to {str(out.parent)!r}: {error.strerror}. Choose another folder.") from error
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        if out.exists():
            out.rename(temporary / "old")
        content.rename(out)
    except OSError as error:
        hint = " Free some space or choose another disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise PrepareError(f"cannot write {str(out)!r}: {error.strerror}. It is as it was before.{hint}") from error
    finally:
        if not out.exists() and (temporary / "old").exists():
            (temporary / "old").rename(out)
        shutil.rmtree(temporary, ignore_errors=True)

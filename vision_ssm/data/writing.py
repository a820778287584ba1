"""Writing a data folder, or a file, as a whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
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
        message = f"cannot write {str(out)!r}: {error.strerror}. It is as it was before.{_hint(error)}"
        raise PrepareError(message) from error
    finally:
        if not out.exists() and (temporary / "old").exists():
            (temporary / "old").rename(out)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, with its ending; what is there takes the place of `path` when the block has
    succeeded. Threads and processes may write the same file at the same time."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise PrepareError(f"cannot write {str(path)!r}: {error.strerror or error}.{_hint(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _hint(error: OSError) -> str:
    return " Free some space or choose another disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""

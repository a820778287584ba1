"""Weight files from the net, into a cache: resumed, checked before they get their name, asked for by many at once."""

import errno
import hashlib
import http.client
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .backbones.family import points_to_file
from .version import __version__
from .weights import CheckpointError, read_checkpoint

CACHE_VARIABLE = "VISION_SSM_CACHE"
ATTEMPTS = 5
WAIT = 1.0
"""Seconds before the second attempt; each further wait is twice as long."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as cut."""
_BLOCK = 1 << 20
_WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)
_NO_NETWORK = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


class DownloadError(RuntimeError):
    """A file that could not be downloaded, with the reason and what to do."""


class _Cut(Exception):
    """A connection that ended early: worth another attempt, from where it ended."""


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Folder of downloaded weights.

    `cache_dir`, else the environment variable ``VISION_SSM_CACHE``, else ``checkpoints`` of `torch.hub.get_dir`
    (``$TORCH_HOME/hub``, by default ``~/.cache/torch/hub``).
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(
    url: str,
    file: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """The cached weight file `file`, downloaded from `url` if it is not there yet.

    A download that was cut off goes on where it ended, now and in a later call, if the server can do that. The file
    gets its name when it is whole: it has the size the server announced, the `sha256` if one is given, and is a
    checkpoint that can be read. Processes that ask for the same file wait for the one that downloads it.

    Args:
        url: link to the file. One to a web page (Google Drive, Baidu, a repository) is an error that says what to do.
        file: name in the cache.
        cache_dir: see `cache_folder`.
        sha256: hexadecimal digest.
        progress: show a bar on the error stream.

    Raises:
        DownloadError: no network, no such file, a web page, wrong contents, no place to write to. Nothing but a part to
        go on from stays behind, and that only where it can be used.
    """
    target = cache_folder(cache_dir) / file
    if target.is_file():
        return target
    by_hand = f"Download {url} yourself and put it at {target}, or pass the path of the file as pretrained"
    if not points_to_file(url) or not urllib.parse.urlsplit(url).scheme.startswith("http"):
        raise DownloadError(f"{file} cannot be downloaded by a program: {url} is a web page. {by_hand}")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{file}.lock")):
            if not target.is_file():  # another process may have been faster
                _Download(url, target, sha256, by_hand).run(progress)
    return target


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Name the cause where a file of the cache cannot be written."""
    elsewhere = f"choose another folder with cache_dir=... or {CACHE_VARIABLE}"
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
            raise DownloadError(f"no space is left for {target}: free some, or {elsewhere}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"the cache {target.parent} cannot be written to ({error.strerror})"
            raise DownloadError(f"{reason}: {elsewhere}") from error
        raise DownloadError(f"{target} cannot be written ({error.strerror or error}): {elsewhere}") from error


class _Download:
    """One file on its way: a part with the file's ending, and beside it what the server said of the whole."""

    def __init__(self, url: str, target: Path, sha256: str | None, by_hand: str):
        self.url, self.target, self.sha256, self.by_hand = url, target, sha256, by_hand
        self.part = target.with_name(f".{target.stem}.part{target.suffix}")  # readers go by the ending
        self.note = target.with_name(f".{target.name}.json")
        self.began = False

    def run(self, progress: bool) -> None:
        bar = Progress(
            TextColumn(self.target.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not progress, transient=True,
        )  # fmt: skip
        with bar:
            task = bar.add_task("")
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(WAIT * 2 ** (attempt - 1))
                try:
                    self._receive(bar, task)
                    break
                except _Cut as error:
                    reason = str(error)
            else:
                raise DownloadError(f"{self.url} could not be downloaded: {reason}. Try again later. {self.by_hand}")
        self._check()
        os.replace(self.part, self.target)
        self.note.unlink(missing_ok=True)

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _known(self) -> dict[str, Any]:
        """What is known of the whole that the part belongs to; nothing if there is no usable part."""
        try:
            known = json.loads(self.note.read_text())
            usable = known["url"] == self.url and 0 < self.part.stat().st_size <= known["size"]
            usable = usable and (known["version"] or self.began)  # another day the file may be another
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return known if usable else {}

    def _receive(self, bar: Progress, task: Any) -> None:
        """Ask for what is missing and write it.

        Raises:
            _Cut: another attempt may help. DownloadError: none will.
        """
        known = self._known()
        have = self.part.stat().st_size if known else 0
        if known and have == known["size"]:
            return
        headers = {"User-Agent": f"vision_ssm/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if known["version"]:
                headers["If-Range"] = known["version"]
        try:
            response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is of no use to this server
                self.discard()
            if error.code in (*_WORTH_A_RETRY, 416):
                raise _Cut(f"the server answered {error.code} {error.reason}") from error
            self.discard()
            answer = f"the server answered {error.code} {error.reason}"
            raise DownloadError(f"{self.url} could not be downloaded: {answer}. {self.by_hand}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            answer = f"no connection to {urllib.parse.urlsplit(self.url).hostname} ({reason})"
            if isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in _NO_NETWORK:
                raise DownloadError(f"{self.url} could not be downloaded: {answer}. {self.by_hand}") from error
            raise _Cut(answer) from error
        with response:
            self._store(response, known, have, bar, task)

    def _store(self, response: Any, known: dict[str, Any], have: int, bar: Progress, task: Any) -> None:
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            self.discard()
            page = f"{self.url} is a web page, not a weight file: it asks for a login or has moved"
            raise DownloadError(f"{page}. {self.by_hand}")
        length = response.headers.get("Content-Length")
        size = None if length is None else int(length)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and version.startswith("W/"):
            version = None  # a weak one may stand for different bytes
        if response.status == 206:
            first, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if first.split("-")[0] != str(have) or total != str(known["size"]):
                self.discard()
                raise _Cut("the server sent another part than the one asked for")
            size = known["size"]
        else:
            have = 0  # the server begins anew: another file by now, or it knows no parts
            self.note.write_text(json.dumps({"url": self.url, "version": version, "size": size}))
            self.began = True
        if size is not None and shutil.disk_usage(self.part.parent).free < size - have:
            self.discard()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        bar.update(task, total=size, completed=have)
        with self.part.open("ab" if have else "wb") as out:
            self._copy(response, out, bar, task)
        received = self.part.stat().st_size
        if size is not None and received < size:
            raise _Cut(f"the connection was cut after {received:,} of {size:,} bytes")
        if size is not None and received > size:
            self.discard()
            raise _Cut(f"the server sent {received:,} bytes and announced {size:,}")

    def _copy(self, response: Any, out: BinaryIO, bar: Progress, task: Any) -> None:
        def block() -> bytes:
            try:
                return response.read1(_BLOCK)
            except (http.client.HTTPException, OSError) as error:
                raise _Cut(f"the connection was cut ({error or type(error).__name__})") from error

        try:
            while received := block():
                out.write(received)
                bar.advance(task, len(received))
            out.flush()
            os.fsync(out.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.discard()  # others may need the space
            raise

    def _check(self) -> None:
        """Whether the part is what was asked for; it is thrown away if not."""
        try:
            if self.sha256 is not None:
                with self.part.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != self.sha256:
                    raise DownloadError(
                        f"{self.url} is not the published file: its sha256 is {digest}, expected {self.sha256}."
                        f" Try again. {self.by_hand}"
                    )
            try:
                read_checkpoint(self.part)
            except CheckpointError as error:
                raise DownloadError(f"what {self.url} sent is no weight file: {error}. {self.by_hand}") from error
        except DownloadError:
            self.discard()
            raise

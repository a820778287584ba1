"""Downloads against a local server that misbehaves in every way we know, and what is left in the cache afterwards."""

import errno
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import vision_ssm
from vision_ssm import download
from vision_ssm.download import DownloadError, cache_folder, fetch
from vision_ssm.factory import find_family, list_models, list_unets
from vision_ssm.published import fetch_weights

PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"


def checkpoint(value: float = 1.0, size: int = 60_000) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.full((size,), value)}}, buffer)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under ``/weights.pth``.

    Attributes:
        faults: what goes wrong with the next answers, first to last; then all is well. ``"cut"``: the connection ends
            after a third of what was asked for. A number: that status. Anything of bytes: that content. ``"html"``, a
            page. ``"redirect"``. ``"shifted"``: a part from another place.
        ranges: whether a request for a part gets a part.
        etag: what names this version of the content; None: nothing.
        asked: every request, as (path, its Range header or None).
    """

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.ranges, self.etag = content, [], True, '"one"'
        self.asked: list[tuple[str, str | None]] = []
        self.wait = threading.Event()
        self.wait.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        part = self.headers.get("Range")
        server.asked.append((self.path, part))
        fault = server.faults.pop(0) if server.faults else None
        server.wait.wait(30)
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere/file?token=1")
            return self.end_headers()
        content = fault if isinstance(fault, bytes) else PAGE if fault == "html" else server.content
        first = int(part.removeprefix("bytes=").rstrip("-")) if part else 0
        known = self.headers.get("If-Range") in (None, server.etag)
        partial = bool(part) and server.ranges and known and fault != "html"
        if partial and first >= len(content):
            return self.send_error(416)
        body = content[first:] if partial else content
        self.send_response(206 if partial else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if fault == "html" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        if partial:
            start = first + 7 if fault == "shifted" else first
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[: len(body) // 3] if fault == "cut" else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(checkpoint())
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, folder, **options) -> Path:
    return fetch(server.url, "weights.pth", cache_dir=folder, progress=False, **options)


def left(folder: Path) -> list[str]:
    """Names in the cache, without the empty lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_downloads_once(server, tmp_path):
    digest = hashlib.sha256(server.content).hexdigest()
    file = get(server, tmp_path / "new" / "cache", sha256=digest)
    assert file == tmp_path / "new" / "cache" / "weights.pth" and file.read_bytes() == server.content
    assert get(server, tmp_path / "new" / "cache") == file and len(server.asked) == 1
    assert left(file.parent) == ["weights.pth"]


# Six faults of six


@pytest.mark.parametrize("etag", ['"one"', None, 'W/"weak"'])
def test_a_cut_connection_is_resumed(server, tmp_path, etag):
    server.etag, server.faults = etag, ["cut", "cut"]
    assert get(server, tmp_path).read_bytes() == server.content and left(tmp_path) == ["weights.pth"]
    starts = [0 if part is None else int(part[6:-1]) for _, part in server.asked]
    assert starts == sorted(set(starts)) and len(starts) == 3, "each attempt goes on where the last one ended"


def test_a_cut_download_is_resumed_by_a_later_call(server, tmp_path):
    server.faults = ["cut"] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=r"the connection was cut after [\d,]+ of [\d,]+ bytes. Try again later. Download http"):
        get(server, tmp_path)
    assert left(tmp_path) == [".weights.part.pth", ".weights.pth.json"]
    have = (tmp_path / ".weights.part.pth").stat().st_size
    server.asked.clear()
    assert get(server, tmp_path).read_bytes() == server.content and server.asked == [("/weights.pth", f"bytes={have}-")]
    assert left(tmp_path) == ["weights.pth"]


def test_another_version_is_not_put_behind_a_part(server, tmp_path):
    server.faults = ["cut"] * download.ATTEMPTS
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    server.content, server.etag = checkpoint(2.0), '"two"'
    assert get(server, tmp_path).read_bytes() == server.content


@pytest.mark.parametrize("fault", ["shifted", 416])
def test_a_wrong_part_starts_anew(server, tmp_path, fault):
    server.faults = ["cut", fault]
    assert get(server, tmp_path).read_bytes() == server.content
    assert [part is None for _, part in server.asked] == [True, False, True]


def test_wrong_bytes_are_thrown_away(server, tmp_path):
    good, wrong = server.content, bytearray(server.content)
    wrong[1000:1400] = bytes(400)
    for content, message in ((bytes(wrong), "sha256 is"), (checkpoint(2.0), "is not the published file: its sha256 is")):
        server.faults = [content]
        with pytest.raises(DownloadError, match=message):
            get(server, tmp_path, sha256=hashlib.sha256(good).hexdigest())
        assert left(tmp_path) == []
    for content in (good[: len(good) // 2], os.urandom(5000), b""):  # where no sha256 is known
        server.faults = [content]
        with pytest.raises(DownloadError, match=r"sent is no weight file: .*(corrupt|is empty).*Download http"):
            get(server, tmp_path)
        assert left(tmp_path) == []
    assert get(server, tmp_path).read_bytes() == good


@pytest.mark.parametrize("code", [404, 403, 410])
def test_no_such_file(server, tmp_path, code):
    server.faults = [code]
    with pytest.raises(DownloadError, match=rf"could not be downloaded: the server answered {code} .*put it at {tmp_path}/weights.pth"):
        get(server, tmp_path)
    assert len(server.asked) == 1 and left(tmp_path) == []


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.faults = [503, 429, 500]
    assert get(server, tmp_path).read_bytes() == server.content
    server.faults = [503] * download.ATTEMPTS
    with pytest.raises(DownloadError, match="the server answered 503 Service Unavailable. Try again later"):
        fetch(server.url, "other.pth", cache_dir=tmp_path, progress=False)


def test_redirects_are_followed(server, tmp_path):
    server.faults = ["redirect", "cut", "redirect"]
    assert get(server, tmp_path).read_bytes() == server.content
    assert [path for path, _ in server.asked] == ["/weights.pth", "/elsewhere/file?token=1"] * 2


def test_a_server_without_ranges(server, tmp_path):
    server.ranges, server.faults = False, ["cut", "cut"]
    assert get(server, tmp_path).read_bytes() == server.content and len(server.asked) == 3


def test_a_web_page_is_no_file(server, tmp_path):
    server.faults = ["html"]
    with pytest.raises(DownloadError, match="is a web page, not a weight file: it asks for a login or has moved. Download http"):
        get(server, tmp_path)
    server.faults = [PAGE]  # under another type
    with pytest.raises(DownloadError, match="is a web page, not a checkpoint"):
        get(server, tmp_path)
    server.faults = ["cut", "html"]  # a link that stops being good
    with pytest.raises(DownloadError, match="is a web page, not a weight file"):
        get(server, tmp_path)
    assert left(tmp_path) == []


# Folder, disk, network, company


def raises(number: int):
    def act(*args, **options):
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_to(server, tmp_path, monkeypatch, number):
    message = rf"the cache {tmp_path}\S* cannot be written to \({os.strerror(number)}\): choose another folder with cache_dir"
    monkeypatch.setattr(Path, "mkdir", raises(number))
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path / "below")
    monkeypatch.undo()
    monkeypatch.setattr(os, "open", raises(number))  # the lock is the first file
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path)
    assert server.asked == [] and left(tmp_path) == []


def test_a_file_in_the_place_of_the_cache(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="weights.pth cannot be written .*: choose another folder"):
        get(server, tmp_path / "file")


def test_a_full_disk(server, tmp_path, monkeypatch):
    message = rf"no space is left for {tmp_path}/weights.pth: free some, or choose another folder"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)  # known before the first byte
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path)
    assert left(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", raises(errno.ENOSPC))  # or only when it is written
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path)
    assert left(tmp_path) == []


def test_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 2.0)
    monkeypatch.setenv("no_proxy", "*")
    entry = find_family("vmamba_tiny_s1l8").weights_of("vmamba_tiny_s1l8")[""]
    monkeypatch.setattr(find_family("vmamba_tiny_s1l8"), "published", {
        "vmamba_tiny_s1l8": dict(entry, url="http://host.invalid/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    })  # fmt: skip
    with pytest.raises(DownloadError) as raised:
        vision_ssm.create_model("vmamba_tiny_s1l8", pretrained=True, cache_dir=tmp_path)
    assert "no connection to host.invalid" in str(raised.value)
    assert f"Download http://host.invalid/{entry['file']} yourself and put it at {tmp_path / entry['file']}," in str(raised.value)
    with pytest.raises(DownloadError, match="no connection to 127.0.0.1 .*refused"):
        fetch("http://127.0.0.1:9/weights.pth", "weights.pth", cache_dir=tmp_path, progress=False)


def test_two_processes_at_once(server, tmp_path):
    """They ask for one file, of which one downloads it; the other waits and finds it."""
    server.wait.clear()
    server.faults = ["cut"]
    run = [multiprocessing.get_context("fork").Process(target=get, args=(server, tmp_path)) for _ in range(2)]
    for process in run:
        process.start()
    threading.Timer(0.3, server.wait.set).start()
    for process in run:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "weights.pth").read_bytes() == server.content and left(tmp_path) == ["weights.pth"]
    assert len(server.asked) == 2, "the second process downloads nothing"


def test_threads_at_once(server, tmp_path):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get(server, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "weights.pth"] * 4 and len(server.asked) == 1


# From names of models


@contextmanager
def published_at(monkeypatch, server, name: str, **facts):
    family = find_family(name)
    monkeypatch.setattr(family, "published", {**family.published, name: dict(url=server.url, **facts)})
    yield family


def test_models_from_the_net(server, tmp_path, monkeypatch, capsys):
    model = vision_ssm.create_model("vmamba_micro")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    server.content = (tmp_path / "weights.pth").read_bytes()
    monkeypatch.setenv("VISION_SSM_CACHE", str(tmp_path / "cache"))
    with published_at(monkeypatch, server, "vmamba_micro", file="micro.pth"):
        loaded = vision_ssm.create_model("vmamba_micro", pretrained=True)
        assert torch.equal(loaded.head.weight, model.head.weight) and left(tmp_path / "cache") == ["micro.pth"]
        fresh = vision_ssm.create_model("vmamba_micro", pretrained=True, num_classes=3, reset_head=True, in_chans=1)
        assert fresh.num_classes == 3 and len(server.asked) == 1
        assert "adapted to other channels of the image: stem.conv1.weight" in capsys.readouterr().out
        with pytest.raises(vision_ssm.CheckpointError, match="1000 classes in the file and 3 in the model"):
            vision_ssm.create_model("vmamba_micro", pretrained=True, num_classes=3)
        with pytest.raises(ValueError, match="unknown stem"):
            vision_ssm.create_model("vmamba_micro", pretrained=True, stem="convs", cache_dir=tmp_path / "other")
        assert not (tmp_path / "other").exists(), "nothing is downloaded for a model that cannot be built"
        for encoder in ("vmamba_micro", dict(name="vmamba_micro", drop_path_rate=0.1)):
            options = dict(encoder=encoder, encoder_weights=True, cache_dir=tmp_path / "third")
            unet = vision_ssm.create_model("encoder_unet", **options)
            assert torch.equal(unet.encoder.stem.conv1.weight, model.stem.conv1.weight)
        assert left(tmp_path / "third") == ["micro.pth"]


def test_averaged_weights_are_taken_as_published(server, tmp_path, monkeypatch):
    raw, averaged = (vision_ssm.create_model("vmamba_micro").state_dict() for _ in range(2))
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "weights.pth")
    server.content = (tmp_path / "weights.pth").read_bytes()
    for ema, expected in ((True, averaged), (False, raw)):
        with published_at(monkeypatch, server, "vmamba_micro", ema=ema):
            model = vision_ssm.create_model("vmamba_micro", pretrained=True, cache_dir=tmp_path / "cache")
            assert torch.equal(model.head.weight, expected["head.weight"])


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("VISION_SSM_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("VISION_SSM_CACHE", "~/weights")
    assert cache_folder() == Path.home() / "weights" and cache_folder(tmp_path) == tmp_path


def test_every_published_weight_can_be_named_and_cached():
    """Every tag is one, every name in the cache belongs to one file, and every link is a file's or a page's."""
    files, links = Counter(), Counter()
    for name in list_models():
        family = find_family(name)
        found = family.weights_of(name)
        assert len(found) == 1 + len(family.published[name].get("also", ())) if found else True
        assert len(found) < 2 or all(tag and "." not in tag for tag in found)
        for entry in found.values():
            files[entry["file"]] += 1
            links[entry["url"]] += 1
            assert entry["url"].startswith("https://") and "/blob/" not in entry["url"] and "also" not in entry
            assert entry["paper"].startswith("arXiv:") and Path(entry["file"]).stem not in ("l1", "l2", "l3", "best")
            assert "sha256" not in entry or len(entry["sha256"]) == 64
    assert set(files.values()) == set(links.values()) == {1} and len(files) > 50
    assert not any("sha256" in entry for name in list_models() for entry in find_family(name).weights_of(name).values())


def test_what_is_not_published():
    for name in ("vmamba_micro", "lbvim_tiny", "localvmamba_tiny", "plstm_vis_t"):
        with pytest.raises(ValueError, match=f"no official weights are published for it .model {name}."):
            vision_ssm.create_model(name, pretrained=True)
    for name in list_unets("*micro"):
        with pytest.raises(ValueError, match=f"no weights are published for the encoder of {name}: name a file"):
            vision_ssm.create_model(name, encoder_weights=True)


@pytest.mark.parametrize("name,place", [("spatialmamba_base", "drive.google.com/file"), ("msvmamba_nano", "drive.google.com/drive/folders"), ("groupmamba_small", "huggingface.co/Abdel")])
def test_pages_to_download_from(name, place, tmp_path):
    with pytest.raises(DownloadError, match=rf"is a web page. Download https://{place}\S+ yourself and put it at {tmp_path}/{name}.pth, or"):
        fetch_weights(find_family(name), name, cache_dir=tmp_path)
    (tmp_path / f"{name}.pth").write_bytes(checkpoint())  # what the message says works
    assert fetch_weights(find_family(name), name, cache_dir=tmp_path) == tmp_path / f"{name}.pth"
    for link in ("https://pan.baidu.com/s/1abc", "ftp://host/file.pth", "no/link.pth"):
        with pytest.raises(DownloadError, match="cannot be downloaded by a program"):
            fetch(link, "x.pth", cache_dir=tmp_path)


def test_an_unreadable_note_is_ignored(server, tmp_path):
    (tmp_path / ".weights.part.pth").write_bytes(b"from elsewhere")
    for note in ("no json", json.dumps({}), json.dumps({"url": server.url, "version": "x", "size": None})):
        (tmp_path / ".weights.pth.json").write_text(note)
        assert get(server, tmp_path).read_bytes() == server.content
        (tmp_path / "weights.pth").rename(tmp_path / ".weights.part.pth")
    assert all(part is None for _, part in server.asked)

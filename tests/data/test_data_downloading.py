"""Downloading, against HTTP servers on this machine that behave in every way that servers do."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from krdistill.data import SOURCES, SourceInfo, download
from krdistill.data.sources import Archive
from krdistill.errors import ArgumentError, DataError

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
NOISE = np.random.RandomState(0).bytes(3_000_000)


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as file:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                file.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zipped(members: dict[str, bytes], mode: int = 0o100644) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content)
    return stream.getvalue()


GOOD = tar({"set/train": NOISE, "set/deep/er/meta": b"names"})


def source(content: bytes = GOOD, filename: str = "set.tar.gz", url: str = "http://127.0.0.1:1/none") -> SourceInfo:
    return SourceInfo(
        name="made",
        description="",
        citation="",
        folder="set",
        files={"train": None},
        archive=Archive(url, filename, hashlib.md5(content).hexdigest()),
    )


class Server:
    """Serves ``content``; what it does wrong is set by the test."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[str | None] = []
        self.agents: set[str | None] = set()
        self.resumes = True
        self.announces = True
        self.shift = 0  # starts a range this much too early
        self.breaks: list[int] = []  # bytes after which each coming answer breaks off
        self.status = 0
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        self.agents.add(handler.headers.get("User-Agent"))
        if self.status:
            handler.send_error(self.status)
            return
        start = 0
        if asked and self.resumes:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) - self.shift
            if start >= len(self.content):
                handler.send_error(416)
                return
        body = self.content[start:]
        handler.send_response(206 if asked and self.resumes else 200)
        if asked and self.resumes:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.announces:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        stop = self.breaks.pop(0) if self.breaks else len(body)
        handler.wfile.write(body[:stop])


@contextmanager
def serving(content: bytes = GOOD) -> Iterator[Server]:
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{web.server_port}/set.tar.gz"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


def is_whole(root: Path) -> bool:
    left = sorted(p.name for p in root.iterdir())
    return left == ["set"] and (root / "set/train").read_bytes() == NOISE and (root / "set/deep/er/meta").is_file()


def test_download_and_unpack(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    root = tmp_path / "new" / "root"
    folder = download(source(), root, url=server.url, progress=lambda *a: calls.append(a), opener=OPEN)
    assert folder == root / "set" and is_whole(root)
    assert calls[-1] == (len(GOOD), len(GOOD)) and len(calls) >= 3
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})
    assert server.ranges == [None] and all(str(a).startswith("krdistill/") for a in server.agents)
    assert download(source(), root, url=server.url, opener=OPEN) == folder and len(server.ranges) == 1


def test_the_published_address_is_the_default(server: Server, tmp_path: Path) -> None:
    download(source(url=server.url), tmp_path, opener=OPEN)
    assert is_whole(tmp_path)


def test_zip(tmp_path: Path) -> None:
    content = zipped({"set/": b"", "set/train": NOISE, "set/deep/er/meta": b"names"})
    with serving(content) as server:
        download(source(content, "set.zip"), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path)


def test_a_broken_connection_is_resumed_at_once(server: Server, tmp_path: Path) -> None:
    server.breaks = [1_000_000, 1_200_000]
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path) and server.ranges == [None, "bytes=1000000-", "bytes=2200000-"]


def test_a_broken_connection_is_resumed_later(server: Server, tmp_path: Path) -> None:
    server.breaks = [1_000_000, 0]
    with pytest.raises(DataError, match=r"broke off after 1,000,000 bytes: .*another try resumes it"):
        download(source(), tmp_path, url=server.url, opener=OPEN)
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz.part"]
    calls: list[int] = []
    download(source(), tmp_path, url=server.url, progress=lambda done, total: calls.append(done), opener=OPEN)
    assert is_whole(tmp_path) and server.ranges[-1] == "bytes=1000000-" and calls[0] > 1_000_000


def test_a_server_that_cannot_resume_starts_again(server: Server, tmp_path: Path) -> None:
    server.resumes = False
    server.breaks = [1_000_000]
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path) and server.ranges == [None, "bytes=1000000-"]


def test_a_server_that_always_breaks_off_is_given_up(server: Server, tmp_path: Path) -> None:
    server.resumes = False
    server.breaks = [1_000_000] * 50
    with pytest.raises(DataError, match="broke off after 1,000,000 bytes"):
        download(source(), tmp_path, url=server.url, opener=OPEN)
    assert len(server.ranges) <= 3
    server.resumes, server.breaks = True, [1000] * 50
    (tmp_path / "set.tar.gz.part").unlink()
    with pytest.raises(DataError, match="broke off 10 times"):
        download(source(), tmp_path, url=server.url, opener=OPEN)


def test_a_wrong_piece_is_found_and_all_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.shift = 7
    server.breaks = [1_000_000]
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path) and server.ranges == [None, "bytes=1000000-", None]


def test_without_content_length(server: Server, tmp_path: Path) -> None:
    server.announces = False
    totals = set()
    download(source(), tmp_path, url=server.url, progress=lambda done, total: totals.add(total), opener=OPEN)
    assert is_whole(tmp_path) and totals == {None}


def test_a_part_that_is_whole_already(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(GOOD)
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path) and server.ranges == [f"bytes={len(GOOD)}-"]


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * (len(GOOD) + 5)])
def test_a_part_of_another_file_is_fetched_anew(server: Server, tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(stale)
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path) and server.ranges == [f"bytes={len(stale)}-", None]


def test_wrong_bytes_are_refused_and_removed(tmp_path: Path) -> None:
    with serving(b"<html>please log in</html>") as server, pytest.raises(DataError) as caught:
        download(source(), tmp_path, url=server.url, opener=OPEN)
    message = str(caught.value)
    assert hashlib.md5(server.content).hexdigest() in message and hashlib.md5(GOOD).hexdigest() in message
    assert server.url in message and "web page" in message
    assert list(tmp_path.iterdir()) == [] and len(server.ranges) == 1


@pytest.mark.parametrize("status", [403, 404, 500])
def test_error_answers(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(DataError, match=rf"answered {status} .*put it at {re.escape(str(tmp_path))}/set.tar.gz"):
        download(source(), tmp_path, url=server.url, opener=OPEN)
    assert list(tmp_path.iterdir()) == [] and len(server.ranges) == 1


def test_a_server_error_on_the_way_keeps_what_is_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(GOOD[:1000])
    server.status = 503
    with pytest.raises(DataError, match="broke off after 1,000 bytes: the server answered 503"):
        download(source(), tmp_path, url=server.url, opener=OPEN)
    server.status = 0
    download(source(), tmp_path, url=server.url, opener=OPEN)
    assert is_whole(tmp_path)


def test_without_a_network(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(DataError) as caught:
        download(source(), tmp_path, url=url, opener=OPEN)
    message = str(caught.value)
    assert f"No connection to {url}" in message and f"put it at {tmp_path}/set.tar.gz" in message
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_times_out(tmp_path: Path) -> None:
    hold = threading.Event()
    with serving() as server:
        server.answer = lambda handler: hold.wait(5) and None
        with pytest.raises(DataError, match=r"No connection .*timed out"):
            download(source(), tmp_path, url=server.url, timeout=0.2, opener=OPEN)
        hold.set()


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(GOOD)
    download(source(), tmp_path, opener=_no_network)
    assert (tmp_path / "set.tar.gz").is_file() and (tmp_path / "set" / "train").read_bytes() == NOISE


def test_a_wrong_archive_put_there_by_hand_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(GOOD[:-1])
    with pytest.raises(DataError, match=r"set.tar.gz has md5 \w+, expected \w+; remove it"):
        download(source(), tmp_path, opener=_no_network)
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]


def _no_network(*_: object, **__: object) -> None:
    raise AssertionError("nothing should have been fetched")


def test_a_folder_that_is_not_whole_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(DataError, match="set is there but lacks train; remove it"):
        download(source(), tmp_path, opener=_no_network)
    assert (tmp_path / "set" / "mine").exists()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("content", "filename", "message"),
    [
        (tar({"set/train": b"", "../out": b"x"}), "a.tar.gz", r"'../out' would lie outside"),
        (tar({"set/train": b"", "set/../../out": b"x"}), "a.tar.gz", "would lie outside"),
        (tar({"set/train": b"", "/krdistill-test-out": b"x"}), "a.tar.gz", "would lie outside"),
        (tar({"set/train": b"", "set/l": link("set/l", "../../out")}), "a.tar.gz", "neither a file nor a folder"),
        (tar({"l": link("set/h", "/etc/passwd", tarfile.LNKTYPE)}), "a.tar.gz", "neither a file nor a folder"),
        (tar({"f": link("set/f", "", tarfile.FIFOTYPE)}), "a.tar.gz", "neither a file nor a folder"),
        (zipped({"set/train": b"", "../out": b"x"}), "a.zip", "would lie outside"),
        (zipped({"set/train": b"", "set\\..\\..\\out": b"x"}), "a.zip", "would lie outside"),
        (zipped({"set/l": b"../../out"}, 0o120777), "a.zip", "neither a file nor a folder"),
        (tar({"other/train": b""}), "a.tar.gz", "has no folder set"),
        (GOOD[:-100_000], "a.tar.gz", "is damaged"),
        (b"nothing", "a.tar.gz", "is damaged"),
        (b"nothing", "a.zip", "is damaged"),
    ],
)
def test_archives_that_are_not_unpacked(tmp_path: Path, content: bytes, filename: str, message: str) -> None:
    root = tmp_path / "root"
    with serving(content) as server, pytest.raises(DataError, match=message):
        download(source(content, filename), root, url=server.url, opener=OPEN)
    assert [p.name for p in root.iterdir()] == [filename], "nothing but the archive, whose checksum was right"
    assert [p.name for p in tmp_path.iterdir()] == ["root"]
    assert not Path("/krdistill-test-out").exists()


def test_an_interruption_leaves_no_half_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(source(), tmp_path, url=server.url, progress=stop, opener=OPEN)
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz.part"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", _full_disk)
        with pytest.raises(DataError, match=r"made cannot be written under .*No space left on device"):
            download(source(), tmp_path, url=server.url, opener=OPEN)
    assert [p.name for p in tmp_path.iterdir()] == ["set.tar.gz"]
    download(source(), tmp_path, opener=_no_network)
    assert (tmp_path / "set" / "train").read_bytes() == NOISE


def _full_disk(*_: object) -> None:
    raise OSError(28, os.strerror(28))


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written under"):
        download(source(), tmp_path / "file", opener=_no_network)


def test_a_second_download_waits_for_the_first(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(download, source(), tmp_path, url=server.url, opener=OPEN) for _ in range(3)]
        assert [w.result(timeout=30) for w in work] == [tmp_path / "set"] * 3
    assert is_whole(tmp_path) and server.ranges == [None]


def test_what_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="digits needs no download"):
        download("digits")
    with pytest.raises(DataError, match="Unknown data source 'imagenet'"):
        download("imagenet")
    with pytest.raises(ArgumentError, match="http:// or https://"):
        download("cifar100", url="file:///etc/passwd")
    for info in SOURCES.values():
        if info.archive:
            assert info.archive.url.endswith(info.archive.filename)

"""Downloads from a server on this machine that behaves as servers do; nothing here touches the internet."""

from __future__ import annotations

import errno
import hashlib
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gan import models
from gan.errors import GanError
from gan.models import download
from gan.models.download import BASE_VARIABLE, cache_folder, local_path
from gan.presets import PRETRAINED

pytest.importorskip("requests")
CONTENT = bytes(range(256)) * 4000  # 1 MB


class Server(ThreadingHTTPServer):
    """One file at every path, and what happens when it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.tag: str | None = '"v1"'
        self.sends: list[int | None] = []  # bytes after which answers break off, one after the other
        self.plan: dict[str, Any] = {}  # status, type, claimed length, ranges ignored
        self.asked: list[str | None] = []  # the Range of each request

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/folder/net.pkl"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, plan = self.server, self.server.plan
        asked = self.headers.get("Range")
        server.asked.append(asked)
        begin = 0
        if asked and self.headers.get("If-Range") == server.tag and not plan.get("ignores_ranges"):
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
        if begin and begin >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[begin:]
        self.send_response(plan.get("status", 206 if begin else 200), plan.get("reason"))
        for name, value in plan.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", plan.get("type", "application/octet-stream"))
        if "length" not in plan or plan["length"] is not None:
            self.send_header("Content-Length", str(plan.get("length", len(body))))
        if server.tag:
            self.send_header("ETag", server.tag)
        if begin:
            last = len(server.content) - 1
            self.send_header("Content-Range", plan.get("range", f"bytes {begin}-{last}/{len(server.content)}"))
        self.end_headers()
        cut = server.sends.pop(0) if server.sends else None
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; failures are not waited for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(BASE_VARIABLE, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.chdir(tmp_path)
    return cache_folder()


def files(cache: Path) -> list[str]:
    return sorted(path.name.split("-", 1)[-1] for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once_and_then_used_without_asking(server: Server, cache: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = local_path(server.url, progress=lambda *at: told.append(at))
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-net.pkl")
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert files(cache) == ["net.pkl"]
    server.shutdown()
    assert local_path(server.url) == path
    assert len(server.asked) == 1
    assert local_path(str(path)) == path


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server: Server) -> None:
    server.sends = [300_000, 1, 500_000]
    assert local_path(server.url).read_bytes() == CONTENT
    first, *begins = [0 if asked is None else int(asked.strip("bytes=-")) for asked in server.asked]
    assert first == 0
    assert begins[0] == begins[1]  # a byte is not much
    for begin, sent in zip(begins[1:], (300_000, begins[1] + 500_000), strict=True):
        assert sent - 2**14 <= begin <= sent


def fails(server: Server, **plan: Any) -> str:
    server.plan = plan
    with pytest.raises(GanError) as caught:
        local_path(server.url)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(server.url) or "no space" in text
    return text


def test_what_came_of_a_broken_download_is_kept_for_the_next_one(server: Server, cache: Path) -> None:
    server.sends = [200_000, 0, 0, 0, 0, 0, 0]
    text = fails(server)
    assert "(the connection broke off after 196608 of 1024000 bytes)" in text
    assert "the 0.2 MB that came are kept, and the same command goes on from there" in text
    assert files(cache) == ["net.pkl.part", "net.pkl.part.json"]
    server.sends, server.asked = [], []
    assert local_path(server.url).read_bytes() == CONTENT
    assert server.asked == ["bytes=196608-"]


def test_a_download_that_was_interrupted_goes_on(server: Server, cache: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_path(server.url, progress=interrupt)
    assert local_path(server.url).read_bytes() == CONTENT
    assert server.asked[0] is None
    assert int(str(server.asked[1]).removeprefix("bytes=").removesuffix("-")) > 500_000


def test_one_that_was_killed_before_its_last_step_is_not_fetched_again(server: Server, cache: Path) -> None:
    path = local_path(server.url)
    path.rename(path.with_name(path.name + ".part"))
    path.with_name(path.name + ".part.json").write_text('{"version": "\\"v1\\""}')
    assert local_path(server.url).read_bytes() == CONTENT
    assert server.asked[1:] == [f"bytes={len(CONTENT)}-"]


def changed(server: Server) -> None:
    server.content, server.tag = CONTENT[::-1], '"v2"'


def ignores_ranges(server: Server) -> None:
    server.plan = {"ignores_ranges": True}


def has_no_versions(server: Server) -> None:
    server.tag = None


def has_weak_tags(server: Server) -> None:
    server.tag = 'W/"v1"'


def changed_with_a_weak_tag(server: Server) -> None:
    server.content = CONTENT[::-1]


def sends_something_else(server: Server) -> None:
    server.plan = {"range": f"bytes 7-999/{len(CONTENT)}"}


@pytest.mark.parametrize(
    ("before", "between"),
    [
        (None, changed),
        (None, ignores_ranges),
        (None, sends_something_else),
        (has_no_versions, None),
        (has_weak_tags, changed_with_a_weak_tag),
    ],
)
def test_parts_of_two_files_are_never_put_together(
    before: Callable[[Server], None] | None, between: Callable[[Server], None] | None, server: Server
) -> None:
    if before:
        before(server)
    server.sends = [200_000, 0, 0, 0, 0, 0, 0, 0]
    fails(server)
    server.sends = []
    if between:
        between(server)
    assert local_path(server.url).read_bytes() == server.content


def test_a_part_of_nothing_known_is_begun_anew(server: Server, cache: Path) -> None:
    path = local_path(server.url)
    path.rename(path.with_name(path.name + ".part"))
    for note in (None, "{", "[]", '{"version": 3}'):
        if note is not None:
            path.rename(path.with_name(path.name + ".part"))
            path.with_name(path.name + ".part.json").write_text(note)
        assert local_path(server.url).read_bytes() == CONTENT
    assert set(server.asked) == {None}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"status": 404}, "is not there (404 Not Found); check the address, or fetch the file elsewhere and give its"),
        ({"status": 403}, "the server does not hand it out (403 Forbidden)"),
        ({"status": 503}, "cannot be fetched (the server answers 503 Service Unavailable)"),
        ({"type": "text/html; charset=utf-8"}, "is a web page, not a model; give the address of the file itself"),
        ({"length": len(CONTENT) + 1}, "cannot be fetched (the connection broke off after"),
        ({"length": 10**15}, "no space left on the device"),
    ],
)  # fmt: skip
def test_what_is_no_download_is_one_clear_line(plan: dict[str, Any], words: str, server: Server, cache: Path) -> None:
    server.tag = None
    assert words in fails(server, **plan)
    assert "net.pkl" not in files(cache)


REFUSED = b"503 backend busy, retry"


@pytest.mark.parametrize(("content", "length"), [(REFUSED, len(REFUSED)), (b"<!doctype html>", 15), (CONTENT, None)])
def test_what_turns_out_to_be_no_model_is_fetched_again(
    content: bytes, length: int | None, server: Server, cache: Path, tmp_path: Path
) -> None:
    server.content, server.plan = content, {"length": length}
    for times in (1, 2):
        with pytest.raises(GanError, match=r"it is no longer kept, and will be fetched again the next time$"):
            models.load(server.url)
        assert len(server.asked) == times
        assert files(cache) == []
    (tmp_path / "mine.pkl").write_bytes(content)
    for mine in (tmp_path / "mine.pkl", (tmp_path / "mine.pkl").as_uri()):
        with pytest.raises(GanError, match=r"(model|fetch the file itself|known|damaged)[^;]*$"):
            models.load(mine)
    assert (tmp_path / "mine.pkl").exists()


def test_what_has_the_right_checksum_is_kept(server: Server, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(GanError) as caught:
            models.load(f"{server.url}#sha256={hashlib.sha256(CONTENT).hexdigest()}")
        assert "again" not in str(caught.value)
    assert len(server.asked) == 1


def test_nothing_is_no_file(server: Server, cache: Path) -> None:
    server.content = b""
    assert "the server sends an empty file" in fails(server)
    server.content = CONTENT
    server.plan = {}
    assert local_path(server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "1" + "0" * 30, "-1", ""])
def test_a_length_that_is_no_number_is_none(length: str, server: Server) -> None:
    server.plan = {"length": length}
    try:
        assert local_path(server.url).read_bytes() == CONTENT
    except GanError as error:
        assert "the connection broke off after" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "range", ["bytes 196608-1023999/" + "9" * 5000, "bytes \xb2-5/7", "bytes 196608-1023999/200000"]
)
def test_a_range_that_cannot_be_is_not_gone_on_with(range: str, server: Server) -> None:
    server.sends = [200_000, 0, 0, 0, 0, 0, 0, 0]
    fails(server)
    server.sends, server.asked, server.plan = [], [], {"range": range}
    assert local_path(server.url).read_bytes() == CONTENT
    assert server.asked == ["bytes=196608-", None]


@pytest.mark.parametrize("address", ["http://[", "http://.a/", "http://a:99999999/", "file:///etc/passwd", "ftp://a/b"])
def test_an_answer_that_leads_to_no_address_is_one_clear_line(address: str, server: Server) -> None:
    assert "is no address, or leads to none" in fails(server, status=302, headers={"Location": address})


def test_what_is_packed_on_the_way_is_refused(server: Server) -> None:
    text = fails(server, headers={"Content-Encoding": "gzip"})
    assert "the server packs it, which it was asked not to do" in text
    server.plan = {"headers": {"Content-Encoding": "identity"}}
    assert local_path(server.url).read_bytes() == CONTENT


def test_a_first_answer_of_no_such_range_is_one_clear_line(server: Server) -> None:
    text = fails(server, status=416, headers={"Content-Range": "bytes */0"})
    assert "is not there (416 Requested Range Not Satisfiable)" in text


def test_a_servers_words_are_printable(server: Server) -> None:
    text = fails(server, status=404, reason="\x1b]0;pwned\x07" + "x" * 1000)
    assert text.isprintable()
    assert len(text) < 400


def test_a_password_is_not_shown(server: Server) -> None:
    url = server.url.replace("//", "//me:secret@")
    server.plan = {"status": 404}
    for where in (url, f"{url}#x", url.replace("http", "ftp"), "http://me:secret@[/", "http://me:secret@a b/"):
        with pytest.raises(GanError) as caught:
            local_path(where)
        assert "secret" not in str(caught.value)
    server.plan = {}
    with pytest.raises(GanError) as caught:
        models.load(url)
    assert str(caught.value).startswith(server.url)
    assert "secret" not in str(caught.value)


def test_room_is_looked_for_while_nobody_knows_how_much_will_come(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_ROOM", 100_000)
    free = iter([200_000, 200_000, 99_999])
    monkeypatch.setattr(download, "disk_size", lambda folder: (10**9, next(free)))
    assert "no space left on the device" in fails(server, length=None)


def test_a_checksum_is_checked(server: Server, cache: Path) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(GanError, match=f"another sha256 \\({right}\\)"):
        local_path(f"{server.url}#sha256={'0' * 64}")
    assert not any("net.pkl" in name and "json" not in name for name in files(cache))
    assert local_path(f"{server.url}#sha256={right.upper()}").read_bytes() == CONTENT
    with pytest.raises(GanError, match="must be sha256= and 64 hexadecimal digits"):
        local_path(f"{server.url}#md5=3")


def test_without_a_connection_it_says_what_to_do() -> None:
    with Server() as gone:
        url = gone.url
    with pytest.raises(GanError) as caught:
        local_path(url)
    host = url.split("/")[2]
    assert str(caught.value) == (
        f"{url}: cannot be fetched (there is no connection to {host}); try again later, or fetch the file elsewhere "
        "and give its path"
    )


def test_without_requests_it_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    assert "needs the package requests: pip install requests" in fails(server)


def test_a_disk_that_fills_up_is_named_and_what_came_is_kept(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opened(path: Path, mode: str, **kwargs: Any) -> Any:
        return Full(path, mode) if path.suffix == ".part" else open(path, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", opened, raising=False)
        with pytest.raises(GanError, match="no space left on the device"):
            local_path(server.url)
    assert local_path(server.url).read_bytes() == CONTENT
    assert server.asked[1] is not None


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(GanError, match="a part of this path is a file"):
        local_path(server.url)


ANOTHER = """
import fcntl, os, sys, time
with open(sys.argv[1] + ".lock", "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(0.3)
    with open(sys.argv[1], "wb") as final:
        final.write(b"fetched by another")
"""


def test_what_another_process_is_fetching_is_waited_for(server: Server) -> None:
    pytest.importorskip("fcntl")
    final = local_path(server.url)
    final.unlink()
    with subprocess.Popen([sys.executable, "-c", ANOTHER, final], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert local_path(server.url).read_bytes() == b"fetched by another"
    assert len(server.asked) == 1


def test_names_are_found_below_the_base(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = server.url.rpartition("/")[0]
    assert local_path("ffhq256", base=base).name.endswith("ffhq-res256-mirror-paper256-noaug.pkl")
    monkeypatch.setenv(BASE_VARIABLE, base + "/other/")
    assert local_path("ffhq256").read_bytes() == CONTENT
    zoo = tmp_path / "my zoo"
    file = zoo / PRETRAINED["ffhq512"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"512")
    (zoo / Path(PRETRAINED["ffhq1024"]).name).write_bytes(b"1024")
    assert local_path("ffhq512", base=str(zoo)).read_bytes() == b"512"
    assert local_path("ffhq1024", base=zoo.as_uri()).read_bytes() == b"1024"
    with pytest.raises(GanError, match=r"lsundog256: .*my zoo.*: no such file"):
        local_path("lsundog256", base=str(zoo))
    (tmp_path / "ffhq256").write_bytes(b"mine")  # what is there is meant
    assert local_path("ffhq256").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("ffhq265", r"ffhq265: cannot be read \(no such file\); did you mean ffhq256\?"),
        ("gone.pkl", r"gone.pkl: cannot be read \(no such file\)$"),
        ("file:///gone.pkl", "no such file"),
        ("ftp://host/net.pkl", "only http, https and file addresses can be opened"),
        ("http://", "is no address"),
        ("http://[", "is no address"),
        ("file://[", "is no address"),
        (f"http://{'a' * 70}.com/", "is no address"),
        ("http://\udc80/", "is no address"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_what_names_nothing_is_said(where: str, words: str) -> None:
    with pytest.raises(GanError, match=words):
        local_path(where)

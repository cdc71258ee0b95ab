"""Have a model file that is somewhere else on this machine: by its name, address or path.

What was fetched stays in a cache, and is used from there without asking anybody. A download is written to `NAME.part`,
which whatever ends it leaves behind for the next one to go on with, and gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import url2pathname

from gan.errors import GanError, one_line, printable, without_password
from gan.files import Locked, disk_size, explain_os_error, flush, lock, readable_size, write_text
from gan.presets import PRETRAINED, PRETRAINED_BASE
from torch_utils.user_cache import user_cache

BASE_VARIABLE = "GAN_PRETRAINED_BASE"
Progress = Callable[[int, int | None], None]  # bytes so far, of how many

_TIMEOUT = (15, 60)  # seconds to connect, and without a byte
_PAUSES = (0.5, 2.0, 5.0)  # seconds after failures without a byte in between
_CHUNK = 2**14  # what is lost at most when a connection breaks off
_LOCK_SECONDS = 0.2
_ROOM = 10**8  # bytes after which it is asked again whether there is room, where nobody says how many will come
_NUMBER = "[0-9]{1,18}"  # what a server's number may look like: int() takes more, and fails at more
_ELSEWHERE = "or fetch the file elsewhere and give its path"


class _Broken(Exception):
    """A download failed in a way that may be over soon."""


def local_path(where: str, base: str | None = None, progress: Progress | None = None) -> Path:
    """The file that is meant, fetched if need be.

    Args:
        where: a path, an address (http, https, file), or a name of `gan.presets.PRETRAINED`. An address may end in
            `#sha256=HEX`, which the file is then checked against.
        base: address or folder of the files that have names; else the environment variable GAN_PRETRAINED_BASE.
        progress: called while a file is fetched.

    Raises GanError, in one line with what to do, if it cannot be had.
    """
    if os.path.exists(where):  # whatever was typed: pathlib raises for what is no path at all
        return Path(where)
    if where in PRETRAINED:
        return _named(where, base or os.environ.get(BASE_VARIABLE) or PRETRAINED_BASE, progress)
    scheme = _scheme(where)
    if scheme == "file":
        return _existing(_path_of(where), where)
    if scheme in ("http", "https"):
        return _Download(where, progress).path()
    if scheme:
        shown = without_password(where)
        raise GanError(f"{shown}: only http, https and file addresses can be opened; fetch it and give its path")
    close = difflib.get_close_matches(where, PRETRAINED, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise GanError(f"{where}: cannot be read (no such file){hint}")


def forget(where: str, path: Path) -> bool:
    """Have a file that turned out to be no model fetched anew the next time; whether that will be so.

    Args:
        where: what `local_path` was given, and path what it gave. A user's own file is never touched, nor one whose
            checksum is right.
    """
    if os.path.exists(where) or path.parent != cache_folder() or "#sha256=" in where:
        return False
    with contextlib.suppress(OSError):
        path.unlink()
    return not path.exists()


def cache_folder() -> Path:
    """Where fetched files stay."""
    return user_cache("models")


def _named(name: str, base: str, progress: Progress | None) -> Path:
    file = PRETRAINED[name]
    if _scheme(base) in ("http", "https"):
        return local_path(f"{base.rstrip('/')}/{file}", progress=progress)
    folder = _path_of(base) if base.startswith("file://") else Path(base)
    beside = folder / Path(file).name  # without the folders of the zoo
    return beside if beside.exists() else _existing(folder / file, f"{name}: {folder / file}")


def _scheme(where: str) -> str:
    """`http`; nothing of what is no address."""
    try:
        return urlsplit(where).scheme.lower() if "://" in where else ""
    except ValueError as error:
        raise _no_address(where, error) from error


def _no_address(where: str, error: Exception) -> GanError:
    reason = without_password(one_line(error))
    return GanError(f"{without_password(where)}: is no address, or leads to none ({reason}); mend it, {_ELSEWHERE}")


def _path_of(address: str) -> Path:
    return Path(url2pathname(urlsplit(address).path))


def _existing(path: Path, shown: str) -> Path:
    if not path.exists():
        raise GanError(f"{shown}: no such file")
    return path


class _Download:
    """A file of the web on its way into the cache."""

    def __init__(self, address: str, progress: Progress | None) -> None:
        self.url, fragment = urldefrag(address)
        self.shown = without_password(self.url)
        digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if fragment and digest is None:
            raise GanError(
                f"{self.shown}#{fragment}: what follows # must be sha256= and 64 hexadecimal digits; mend it or leave "
                "it out"
            )
        self.sha256 = digest[1].lower() if digest else None
        self.progress = progress
        name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(self.url).path).rpartition("/")[2])[-80:] or "model"
        key = hashlib.sha256(f"{self.url}#{self.sha256}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self.final = cache_folder() / f"{key}-{name}"
        self.part = self.final.with_name(f"{self.final.name}.part")
        self.note = self.final.with_name(f"{self.final.name}.part.json")  # which version of the file the part is of

    def path(self) -> Path:
        """The complete file."""
        if self.final.exists():
            return self.final
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if not self.final.exists():  # another process may have fetched it meanwhile
                    self._fetch()
        except OSError as error:
            raise explain_os_error(error, self.final) from error
        return self.final

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process fetches this file: one waits for the other."""
        with open(self.final.with_name(f"{self.final.name}.lock"), "a+", encoding="utf-8") as file:
            while True:
                try:
                    lock(file)
                    break
                except Locked:
                    time.sleep(_LOCK_SECONDS)
            yield

    def _fetch(self) -> None:
        """Until it is complete, as often as it gets further."""
        requests = _requests(self.shown)
        failures, furthest = 0, self._size()
        with requests.Session() as session:
            while True:
                try:
                    self._go_on(session)
                    break
                except (_Broken, requests.RequestException) as error:
                    problem: Exception = error
                failures = 0 if self._size() > furthest else failures + 1
                furthest = max(furthest, self._size())
                if failures > len(_PAUSES):
                    raise self._gave_up(problem) from problem
                time.sleep(_PAUSES[max(failures - 1, 0)])
        self._check_digest()
        with open(self.part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.part, self.final)
        flush(self.final.parent)
        self.note.unlink(missing_ok=True)

    def _gave_up(self, problem: Exception) -> GanError:
        size = self._size()
        kept = (
            f"; the {readable_size(size)} that came are kept, and the same command goes on from there" if size else ""
        )
        reason = without_password(one_line(problem))
        return GanError(f"{self.shown}: cannot be fetched ({reason}){kept}; try again later, {_ELSEWHERE}")

    def _go_on(self, session: Any) -> None:
        """One request, from where the part ends if it is known to be of the same file."""
        version = self._version()
        asked = self._size() if version else 0  # where the answer is to begin
        headers = {"Accept-Encoding": "identity", "User-Agent": "stylegan2-ada-trainer"}
        if asked and version:
            headers |= {"Range": f"bytes={asked}-", "If-Range": version}
        with self._answer(session, headers) as response:
            begin, total = self._accepted(response, asked)
            if response.status_code == 416:
                return
            with open(self.part, "r+b" if begin else "wb") as file:
                if not begin:
                    write_text(self.note, json.dumps({"version": _validator(response.headers)}))
                file.seek(begin)
                file.truncate()
                self._check_room(_ROOM if total is None else total - begin)
                self._receive(response, file, total)

    def _answer(self, session: Any, headers: dict[str, str]) -> Any:
        errors = _requests(self.shown).exceptions
        try:
            return session.get(self.url, headers=headers, stream=True, timeout=_TIMEOUT)
        except errors.SSLError:
            raise
        except (errors.ConnectionError, errors.Timeout) as error:
            raise _Broken(f"there is no connection to {urlsplit(self.shown).netloc}") from error
        except ValueError as error:  # of requests, urllib3 or Python, for this address or one that it leads to
            raise _no_address(self.url, error) from error

    def _accepted(self, response: Any, asked: int) -> tuple[int, int | None]:
        """(where the answer begins, length of the whole file or None). Raises if it is no answer to go on with."""
        status, headers = response.status_code, response.headers
        answer = printable(f"{status} {response.reason}")[:80]
        if status == 416 and asked:  # there is nothing behind the part
            if headers.get("Content-Range") == f"bytes */{asked}":
                return asked, asked
            self.part.unlink(missing_ok=True)
            raise _Broken("the server's file has changed")
        if status in (408, 425, 429) or status >= 500:
            raise _Broken(f"the server answers {answer}")
        if status in (401, 403):
            raise GanError(f"{self.shown}: the server does not hand it out ({answer}); check the address, {_ELSEWHERE}")
        if status not in (200, 206):
            raise GanError(f"{self.shown}: is not there ({answer}); check the address, {_ELSEWHERE}")
        if headers.get("Content-Type", "").split(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            raise GanError(
                f"{self.shown}: is a web page, not a model; give the address of the file itself, {_ELSEWHERE}"
            )
        if headers.get("Content-Encoding", "identity").lower() != "identity":  # of which any number may come
            raise GanError(f"{self.shown}: the server packs it, which it was asked not to do; fetch the file elsewhere")
        if status == 200:
            length = headers.get("Content-Length", "")
            return 0, int(length) if re.fullmatch(_NUMBER, length) else None
        match = re.fullmatch(rf"bytes ({_NUMBER})-{_NUMBER}/({_NUMBER}|\*)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != asked:
            self.part.unlink(missing_ok=True)
            raise _Broken("the server sends another part of the file than it was asked for")
        return asked, None if match[2] == "*" else int(match[2])

    def _receive(self, response: Any, file: IO[bytes], total: int | None) -> None:
        done = checked = file.tell()
        if self.progress is not None:
            self.progress(done, total)
        broken = None
        try:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if total is None and done - checked >= _ROOM:
                    self._check_room(_ROOM)
                    checked = done
                if self.progress is not None:
                    self.progress(done, total)
        except _requests(self.shown).RequestException as error:
            broken = error
        if broken is not None or (total is not None and done < total):
            raise _Broken(f"the connection broke off after {done} of {total or '?'} bytes") from broken
        if total is not None and done > total:
            file.truncate(0)
            raise _Broken(f"the server sent {done} bytes of a file of {total}")
        if done == 0:
            raise _Broken("the server sends an empty file")

    def _check_room(self, needed: int) -> None:
        all_bytes, free = disk_size(self.part.parent)
        if all_bytes and free < needed:
            raise GanError(
                f"{self.part.parent}: no space left on the device: {self.shown} takes {readable_size(needed)} and "
                f"{readable_size(free)} are free; free some, or name another cache with XDG_CACHE_HOME"
            )

    def _check_digest(self) -> None:
        if self.sha256 is None:
            return
        digest = hashlib.sha256()
        with open(self.part, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != self.sha256:
            self.part.unlink()
            raise GanError(
                f"{self.shown}: what came has another sha256 ({digest.hexdigest()}); check the address and it"
            )

    def _size(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def _version(self) -> str | None:
        """What the server called the version that the part is of."""
        try:
            version = json.loads(self.note.read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return version if isinstance(version, str) else None


def _validator(headers: Any) -> str | None:
    """For If-Range; weak tags do not say that every byte is the same."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _requests(url: str) -> Any:
    try:
        import requests
    except ImportError as error:
        raise GanError(f"{url}: fetching it needs the package requests: pip install requests, {_ELSEWHERE}") from error
    return requests

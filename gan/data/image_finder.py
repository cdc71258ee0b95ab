"""Which image of a source a label file means: people write names with and without folders and extensions."""

from __future__ import annotations

import functools
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_SEVERAL = ""  # where a name is wanted: several images have it


class Found(NamedTuple):
    """The image that a path means. None if there is no such image, or several could be meant.

    `taken` is the only image that it could mean, had not another path named that exactly. `is_elsewhere`: the path
    names other folders than those in which the image lies.
    """

    name: str | None = None
    is_several: bool = False
    taken: str | None = None
    is_elsewhere: bool = False


class _Index:
    """Names by what they may be called: the whole of a key, or its end from some folder on."""

    def __init__(self, keyed: Iterable[tuple[str, str]]) -> None:
        self._whole: dict[str, str] = {}
        self._ends: dict[str, str] = {}
        for key, name in keyed:
            _enter(self._whole, key, name)
            for end in _ends(key):
                _enter(self._ends, end, name)

    def find(self, wanted: str) -> str | None:
        """The only name whose key ends with `wanted`, or that `wanted` ends with; _SEVERAL, or None."""
        for place, key in [(self._whole, wanted), (self._ends, wanted), *((self._whole, end) for end in _ends(wanted))]:
            if key in place:
                return place[key]
        return None

    def find_file(self, wanted: str) -> str | None:
        """The only name whose last part is that of `wanted`, whatever the folders are."""
        base = posixpath.basename(wanted)
        return self._whole.get(base, self._ends.get(base))


class Finder:
    """Which image a label file means: exactly this path, or a part of it that only one image has.

    A name may lack folders or have others above them, and may lack the extension. `root` is the name of the folder
    that holds them all, if it has one.
    """

    def __init__(self, names: Sequence[str], root: str = "") -> None:
        self._names = names
        self._root = root
        self._exact = set(names)

    @functools.cached_property
    def _by_name(self) -> _Index:
        return _Index((_tidy(name), name) for name in self._names)

    @functools.cached_property
    def _by_stem(self) -> _Index:
        return _Index((_stem(_tidy(name)), name) for name in self._names)

    def find_all(self, paths: Sequence[str]) -> list[Found]:
        """The image that each path means.

        An image that one path names exactly is not also what a similar path means. Where some paths name the folder
        that holds all images, others that name another in its place mean none of them. Folders are only passed over
        where no folder of these paths is one of the source's.
        """
        exact = {path for path in paths if path in self._exact}
        found = [Found(path) if path in exact else self._similar(_tidy(path), exact) for path in paths]
        above = [_folder_above(path, one.name) for one, path in zip(found, paths, strict=True)] if self._root else []
        if self._root in above:
            found = [one if folder in ("", self._root) else Found() for one, folder in zip(found, above, strict=True)]
        if not any(one.name and "/" in path for one, path in zip(found, paths, strict=True)):
            for index, path in enumerate(paths):
                if found[index] == Found() and "/" in _tidy(path):
                    one = _found(self._by_name.find_file(_tidy(path)), exact)
                    found[index] = one._replace(is_elsewhere=one.name is not None)
        return found

    def _similar(self, path: str, exact: set[str]) -> Found:
        for index in (self._by_name, self._by_stem):
            name = index.find(path)
            if name is not None:
                return _found(name, exact)
        name = self._by_stem.find(_stem(path))  # with another extension than the image has
        return _found(name, exact) if name not in exact else Found()


def _found(name: str | None, exact: set[str]) -> Found:
    if name in exact:
        return Found(taken=name)
    return Found(is_several=True) if name == _SEVERAL else Found(name)


def _folder_above(path: str, name: str | None) -> str:
    """The folder that `path` names above all those of the image `name`: `x` of `x/a/b.png` if that means `a/b.png`."""
    folders = [] if name is None else _tidy(path).split("/")[: -1 - name.count("/")]
    return folders[-1] if folders else ""


def _enter(names: dict[str, str], key: str, name: str) -> None:
    names[key] = name if names.get(key, name) == name else _SEVERAL


def _ends(path: str) -> Iterator[str]:
    """`b/c.png` and `c.png` of `a/b/c.png`."""
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _tidy(path: str) -> str:
    """A path with single '/' between its parts, letters composed as most systems write them."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]

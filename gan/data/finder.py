"""Which image of a source a label file means: people write names with and without folders and extensions."""

from __future__ import annotations

import functools
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

SEVERAL = ""  # where a name is wanted: several images have it


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
        """The only name whose key ends with `wanted`, or that `wanted` ends with; SEVERAL, or None."""
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

    A name may lack folders or have others above them, and may lack the extension.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._exact = set(names)

    @functools.cached_property
    def _by_name(self) -> _Index:
        return _Index((_tidy(name), name) for name in self._names)

    @functools.cached_property
    def _by_stem(self) -> _Index:
        return _Index((_stem(_tidy(name)), name) for name in self._names)

    def find_all(self, paths: Sequence[str]) -> list[str | None]:
        """The image that each path means; None for none, SEVERAL where it could be one or another.

        An image that one path names exactly is not also what a similar path means. Folders are only passed over
        where no folder of these paths is one of the source's.
        """
        found: list[str | None] = [path if path in self._exact else None for path in paths]
        others = {index: _tidy(path) for index, path in enumerate(paths) if found[index] is None}
        claimed = set(found)
        for index, path in others.items():
            name = self._similar(path)
            found[index] = None if name in claimed else name
        if not any(name and "/" in path for name, path in zip(found, paths, strict=True)):
            for index, path in others.items():
                if found[index] is None and "/" in path:
                    name = self._by_name.find_file(path)
                    found[index] = None if name in claimed else name
        return found

    def _similar(self, path: str) -> str | None:
        for index, wanted in ((self._by_name, path), (self._by_stem, path), (self._by_stem, _stem(path))):
            name = index.find(wanted)
            if name is not None:
                return name
        return None


def _enter(names: dict[str, str], key: str, name: str) -> None:
    names[key] = name if names.get(key, name) == name else SEVERAL


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

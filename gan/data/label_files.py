"""Labels out of what people have: sub-folders, a dataset.json, a CSV or JSON file."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gan.data.dataset_files import LABEL_FILE
from gan.data.dataset_labels import MAX_CLASSES
from gan.data.image_finder import Finder
from gan.data.label_csv import labels_from_csv
from gan.data.label_json import FORMS, rows_from_json
from gan.data.label_matching import Label, Labels, Row, label_images
from gan.errors import GanError, printable

if TYPE_CHECKING:
    from gan.data.sources import Source

MAX_LABEL_FILE = 2**30  # bytes
CSV_SUFFIXES = {".csv", ".tsv", ".txt"}


def choose_labels(source: Source, wanted: str | None) -> Labels | None:
    """The labels that --labels asks for: "folders", "none", a CSV or JSON file; None for the source's own.

    Raises GanError if they cannot be read at all, or if no image gets a label.
    """
    if wanted == "none":
        return None
    if wanted == "folders":
        return labels_from_folders(source)
    labels = source.own_labels if wanted is None else labels_from_file(wanted, source.names, source.name)
    if labels is not None and not labels.by_name:
        where = f"--source {source.name}: {labels.origin}" if wanted is None else f"--labels {wanted}:"
        why = f" ({labels.problems[0]})" if labels.problems else ""
        remedy = "mend it, or give --labels none" if wanted is None else "give the names as they are in --source"
        raise GanError(f"{where} labels none of the {len(source.names):,} images{why}; {remedy}")
    return labels


def labels_from_folders(source: Source) -> Labels:
    """A class for each folder on the first level at which the images divide into several; numbered by sorted name.

    Raises GanError where they divide into none, or into more folders than there may be classes.
    """
    where = f"--labels folders: in --source {source.name}"
    folders = [name.split("/")[:-1] for name in source.names]
    for level in range(max(map(len, folders), default=0)):
        class_names = sorted({parts[level] for parts in folders if len(parts) > level})
        if len(class_names) > 1:
            break
    else:
        is_one = all(parts == folders[0] for parts in folders)
        what = "all images are in one folder" if is_one else "no two folders with images lie side by side"
        raise GanError(f"{where} {what}; sort them into a folder a class, or leave --labels out")
    if len(class_names) > MAX_CLASSES:
        raise GanError(f"{where} there are {len(class_names):,} folders; at most {MAX_CLASSES:,} classes can be told")
    numbers = {name: number for number, name in enumerate(class_names)}
    by_name: dict[str, Label] = {}
    problems = []
    for name, parts in zip(source.names, folders, strict=True):
        if len(parts) > level:
            by_name[name] = numbers[parts[level]]
        else:
            problems.append(f"{printable(name)}: is in none of the {len(class_names)} class folders")
    return Labels(by_name, class_names, "sub-folders", problems, _folders_below(source.name, folders, level))


def _folders_below(source: str, folders: Sequence[list[str]], level: int) -> list[str]:
    """A note if classes, which are the folders on this level, divide into several folders of their own."""
    below: dict[str, set[str]] = {}  # path of a class -> its folders
    for parts in folders:
        if len(parts) > level + 1:
            below.setdefault("/".join(parts[: level + 1]), set()).add(parts[level + 1])
    divided = {path: sorted(names) for path, names in sorted(below.items()) if len(names) > 1}
    if not divided:
        return []
    path, names = next(iter(divided.items()))
    first = ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")
    others = f", and {len(divided) - 1} more of the classes some" if len(divided) > 1 else ""
    remedy = f"; for that name --source {printable(posixpath.join(source, path))}" if Path(source).is_dir() else ""
    return [f"{printable(path)} holds {len(names)} folders ({first}){others}, which are not taken as classes{remedy}"]


def labels_from_file(path: str, names: Sequence[str], source: str = "") -> Labels:
    """The labels of a CSV or JSON file, whose names may begin with the folder (or zip) `source`.

    Raises GanError where it is neither, or cannot be read.
    """
    where, file = f"--labels {path}", Path(path)
    try:
        if not file.is_file():
            kind = "is not a file" if file.exists() else "no such file"
            raise GanError(f"{where}: {kind}; give a CSV or JSON file, folders, or none")
        if file.stat().st_size > MAX_LABEL_FILE:
            raise GanError(f"{where}: is larger than {MAX_LABEL_FILE >> 20} MB; that is no list of labels")
        text = _text(file.read_bytes())
    except OSError as error:
        raise GanError(f"{where}: cannot be read ({error.strerror or error})") from error
    looks_like_json = text.lstrip()[:1] in ("{", "[") and file.suffix.lower() not in CSV_SUFFIXES
    root = Path(source).resolve().name.removesuffix(".zip") if source else ""
    origin, finder = file.name, Finder(names, root)
    if not (looks_like_json or file.suffix.lower() == ".json"):
        return labels_from_csv(text, origin, finder, where)
    listed, class_names, problems = rows_from_json(text, origin, "", where)
    if listed is None:
        raise GanError(f'{where}: has no "labels"; wanted is {FORMS}')
    return label_images(listed, finder, class_names, origin, where, problems)


def labels_inside(
    source: str, names: Sequence[str], paths: Iterable[str], read: Callable[[str], bytes]
) -> Labels | None:
    """The labels of the dataset.json among the `paths` of a source; None where there is none, or none with rows.

    The rows of each are relative to its own folder. Datasets side by side are taken together; below a dataset.json
    another one does not count. Raises GanError for a file that is no list of labels at all.
    """
    found = [path for path in paths if posixpath.basename(path) == LABEL_FILE]
    used: dict[str, str] = {}  # folder -> path
    rows: list[Row] = []
    problems: list[str] = []
    class_names: list[str] | None = None
    for path in sorted(found, key=lambda path: (path.count("/"), path)):
        folder = posixpath.dirname(path)
        above = next((used[other] for other in used if not other or folder.startswith(f"{other}/")), None)
        if above is not None:
            problems.append(f"{printable(path)}: does not count, because {printable(above)} lies above it")
            continue
        where = f"--source {source}: {printable(path)}"
        listed, own_names, own_problems = rows_from_json(_text(read(path)), path, folder, where)
        if not listed and not own_problems:
            continue
        if used and own_names != class_names:
            first = printable(next(iter(used.values())))
            problems.append(f"{printable(path)}: its class names are not those of {first}; its rows do not count")
            continue
        used[folder] = path
        rows += listed or []
        problems += own_problems
        class_names = own_names
    if not used:
        return None
    origin = next(iter(used.values())) if len(used) == 1 else f"{len(used)} {LABEL_FILE} files"
    return label_images(rows, Finder(names), class_names, origin, f"--source {source}: {printable(origin)}", problems)


def labels_in_order(
    names: Sequence[str], labels: Sequence[Any], class_names: list[str] | None, origin: str, where: str
) -> Labels:
    """The labels of an archive that holds one for each of its images in their order."""
    pairs = enumerate(zip(names, labels, strict=True), start=1)
    rows = [Row(origin, number, name, name, label) for number, (name, label) in pairs]
    return label_images(rows, Finder(names), class_names, origin, where)


def _text(data: bytes) -> str:
    """The text of a label file. Names on disk need not be UTF-8, so that it may hold other bytes."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Excel writes "Unicode text"
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")

"""Labels out of what people have: sub-folders, a dataset.json, a CSV or JSON file. Bad rows are named and end nothing.

A row that is wrong in any way is a line of `Labels.problems`, and its image has no label.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gan.data.finder import SEVERAL, Finder
from gan.data.label_rows import MAX_CLASSES
from gan.errors import GanError

if TYPE_CHECKING:
    from gan.data.sources import Source

LABEL_FILE = "dataset.json"
MAX_LABEL_FILE = 2**30  # bytes
FLOAT32_MAX = 3.4e38  # labels are float32 in training

Label = int | list[float]  # a class from 0 on, or a vector

CSV_SUFFIXES = {".csv", ".tsv", ".txt"}
SEPARATORS = (",", ";", "\t")
SAMPLE = 50  # rows that tell which separator a CSV has
NAME_HEADINGS = {"", "file", "files", "filename", "file name", "file_name", "filepath", "file_path", "path"}
NAME_HEADINGS |= {"name", "image", "images", "image_name", "image_path", "image_id", "img", "id", "index"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_FORMS = '{"labels": [["name.png", 3], ...]}'

CLASS, NAME, FRACTION = "a class number", "a class name", "a number"


@dataclass(frozen=True)
class Labels:
    """The labels of a source's images.

    Args:
        by_name: image name -> class from 0 on, or a vector; all of one kind.
        class_names: of the classes, or of the columns of multi-hot vectors.
        origin: where they are from: "sub-folders", "dataset.json", "labels.csv".
        problems: one line each: rows that are wrong, rows whose file is missing.
    """

    by_name: dict[str, Label]
    class_names: list[str] | None
    origin: str
    problems: list[str]


class Row(NamedTuple):
    """One line of a label file: `name` as it is written there, `path` what to look for, `label` a JSON value."""

    file: str
    number: int
    name: str
    path: str
    label: Any


def choose_labels(source: Source, wanted: str | None) -> Labels | None:
    """The labels that --labels asks for: "folders", "none", a CSV or JSON file; None for the source's own.

    Raises GanError if they cannot be read at all, or if no image gets a label.
    """
    if wanted == "none":
        return None
    if wanted == "folders":
        return labels_from_folders(source)
    labels = source.own_labels if wanted is None else labels_from_file(wanted, source.names)
    if labels is not None and not labels.by_name:
        where = f"--source {source.name}: {labels.origin}" if wanted is None else f"--labels {wanted}:"
        why = f" ({labels.problems[0]})" if labels.problems else ""
        remedy = "mend it, or give --labels none" if wanted is None else "give the names as they are in --source"
        raise GanError(f"{where} labels none of the {len(source.names):,} images{why}; {remedy}")
    return labels


def labels_from_folders(source: Source) -> Labels:
    """A class for each folder on the first level at which the images divide into several; numbered by sorted name.

    Raises GanError where they are all in one folder, or in more folders than there may be classes.
    """
    where = f"--labels folders: in --source {source.name}"
    folders = [name.split("/")[:-1] for name in source.names]
    for level in range(max(map(len, folders), default=0)):
        class_names = sorted({parts[level] for parts in folders if len(parts) > level})
        if len(class_names) > 1:
            break
    else:
        raise GanError(f"{where} all images are in one folder; sort them into a folder a class, or leave --labels out")
    if len(class_names) > MAX_CLASSES:
        raise GanError(f"{where} there are {len(class_names):,} folders; at most {MAX_CLASSES:,} classes can be told")
    numbers = {name: number for number, name in enumerate(class_names)}
    by_name: dict[str, Label] = {}
    problems = []
    for name, parts in zip(source.names, folders, strict=True):
        if len(parts) > level:
            by_name[name] = numbers[parts[level]]
        else:
            problems.append(f"{shown(name)}: is in none of the {len(class_names)} class folders")
    return Labels(by_name, class_names, "sub-folders", problems)


def labels_from_file(path: str, names: Sequence[str]) -> Labels:
    """The labels of a CSV or JSON file. Raises GanError where it is neither, or cannot be read."""
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
    origin, finder = file.name, Finder(names)
    if not (looks_like_json or file.suffix.lower() == ".json"):
        return _labels_from_csv(text, origin, finder, where)
    listed, class_names, problems = _json_rows(text, origin, "", where)
    if listed is None:
        raise GanError(f'{where}: has no "labels"; wanted is {_FORMS}')
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
            problems.append(f"{shown(path)}: does not count, because {shown(above)} lies above it")
            continue
        where = f"--source {source}: {shown(path)}"
        listed, own_names, own_problems = _json_rows(_text(read(path)), path, folder, where)
        if not listed and not own_problems:
            continue
        if used and own_names != class_names:
            first = shown(next(iter(used.values())))
            problems.append(f"{shown(path)}: its class names are not those of {first}; its rows do not count")
            continue
        used[folder] = path
        rows += listed or []
        problems += own_problems
        class_names = own_names
    if not used:
        return None
    origin = next(iter(used.values())) if len(used) == 1 else f"{len(used)} {LABEL_FILE} files"
    return label_images(rows, Finder(names), class_names, origin, f"--source {source}: {shown(origin)}", problems)


def labels_in_order(
    names: Sequence[str], labels: Sequence[Any], class_names: list[str] | None, origin: str, where: str
) -> Labels:
    """The labels of an archive that holds one for each of its images in their order."""
    pairs = enumerate(zip(names, labels, strict=True), start=1)
    rows = [Row(origin, number, name, name, label) for number, (name, label) in pairs]
    return label_images(rows, Finder(names), class_names, origin, where)


def label_images(
    rows: Sequence[Row],
    finder: Finder,
    class_names: list[str] | None,
    origin: str,
    where: str,
    problems: Sequence[str] = (),
) -> Labels:
    """Match the rows to images and check them. What most rows hold is what all must hold.

    Raises GanError, beginning with `where`, if there are more class names than there may be classes.
    """
    bad: dict[int, str] = {}  # index of the row -> what is wrong with it
    values: list[tuple[str, Any]] = []  # kind and value
    for index, row in enumerate(rows):
        try:
            values.append(_value(row.label))
        except ValueError as error:
            bad[index] = str(error)
            values.append(("", None))
    kinds = Counter(kind for kind, _ in values if kind)
    common = kinds.most_common(1)[0][0] if kinds else ""
    lines = list(problems)
    if common not in (CLASS, NAME, FRACTION, "") and class_names and _list_of(len(class_names)) != common:
        lines.append(f"{shown(origin)}: has {len(class_names)} class names, but the usual label is {common}")
        class_names = None
    if common == NAME and class_names is None:
        class_names = sorted({value for kind, value in values if kind == NAME})
        if len(class_names) > MAX_CLASSES:
            raise GanError(f"{where}: has {len(class_names):,} different class names; at most {MAX_CLASSES:,} can be")
    numbers = {name: number for number, name in enumerate(class_names or [])}
    labels: list[Label | None] = []
    for index, (kind, value) in enumerate(values):
        label, wrong = (None, None) if index in bad else _label(kind, value, common, numbers)
        labels.append(label)
        if wrong is not None:
            bad[index] = wrong
    files = finder.find_all([row.path for row in rows])
    by_name: dict[str, Label] = {}
    first_row: dict[str, int] = {}
    for index, (name, label) in enumerate(zip(files, labels, strict=True)):
        if not name:
            missing = "could mean several images; write its whole path" if name == SEVERAL else "no such image"
            bad[index] = f"{missing}, and {bad[index]}" if index in bad else missing
        elif label is not None:
            first = first_row.setdefault(name, index)
            if by_name.setdefault(name, label) != label:
                other = _short(rows[first].label)
                bad[index] = f"is {_short(rows[index].label)} here, but {other} in row {rows[first].number}"
    for index, wrong in sorted(bad.items()):
        by_name.pop(files[index] or SEVERAL, None)
        row = rows[index]
        lines.append(f"{shown(row.file)}, row {row.number} ({shown(row.name)[:120]}): {wrong}")
    return Labels(by_name, class_names, origin, lines)


def shown(text: str) -> str:
    """A file's name as any terminal can show it on one line, whatever bytes it is made of."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _label(kind: str, value: Any, common: str, numbers: dict[str, int]) -> tuple[Label | None, str | None]:
    """The label that a value stands for, or what is wrong with it. `numbers`: class name -> class."""
    if common == FRACTION and kind in (CLASS, FRACTION):
        return [value], None
    if kind != common:
        return None, f"{_short(value)} is {kind}, but the usual one here is {common}"
    if kind == NAME:
        return (numbers[value], None) if value in numbers else (None, f"{_short(value)} is none of the class names")
    if kind == CLASS and value < 0:
        return None, f"class {_short(value)} is negative"
    if kind == CLASS and value >= MAX_CLASSES:
        return None, f"class {_short(value)} is out of range; number the classes from 0 on, at most {MAX_CLASSES:,}"
    if kind == CLASS and numbers and value >= len(numbers):
        return None, f"class {value} is out of range: there are {len(numbers)} class names"
    return value, None


def _value(label: Any) -> tuple[str, Any]:
    """Kind and value of a JSON value as a label. Raises ValueError that says what is wrong."""
    if isinstance(label, list):
        if not label:
            raise ValueError("its list is empty")
        for value in label:
            _check_number(value)
        return _list_of(len(label)), label
    if isinstance(label, str):
        if not label:
            raise ValueError("has no label")
        return NAME, label
    _check_number(label)
    return (CLASS, int(label)) if label == int(label) else (FRACTION, label)


def _check_number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{_short(value)} is not a number")
    if not abs(value) <= FLOAT32_MAX:  # not a number is not below it either
        raise ValueError(f"{_short(value)} is not a finite number")


def _list_of(count: int) -> str:
    return f"a list of {count} number{'' if count == 1 else 's'}"


def _short(value: Any) -> str:
    """A label for a message, however long or odd it is."""
    try:
        return shown(json.dumps(value, ensure_ascii=False))[:80]
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        return "that"


def _text(data: bytes) -> str:
    """The text of a label file. Names on disk need not be UTF-8, so that it may hold other bytes."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Excel writes "Unicode text"
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


class _Object(dict[str, Any]):
    """A JSON object that also knows keys that come twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _json_rows(text: str, file: str, folder: str, where: str) -> tuple[list[Row] | None, list[str] | None, list[str]]:
    """Rows, class names and problems of a JSON file whose names are relative to `folder`; no rows for null.

    Raises GanError, beginning with `where`, if it is no list of labels.
    """
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise GanError(f"{where} is not valid JSON ({error}); mend it, or give --labels none") from error
    listed = content.get("labels") if isinstance(content, _Object) else content
    if listed is None:
        return None, None, []
    if isinstance(listed, _Object):
        listed = [list(pair) for pair in listed.pairs]
    if not isinstance(listed, list):
        raise GanError(f'{where}: "labels" is not a list; wanted is {_FORMS}, or --labels none')
    rows, problems = [], []
    for number, row in enumerate(listed, start=1):
        if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str):
            rows.append(Row(file, number, row[0], posixpath.join(folder, row[0].replace("\\", "/")), row[1]))
        else:
            problems.append(f'{shown(file)}, row {number}: is {_short(row)}; wanted is ["name.png", label]')
    class_names = content.get("class_names") if isinstance(content, _Object) else None
    if class_names is not None and not are_class_names(class_names):
        problems.append(f'{shown(file)}: "class_names" is not a list of different names; they are left out')
        class_names = None
    return rows, class_names, problems


def are_class_names(names: Any) -> bool:
    """Whether it is a list of different names, of no more classes than there may be."""
    return (
        isinstance(names, list)
        and 0 < len(names) <= MAX_CLASSES
        and all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
    )


def _labels_from_csv(text: str, origin: str, finder: Finder, where: str) -> Labels:
    """`file,label` or `file,a,b,c`, with or without headings. Raises GanError if it is no CSV.

    Headings are the class names where all columns are 0 or 1.
    """
    try:
        table = list(enumerate(_table(text, finder), start=1))
    except csv.Error as error:
        raise GanError(f"{where}: is neither CSV nor JSON ({error}); give a CSV or JSON file") from error
    table = [(number, cells) for number, cells in table if any(cells)]
    headings: list[str] = []
    if table and _are_headings([cells for _, cells in table], finder):
        headings = table.pop(0)[1][1:]
    rows = []
    for number, (name, *cells) in table:
        while len(cells) > 1 and not cells[-1]:  # separators at the end
            cells.pop()
        values = [_number(cell) for cell in cells]
        rows.append(Row(origin, number, name, name, values[0] if len(values) == 1 else values or ""))
    labels = label_images(rows, finder, None, origin, where)
    vectors = [label for label in labels.by_name.values() if isinstance(label, list)]
    while headings and not headings[-1]:
        headings.pop()
    if not vectors or len(vectors[0]) != len(headings) or not are_class_names(headings):
        return labels
    is_multi_hot = all(value in (0, 1) for vector in vectors for value in vector)
    return replace(labels, class_names=headings) if is_multi_hot else labels


def _table(text: str, finder: Finder) -> list[list[str]]:
    """The cells of a CSV, with the separator that finds the most images, or else gives the most even rows."""

    def rows(separator: str) -> Iterator[list[str]]:
        lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True)
        return ([cell.strip() for cell in cells] for cells in lines)

    def fitness(separator: str) -> tuple[int, int]:
        sample = [cells for cells in itertools.islice(rows(separator), SAMPLE) if len(cells) > 1]
        found = sum(bool(name) for name in finder.find_all([cells[0] for cells in sample]))
        return found, max(Counter(len(cells) for cells in sample).values(), default=0)

    return list(rows(max(SEPARATORS, key=fitness)))


def _are_headings(table: list[list[str]], finder: Finder) -> bool:
    """Whether the first row of a CSV says what is in the columns, instead of what is in an image."""
    (name, *cells), *others = table
    if finder.find_all([name]) != [None]:
        return False
    if name.lower() in NAME_HEADINGS:
        return True
    has_extension = bool(posixpath.splitext(name)[1])
    has_numbers = any(isinstance(_number(cell), (int, float)) for cell in cells)
    return not has_extension and not has_numbers and not any(other[1:] == cells for other in others)


def _number(cell: str) -> int | float | str:
    """What a cell of a CSV holds: a number where it looks like one."""
    if not _NUMBER.fullmatch(cell):
        return cell
    try:
        return int(cell)
    except ValueError:  # a fraction, or thousands of digits
        return float(cell)

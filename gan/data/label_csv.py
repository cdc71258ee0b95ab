"""Labels out of a CSV: `file,label` or `file,a,b,c`, with or without headings."""

from __future__ import annotations

import csv
import io
import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from gan.data.image_finder import Finder, Found
from gan.data.label_matching import Labels, Row, are_class_names, label_images
from gan.errors import GanError

SEPARATORS = (",", ";", "\t")
SAMPLE = 50  # rows that tell which separator a CSV has
NAME_HEADINGS = {"", "file", "files", "filename", "file name", "file_name", "filepath", "file_path", "path"}
NAME_HEADINGS |= {"name", "image", "images", "image_name", "image_path", "image_id", "img", "id", "index"}

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


def labels_from_csv(text: str, origin: str, finder: Finder, where: str) -> Labels:
    """Labels of the images that are found. Headings are the class names where all columns are 0 or 1.

    Raises GanError, beginning with `where`, if it is no CSV.
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
        found = sum(image.name is not None for image in finder.find_all([cells[0] for cells in sample]))
        return found, max(Counter(len(cells) for cells in sample).values(), default=0)

    return list(rows(max(SEPARATORS, key=fitness)))


def _are_headings(table: list[list[str]], finder: Finder) -> bool:
    """Whether the first row of a CSV says what is in the columns, instead of what is in an image."""
    (name, *cells), *others = table
    if finder.find_all([name]) != [Found()]:
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

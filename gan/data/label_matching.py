"""Rows of labels, whatever they are read from, matched to images. Bad rows are named and end nothing.

A row that is wrong in any way is a line of `Labels.problems`, and its image has no label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gan.data.dataset_labels import FLOAT32_MAX, MAX_CLASSES, shortened
from gan.data.image_finder import Finder, Found
from gan.errors import GanError, printable

Label = int | list[float]  # a class from 0 on, or a vector

CLASS, NAME, FRACTION = "a class number", "a class name", "a number"


@dataclass(frozen=True)
class Labels:
    """The labels of a source's images.

    Args:
        by_name: image name -> class from 0 on, or a vector; all of one kind.
        class_names: of the classes, or of the columns of multi-hot vectors.
        origin: where they are from: "sub-folders", "dataset.json", "labels.csv".
        problems: one line each: rows that are wrong, rows whose file is missing.
        notes: one line each: what a user should know, and may have meant.
    """

    by_name: dict[str, Label]
    class_names: list[str] | None
    origin: str
    problems: list[str]
    notes: list[str] = field(default_factory=list)


class Row(NamedTuple):
    """One line of a label file: `name` as it is written there, `path` what to look for, `label` a JSON value."""

    file: str
    number: int
    name: str
    path: str
    label: Any


class Wrong(NamedTuple):
    """What is wrong with a row, in place of its label."""

    why: str


class _Value(NamedTuple):
    """What a row holds: CLASS, NAME, FRACTION or "a list of N numbers", and the value."""

    kind: str
    value: Any


def label_images(
    rows: Sequence[Row],
    finder: Finder,
    class_names: list[str] | None,
    origin: str,
    where: str,
    problems: Sequence[str] = (),
) -> Labels:
    """Check the rows and match them to images. What most rows hold is what all must hold.

    Where there are fractions and no class names, whole numbers are numbers like them, not classes.

    Raises GanError, beginning with `where`, if there are more class names than there may be classes.
    """
    lines = list(problems)
    values = [_value(row.label) for row in rows]
    usual = _usual_kind(values, may_be_numbers=not class_names)
    length = {FRACTION: _list_of(1)}.get(usual, usual)
    if usual not in (CLASS, NAME, "") and class_names and length != _list_of(len(class_names)):
        lines.append(f"{printable(origin)}: has {len(class_names)} class names, but the usual label is {usual}")
        class_names = None
    if usual == NAME and class_names is None:
        class_names = sorted({one.value for one in values if isinstance(one, _Value) and one.kind == NAME})
        if len(class_names) > MAX_CLASSES:
            raise GanError(f"{where}: has {len(class_names):,} different class names; at most {MAX_CLASSES:,} can be")
    numbers = {name: number for number, name in enumerate(class_names or [])}
    labels = [one if isinstance(one, Wrong) else _label(one, usual, numbers) for one in values]
    found = finder.find_all([row.path for row in rows])
    elsewhere = [(row.name, image.name or "") for row, image in zip(rows, found, strict=True) if image.is_elsewhere]
    if elsewhere:
        name, image_name = map(printable, elsewhere[0])
        count = "1 row names" if len(elsewhere) == 1 else f"{len(elsewhere):,} rows name"
        lines.append(
            f"{printable(origin)}: {count} other folders ({name} is taken for {image_name}); matched by file name alone"
        )
    by_name, wrong = _matched(rows, labels, found)
    return Labels(by_name, class_names, origin, lines + wrong)


def are_class_names(names: Any) -> bool:
    """Whether it is a list of different names, of no more classes than there may be."""
    return (
        isinstance(names, list)
        and 0 < len(names) <= MAX_CLASSES
        and all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
    )


def _usual_kind(values: Sequence[_Value | Wrong], may_be_numbers: bool) -> str:
    """The kind that most rows hold; "" where none holds any. One fraction shows that no number is a class."""
    kinds = Counter(one.kind for one in values if isinstance(one, _Value))
    if may_be_numbers and FRACTION in kinds:
        kinds[FRACTION] += kinds.pop(CLASS, 0)
    return kinds.most_common(1)[0][0] if kinds else ""


def _value(label: Any) -> _Value | Wrong:
    """Kind and value of a JSON value as a label."""
    if isinstance(label, str):
        return _Value(NAME, label) if label else Wrong("has no label")
    is_list = isinstance(label, list)
    numbers = label if is_list else [label]
    if not numbers:
        return Wrong("its list is empty")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return Wrong(f"{shortened(number)} is not a number")
        if not abs(number) <= FLOAT32_MAX:  # not a number is not below it either
            return Wrong(f"{shortened(number)} is not a finite number")
    if is_list:
        return _Value(_list_of(len(label)), label)
    return _Value(CLASS, int(label)) if label == int(label) else _Value(FRACTION, label)


def _label(one: _Value, usual: str, numbers: dict[str, int]) -> Label | Wrong:
    """The label that a value stands for. `numbers`: class name -> class."""
    kind, value = one
    if usual == FRACTION and kind in (CLASS, FRACTION):
        return [value]
    if kind != usual:
        return Wrong(f"{shortened(value)} is {kind}, but the usual one here is {usual}")
    if kind == NAME:
        return numbers[value] if value in numbers else Wrong(f"{shortened(value)} is none of the class names")
    if kind == CLASS and value < 0:
        return Wrong(f"class {shortened(value)} is negative")
    if kind == CLASS and value >= MAX_CLASSES:
        largest = f"number the classes from 0 on, at most {MAX_CLASSES:,}"
        return Wrong(f"class {shortened(value)} is out of range; {largest}")
    if kind == CLASS and numbers and value >= len(numbers):
        return Wrong(f"class {value} is out of range: there are {len(numbers)} class names")
    return value


def _matched(
    rows: Sequence[Row], labels: Sequence[Label | Wrong], found: Sequence[Found]
) -> tuple[dict[str, Label], list[str]]:
    """Image name -> label, and a line for each row with a problem. Of labels that differ none counts."""
    row_of: dict[str, Row] = {}  # the first that names the image
    for row, image in zip(rows, found, strict=True):
        if image.name is not None:
            row_of.setdefault(image.name, row)
    first: dict[str, tuple[Row, Label]] = {}  # the first with a label that is one
    dropped: set[str] = set()
    lines = []
    for row, label, image in zip(rows, labels, found, strict=True):
        problem = label.why if isinstance(label, Wrong) else None
        if image.name is None:
            unmatched = _unmatched(image, row_of)
            problem = unmatched if problem is None else f"{unmatched}, and {problem}"
        elif isinstance(label, Wrong):
            dropped.add(image.name)
        elif image.name not in first:
            first[image.name] = row, label
        else:
            other, known = first[image.name]
            if label == known:
                problem = f"{printable(image.name)} is there already, in row {other.number}"
            else:
                problem = f"is {shortened(row.label)} here, but {shortened(other.label)} in row {other.number}"
                dropped.add(image.name)
        if problem is not None:
            lines.append(f"{printable(row.file)}, row {row.number} ({printable(row.name)[:120]}): {problem}")
    return {name: label for name, (_, label) in first.items() if name not in dropped}, lines


def _unmatched(image: Found, row_of: dict[str, Row]) -> str:
    """Why a row's path means no image."""
    if image.taken is not None:
        return f"{printable(image.taken)} is there already, in row {row_of[image.taken].number}"
    return "could mean several images; write its whole path" if image.is_several else "no such image"


def _list_of(count: int) -> str:
    return f"a list of {count} number{'' if count == 1 else 's'}"

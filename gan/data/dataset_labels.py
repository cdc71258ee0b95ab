"""The labels of a packed dataset: the rows of its dataset.json, checked, as the numbers that networks take."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from typing import Any

import numpy as np

from gan.errors import GanError, printable

MAX_CLASSES = 10_000  # each is a column of every label
FLOAT32_MAX = float(np.finfo(np.float32).max)  # labels are float32 in training
CLASSES, MULTI_HOT, VECTORS = "classes", "multi-hot", "vectors"

_NAMED = 5  # bad rows that an error spells out


@dataclass(frozen=True)
class LabelRows:
    """Labels of images."""

    rows: np.ndarray
    """distinct labels, float32 `[K, label_dim]`"""
    index: np.ndarray
    """which of them each image has, int64 `[images]`"""
    kind: str
    """`classes`: one column each, one of them 1; `multi-hot`: all columns 0 or 1; else `vectors`"""
    class_names: list[str] | None
    """what the columns mean"""


def read_labels(content: dict[str, Any], names: list[str], where: str) -> LabelRows:
    """The labels of the images `names` in the content of a dataset.json. Rows of other files do not matter.

    Args:
        where: names the file in errors.

    Raises GanError with the first bad rows and how many there are.
    """
    class_names = _class_names(content.get("class_names"), where)
    labels, problems = _by_name(content.get("labels"), names, where)
    are_classes = sum(isinstance(label, list) for label in labels.values()) * 2 <= len(labels)
    if are_classes:
        limit = len(class_names) if class_names else MAX_CLASSES
        kind, problem_of = CLASSES, lambda label: _class_problem(label, limit, class_names is not None)
    else:
        length = len(class_names) if class_names else _usual_length(labels)
        kind, problem_of = VECTORS, lambda label: _vector_problem(label, length)
    for name in names:
        problem = problem_of(labels[name]) if name in labels else "has no label"
        if problem is not None:
            problems.append(f"{name} {problem}")
    if problems:
        rest = len(problems) - _NAMED
        more = f"; and {rest} more" if rest > 0 else ""
        count = f"{len(problems)} bad label" + "s" * (len(problems) > 1)
        raise GanError(f"{where}: {count}: {'; '.join(problems[:_NAMED])}{more}; mend them, or pack the images again")
    values = [labels[name] for name in names]
    if are_classes:
        index = np.asarray(values, dtype=np.int64)
        rows = np.eye(len(class_names) if class_names else int(index.max()) + 1, dtype=np.float32)
    else:
        rows, index = np.unique(np.asarray(values, dtype=np.float32), axis=0, return_inverse=True)
        if ((rows == 0) | (rows == 1)).all():
            kind = MULTI_HOT
    return LabelRows(rows, index.reshape(-1).astype(np.int64), kind, class_names)


def _class_names(listed: Any, where: str) -> list[str] | None:
    if not listed:
        return None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise GanError(f'{where}: "class_names" is {shortened(listed)}, not a list of texts; mend it, or pack again')
    if len(listed) > MAX_CLASSES:
        raise GanError(f'{where}: "class_names" has {len(listed)} names; {MAX_CLASSES} are the most')
    return listed


def _by_name(listed: Any, names: list[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """{image: label} as far as the rows are legible, and what is wrong with the others."""
    if not listed:
        raise GanError(f"{where}: has no labels; leave out --cond, or pack the images with labels (--labels)")
    if not isinstance(listed, list):
        raise GanError(f'{where}: "labels" is not a list of [file name, label]; mend it, or pack again')
    wanted = set(names)
    labels: dict[str, Any] = {}
    problems, twice = [], set()
    for number, row in enumerate(listed):
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            problems.append(f"row {number} is {shortened(row)}, not [file name, label]")
            continue
        name = posixpath.normpath(row[0].replace("\\", "/"))
        if name in labels and name not in twice:
            twice.add(name)
            problems.append(f"{name} has more than one row")
        if name in wanted:
            labels.setdefault(name, row[1])
    return labels, problems


def _class_problem(label: Any, limit: int, named: bool) -> str | None:
    if type(label) is not int or label < 0:
        return f"is {shortened(label)}, not a class number from 0 on"
    if label < limit:
        return None
    return f"is class {label}, but class_names has {limit}" if named else f"is class {label}, beyond {limit - 1}"


def _usual_length(labels: dict[str, Any]) -> int:
    lengths = [len(label) for label in labels.values() if isinstance(label, list)]
    return max(set(lengths), key=lengths.count)


def _vector_problem(label: Any, length: int) -> str | None:
    if not isinstance(label, list) or not label or not set(map(type, label)) <= {int, float}:
        return f"is {shortened(label)}, not a list of numbers"
    if len(label) != length:
        return f"has {len(label)} number{'s' * (len(label) > 1)}, not {length}"
    if not all(abs(value) <= FLOAT32_MAX for value in label):
        return f"is {shortened(label)}, not a list of finite numbers"
    return None


def shortened(value: Any) -> str:
    """A value out of a file of labels for a message, however long or odd it is."""
    try:
        text = printable(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        return "that"
    return text if len(text) <= 40 else text[:37] + "..."

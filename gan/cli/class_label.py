"""What pictures of a network with classes or labels shall show: --class and --label, as the numbers that it takes."""

from __future__ import annotations

import difflib
import math
import re
from typing import TYPE_CHECKING, Any

import click

from gan.errors import printable

if TYPE_CHECKING:
    from gan.models import Snapshot

_LISTED = 12  # classes that an error spells out


class LabelType(click.ParamType):
    """Finite numbers, such as 0.5,1,0."""

    name = "label"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            self.fail("is not a list of numbers; write it like 0.5,1,0", param, ctx)
        return numbers


def chosen_label(
    snapshot: Snapshot, size: int, classes: tuple[str, ...], label: list[float] | None, problems: list[str]
) -> list[float]:
    """The label that --class or --label asks for: `size` numbers, as the network takes them."""
    from gan.data.dataset_labels import CLASSES, VECTORS

    path, names = snapshot.source, snapshot.class_names or []
    kind = snapshot.training_set_kwargs.get("label_kind", CLASSES)
    if size == 0:
        given = [f"--class {classes[0]}"] if classes else ["--label"] if label is not None else []
        problems += [f"{option}: {path} was trained without classes; leave it out" for option in given]
        return []
    if classes and label is not None:
        problems.append("--class and --label: both say what the pictures show; give one of them")
    elif label is not None:
        if len(label) == size:
            return label
        problems.append(f"--label: has {len(label)} number{'s' * (len(label) > 1)}; {path} takes {size}")
    elif kind == VECTORS:
        example = "--label " + ",".join(["0"] * size if size <= _LISTED else ["0", "0", "..."])
        if classes:
            problems.append(f"--class {classes[0]}: {path} has vectors for labels, no classes; give {example}, for one")
        else:
            problems.append(f"--label: is missing; {path} takes {size} numbers, like {example}")
    elif not classes:
        problems.append(f"--class: is missing; {path} has {_listed(names, size)}")
    elif kind == CLASSES and len(classes) > 1:
        problems.append(f"--class: was given {len(classes)} times; a picture of {path} has one class")
    else:
        numbers = [_class_number(text, names, size) for text in classes]
        for text, number in zip(classes, numbers, strict=True):
            if number is None:
                problems.append(f"--class {text}: {_near(text, names)}{path} has {_listed(names, size)}")
        return [float(number in numbers) for number in range(size)]
    return []


def _class_number(text: str, names: list[str], size: int) -> int | None:
    """The class of this name or number. Where names are numbers themselves, only names will do: "3" must not be "4"."""
    if text in names:
        return names.index(text)
    is_number = re.fullmatch("[0-9]{1,9}", text) and not _has_number(names)
    return int(text) if is_number and int(text) < size else None


def _has_number(names: list[str]) -> bool:
    return any(re.fullmatch("[0-9]+", name) for name in names)


def _near(text: str, names: list[str]) -> str:
    by_case = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(text.casefold(), by_case, n=1)
    return f"did you mean {printable(by_case[close[0]])}? " if close else "is not one of them; "


def _listed(names: list[str], size: int) -> str:
    if not names:
        return f"classes 0 to {size - 1}"
    numbers = [""] * size if _has_number(names) else [f"{number} " for number in range(size)]
    shown = ", ".join(number + printable(name) for number, name in zip(numbers[:_LISTED], names, strict=False))
    return f"the classes {shown}" + (f" and {size - _LISTED} more" if size > _LISTED else "")

"""Rows of labels out of JSON: a dataset.json, or what people write like one."""

from __future__ import annotations

import json
import posixpath
from typing import Any, NamedTuple

from gan.data.dataset_labels import shortened
from gan.data.label_matching import Row, are_class_names
from gan.errors import GanError, printable

FORMS = '{"labels": [["name.png", 3], ...]}'


class JsonRows(NamedTuple):
    """What a JSON file says: `rows` is None where it says that there are no labels; `problems` are a line each."""

    rows: list[Row] | None
    class_names: list[str] | None
    problems: list[str]


class _Object(dict[str, Any]):
    """A JSON object that also knows keys that come twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def rows_from_json(text: str, file: str, folder: str, where: str) -> JsonRows:
    """What is in the text of a `file` whose names are relative to `folder`.

    Raises GanError, beginning with `where`, if it is no list of labels.
    """
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise GanError(f"{where} is not valid JSON ({error}); mend it, or give --labels none") from error
    listed = content.get("labels") if isinstance(content, _Object) else content
    if listed is None:
        return JsonRows(None, None, [])
    if isinstance(listed, _Object):
        listed = [list(pair) for pair in listed.pairs]
    if not isinstance(listed, list):
        raise GanError(f'{where}: "labels" is not a list; wanted is {FORMS}, or --labels none')
    rows, problems = [], []
    for number, row in enumerate(listed, start=1):
        if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str):
            rows.append(Row(file, number, row[0], posixpath.join(folder, row[0].replace("\\", "/")), row[1]))
        else:
            problems.append(f'{printable(file)}, row {number}: is {shortened(row)}; wanted is ["name.png", label]')
    class_names = content.get("class_names") if isinstance(content, _Object) else None
    if class_names is not None and not are_class_names(class_names):
        problems.append(f'{printable(file)}: "class_names" is not a list of different names; they are left out')
        class_names = None
    return JsonRows(rows, class_names, problems)

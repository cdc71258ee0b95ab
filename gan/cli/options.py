"""The command line of a training run, for the commands that make one: each option is declared in TrainOptions."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import click

from gan import train_options as choices
from gan.cli.command import Option
from gan.image_size import Size
from gan.presets import AUGMENT_PIPES, PRESETS
from gan.train_options import TrainOptions, flag

LATEST = "latest"  # what --resume alone means
_CHOICES = {
    "cfg": list(PRESETS),
    "aug": list(choices.AUGMENT_MODES),
    "augpipe": list(AUGMENT_PIPES),
    "device": list(choices.DEVICES),
    "precision": list(choices.PRECISIONS),
    "cache": list(choices.CACHES),
    "cuda_graphs": list(choices.CUDA_GRAPHS),
    "ops": list(choices.OPS),
    "on_divergence": list(choices.DIVERGENCE),
}
_METAVARS = {
    "pretrained_base": "DIR|URL",
    "metrics": "auto|none|LIST",
    "detectors": "DIR",
    "metrics_budget": "PERCENT",
}


class _CountOrAuto(click.ParamType):
    """A whole number, or the word auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor auto", param, ctx)


class SizeType(click.ParamType):
    """Width and height in pixels, such as 384x256; with `or_side` also one number, the side of a square."""

    name = "size"

    def __init__(self, or_side: bool = False) -> None:
        self._or_side = or_side

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", value)
        if match is None or not (match[2] or self._or_side):
            what = "neither a number nor a width and a height" if self._or_side else "not a width and a height"
            example = "256 or 256x256" if self._or_side else "256x256"
            self.fail(f"is {what}; write it like {example}", param, ctx)
        return int(match[1]), int(match[2] or match[1])


pretrained_base = click.option(  # for commands with options of their own
    "--pretrained-base",
    cls=Option,
    metavar=_METAVARS["pretrained_base"],
    help=TrainOptions.__dataclass_fields__["pretrained_base"].metadata["help"],
)


def train_options(names: Sequence[str] | None = None, helps: Mapping[str, str] | None = None) -> list[click.Parameter]:
    """The command line options of these fields of TrainOptions, or of all; `helps` replaces help texts."""
    hints, other = get_type_hints(TrainOptions), helps or {}
    fields = [field for field in dataclasses.fields(TrainOptions) if names is None or field.name in names]
    return [_option(field, hints[field.name], other.get(field.name, field.metadata["help"])) for field in fields]


def parsed(values: Mapping[str, Any], problems: Sequence[str]) -> TrainOptions:
    """The options as typed; those whose value was refused, as `problems` say, have their default."""
    return TrainOptions(**accepted(values, problems))


def accepted(values: Mapping[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """The values as typed, without those that were refused, as `problems` say."""
    broken = {problem.split()[0].rstrip(":") for problem in problems}
    return {name: value for name, value in values.items() if value is not None or flag(name) not in broken}


def limit_spinning() -> None:
    """Have the threads of a CPU run wait for each other less greedily; takes effect before PyTorch is loaded.

    Waiting threads spin, by default so long that any other busy process on the machine slows training down by a factor
    of 15. With this it is 5, and on a quiet machine the cost is below 5 % (docs/experiments.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _option(field: dataclasses.Field[Any], hint: Any, text: str) -> Option:
    """The option of a field: its name, type and default are written there."""
    kind = next((t for t in (bool, int, float, str) if hint in (t, t | None)), str)
    settings: dict[str, Any] = {"default": field.default, "help": text}
    if field.default not in (None, False):
        settings["show_default"] = True
    if field.name in _CHOICES:
        settings["type"] = click.Choice(_CHOICES[field.name])
    elif kind is bool:  # also --mirror=1, --mirror=true
        settings.update(type=bool, is_flag=False, flag_value=True, metavar="[BOOL]")
    elif field.name == "batch_gpu":
        settings["type"] = _CountOrAuto()
    elif field.name in _METAVARS:
        settings.update(type=kind, metavar=_METAVARS[field.name])
    elif field.name == "resume":
        settings.update(type=str, is_flag=False, flag_value=LATEST, metavar="[RUN_DIR|FILE|URL|NAME]")
    else:
        settings["type"] = kind
    return Option([flag(field.name), field.name], **settings)

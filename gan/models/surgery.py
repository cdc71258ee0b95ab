"""Carry the weights of one network over to another of another shape, so that it computes the same as far as possible.

Weights are scaled when they are used (equalised learning rate), by gains that depend on the number of inputs. A weight
whose layer has another number of inputs here is therefore rescaled by the ratio of the gains. New channels keep the
values that the new network was made with, and what reads them begins at 0: they take part once they have learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gan.image_size import IMAGE_KINDS
from gan.models.added_levels import AddedLevels
from gan.networks import Generator

LOADED, ADAPTED, NEW, LEFT_OUT = "loaded", "adapted", "new", "left out"

_LUMA = (0.299, 0.587, 0.114)
_NAMED = 3  # classes that a line names
_OPAQUE = 1.0  # alpha of a picture without holes
_Value = Callable[[torch.Tensor], torch.Tensor]
_Columns = tuple[list[int], list[int]]  # inputs here, and which inputs of the file they are


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of a tensor."""

    name: str
    kind: str
    """LOADED, ADAPTED, NEW or LEFT_OUT"""
    why: str = ""
    """how it is adapted, why it is new or left out"""
    value: _Value | None = None
    """what it is to hold, from what the new network was made with; None: that stays"""


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the columns of labels stand for, as far as that is known."""

    stored: Sequence[str] | None = None
    here: Sequence[str] | None = None

    def matched(self, num_stored: int, num_here: int) -> tuple[_Columns, str]:
        """Those of the same name, or by position if no name is shared and there are as many.

        Also what is to be said of that; "" if the columns are the same, as far as is known.
        """
        stored = list(self.stored or ()) if len(self.stored or ()) == num_stored else []
        here = list(self.here or ()) if len(self.here or ()) == num_here else []
        to = [column for column, name in enumerate(here) if name in stored]
        of = [stored.index(here[column]) for column in to]
        every = list(range(num_here))
        if to:
            are_same = of == every == list(range(num_stored))
            return (to, of), "" if are_same else f"{len(to)} of {num_here} classes are in it"
        if num_stored == num_here:
            pairs = [f"{old} -> {new}" for old, new in zip(stored, here, strict=False)]
            more = ", ..." if len(pairs) > _NAMED else ""
            return (every, every), f"by position: {', '.join(pairs[:_NAMED])}{more}" if pairs else ""
        if stored and here:
            return ([], []), "none of its classes is one of the dataset"
        whose, count = ("dataset", num_here) if stored else ("file", num_stored)
        return ([], []), f"the {whose} does not name its {count} classes"


def fates(source: Any, target: Any, classes: Classes) -> list[Fate]:
    """What becomes of each tensor of `target`, and of those that only `source` has. Both are G, or both D.

    Shapes decide: `target` may have nothing else (meta tensors), and nothing is computed yet.
    """
    return _Surgery(source, target, classes).fates()


class _Surgery:
    """A pair of networks and what differs between them."""

    def __init__(self, source: Any, target: Any, classes: Classes) -> None:
        self.source, self.target = source, target
        self.is_generator = isinstance(target, Generator)
        self.have: dict[str, torch.Tensor] = source.state_dict()
        self.want: dict[str, torch.Tensor] = target.state_dict()
        levels = [(net.synthesis if self.is_generator else net).block_resolutions for net in (source, target)]
        self.old_top, self.top = (max([4, *each]) for each in levels)
        self.classes, self.of_classes = classes.matched(source.c_dim, target.c_dim)
        self.colours = _Colours.between(source.img_channels, target.img_channels)
        self.architecture = (target.synthesis if self.is_generator else target).b4.architecture
        self.moved = self._moved()
        self.added = self._added()

    def fates(self) -> list[Fate]:
        found = [self._fate(name) for name in self.want]
        used = {self.moved.get(name, name) for name in self.want}
        if self.added is not None:
            used |= {f"b{self.old_top}.fromrgb.{leaf}" for leaf in ("weight", "bias")}
        return [*found, *(Fate(name, LEFT_OUT, "no place for it here") for name in self.have if name not in used)]

    def _moved(self) -> dict[str, str]:
        """{name here: name in the file} of D's first layer, which moves with the highest level if it fits there.

        Behind it a new level of a residual D does nothing but halve (`_beginning`).
        """
        here, there = (f"b{top}.fromrgb." for top in (self.top, self.old_top))
        weights = self.want.get(f"{here}weight"), self.have.get(f"{there}weight")
        if self.is_generator or self.top == self.old_top or self.architecture != "resnet":
            return {}
        if weights[0] is None or weights[1] is None or len(weights[0]) != len(weights[1]):
            return {}
        return {here + leaf: there + leaf for leaf in ("weight", "bias")}

    def _added(self) -> AddedLevels | None:
        """Levels of D above those of the file, if they can hand on what its first layer reads."""
        if self.is_generator or self.moved or self.top <= self.old_top or self.colours is None:
            return None
        fromrgb = getattr(getattr(self.source, f"b{self.old_top}"), "fromrgb", None)
        if fromrgb is None or fromrgb.activation != "lrelu" or not AddedLevels.possible(self.target, self.old_top):
            return None
        weight = fromrgb.weight.detach()[:, :, 0, 0].double() * fromrgb.weight_gain
        bias = fromrgb.bias.detach() + (weight[:, -1] * _OPAQUE if self.colours.alpha_is_gone else 0)
        return AddedLevels(self.target, self.old_top, weight @ self.colours.judged, bias, fromrgb.act_gain)

    def _fate(self, name: str) -> Fate:
        beginning = self._beginning(name)
        stored = self.have.get(self.moved.get(name, name))
        if stored is None and self.added is not None and self.added.takes_over(*_level_and_layer(name)):
            return Fate(name, ADAPTED, f"does what b{self.old_top}.fromrgb did", beginning)
        if stored is None:
            return Fate(name, NEW, "begins so that nothing changes" if beginning else "not in the file", beginning)
        value, how = self._carried(name, stored)
        if value is None:
            return Fate(name, NEW, how)
        if name in self.moved:
            how = f"moved from b{self.old_top}" + (f", {how}" if how else "")
        return Fate(name, ADAPTED if how else LOADED, how, value)

    def _beginning(self, name: str) -> _Value | None:
        """What a tensor of a level that is new begins with, where there is something that keeps the function."""
        level, layer = _level_and_layer(name)
        if level <= self.old_top:
            return None
        if self.is_generator:
            if self.architecture != "skip" or layer not in ("torgb.weight", "torgb.bias"):
                return None
            return self._opaque if self._is_last_bias(name) else torch.zeros_like
        if self.added is not None:
            return self.added.value(level, layer)
        passes_on = self.architecture == "skip" or self.moved
        if passes_on and layer in ("conv1.weight", "conv1.bias"):
            return torch.zeros_like
        if passes_on and layer == "skip.weight":  # the residual branch is 0: this one alone hands on half the size
            gain = self.target.get_submodule(f"b{level}.skip").weight_gain * 0.5**0.5
            return lambda fresh: torch.eye(*fresh.shape[:2]).to(fresh)[:, :, None, None] / gain
        return None

    def _carried(self, name: str, stored: torch.Tensor) -> tuple[_Value | None, str]:
        """The value that a tensor of the file has here, and how it came about ("": as it is); None, and why not."""
        fresh = self.want[name]
        layer, _, leaf = name.rpartition(".")
        part = layer.rpartition(".")[2]
        ratio = self._ratio(name)
        if part == "embed" and leaf == "weight":
            return self._embedding(stored, fresh, ratio)
        if self._has_colours(part, leaf):
            return self._coloured(name, stored, ratio)
        if stored.shape == fresh.shape:
            return _copied(stored, ratio), "" if ratio == 1 else "rescaled"
        is_output = layer == "b4.out"
        other_size = stored.shape[1:] != fresh.shape[1:] if leaf == "const" else stored.shape[2:] != fresh.shape[2:]
        has_no_width = leaf in ("noise_const", "resample_filter")
        if (is_output and bool(self.source.c_dim) != bool(self.target.c_dim)) or other_size or has_no_width:
            return None, f"{list(stored.shape)} in the file, {list(fresh.shape)} here"
        if name == "b4.fc.weight":
            return self._flattened(stored, fresh, ratio)
        if is_output:  # logits are divided by the root of this number
            return _placed(stored, ratio * (len(fresh) / len(stored)) ** 0.5, spare_rows=0), "width"
        if name == "b4.conv.weight":
            return self._after_mbstd(stored, fresh, ratio)
        if name == "mapping.fc0.weight" and self.is_generator:
            return _placed(stored, ratio, self._of_z_and_label(stored, fresh)), "inputs"
        if name == "mapping.fc0.weight":
            return self._of_embedding(stored, fresh, ratio), "width"
        begins_silent = layer in ("b8.conv1", "b8.skip", "b4.fromrgb", "mapping.embed") and not self.is_generator
        return _placed(stored, ratio, spare_rows=0 if begins_silent else None), "width"

    def _ratio(self, name: str) -> float:
        """Of the gains that a tensor is used with, in the file's network and here."""
        gains = []
        for network, own_name in ((self.source, self.moved.get(name, name)), (self.target, name)):
            layer, _, leaf = own_name.rpartition(".")
            gains.append(getattr(network.get_submodule(layer), f"{leaf}_gain", 1))
        return gains[0] / gains[1]

    def _is_last_bias(self, name: str) -> bool:
        """Whether this is where alpha begins: lower levels are resized, which darkens the borders of a constant."""
        return name == f"synthesis.b{self.top}.torgb.bias" and self.colours is not None and self.colours.alpha_is_new

    @staticmethod
    def _opaque(fresh: torch.Tensor) -> torch.Tensor:
        value = torch.zeros_like(fresh)
        value[-1] = _OPAQUE
        return value

    def _embedding(self, stored: torch.Tensor, fresh: torch.Tensor, ratio: float) -> tuple[_Value | None, str]:
        if not self.classes[0]:
            return None, self.of_classes
        if stored.shape == fresh.shape and not self.of_classes:
            return _copied(stored, ratio), "" if ratio == 1 else "rescaled"
        spare_rows = None if self.is_generator else 0  # see `_of_embedding`
        value = _placed(stored, ratio, self.classes, spare_rows, fresh_columns=True)
        return value, self.of_classes or "width"

    def _of_embedding(self, stored: torch.Tensor, fresh: torch.Tensor, ratio: float) -> _Value:
        """The first layer of D's mapping reads the label's embedding, normalised.

        Numbers that are new there begin as 0, but count in the mean square; what reads them need not be 0.
        """
        larger = max(fresh.shape[1] / stored.shape[1], 1) ** 0.5
        return _placed(stored, ratio / larger, fresh_columns=True)

    def _of_z_and_label(self, stored: torch.Tensor, fresh: torch.Tensor) -> _Columns:
        """The mapping of G reads z first and then the label."""
        z_old, z_new = self.source.z_dim, self.target.z_dim
        z = min(z_old, z_new)
        label = min(stored.shape[1] - z_old, fresh.shape[1] - z_new)
        return [*range(z), *range(z_new, z_new + label)], [*range(z), *range(z_old, z_old + label)]

    def _flattened(self, stored: torch.Tensor, fresh: torch.Tensor, ratio: float) -> tuple[_Value | None, str]:
        """Inputs are the pixels of channel after channel."""
        have, want = len(stored), len(fresh)
        if stored.shape[1] // have != fresh.shape[1] // want:
            return None, f"{list(stored.shape)} in the file, {list(fresh.shape)} here"
        by_channel = _placed(stored.view(have, have, -1), ratio)
        return lambda given: by_channel(given.reshape(want, want, -1)).view_as(given), "width"

    def _after_mbstd(self, stored: torch.Tensor, fresh: torch.Tensor, ratio: float) -> tuple[_Value | None, str]:
        """Inputs are the channels of the lowest level, and behind them what minibatch-stddev says of those.

        Channels that are new there begin silent (`_carried`), as they would count in the mean deviation;
        so that they learn, what reads them does not begin at 0.
        """
        have, want = len(stored), len(fresh)
        extra, kept = stored.shape[1] - have, min(have, want)
        if extra != fresh.shape[1] - want:
            return None, f"{list(stored.shape)} in the file, {list(fresh.shape)} here"
        columns = [*range(kept), *range(want, want + extra)], [*range(kept), *range(have, have + extra)]
        scale = torch.full([kept + extra, 1, 1], ratio, dtype=torch.float64)
        scale[kept:] *= max(want / have, 1)  # the mean is over more channels
        return _placed(stored, scale, columns, fresh_columns=True), "width"

    def _has_colours(self, part: str, leaf: str) -> bool:
        """Whether a tensor of this layer is another one for other image channels."""
        if self.source.img_channels == self.target.img_channels:
            return False
        if part == "torgb" or (part == "fromrgb" and leaf == "weight"):
            return True
        return (part, leaf) == ("fromrgb", "bias") and self.colours is not None and self.colours.alpha_is_gone

    def _coloured(self, name: str, stored: torch.Tensor, ratio: float) -> tuple[_Value | None, str]:
        if self.colours is None:
            return None, f"{self.source.img_channels} channels there, {self.target.img_channels} here"
        how = f"{IMAGE_KINDS[self.source.img_channels]} to {IMAGE_KINDS[self.target.img_channels]}"
        if ".fromrgb." in f".{name}":
            if name.endswith("weight"):
                mixed = torch.einsum("coij,on->cnij", stored.double(), self.colours.judged)
                return _placed(mixed, ratio), how
            layer = self.moved.get(name, name).rpartition(".")[0]
            gain = self.source.get_submodule(layer).weight_gain
            of_alpha = self.have[f"{layer}.weight"][:, -1, 0, 0] * gain * _OPAQUE
            return _placed(stored + of_alpha, ratio), how
        mixed = torch.einsum("no,o...->n...", self.colours.shown, stored.double())
        if self._is_last_bias(name):
            mixed[-1] = _OPAQUE
        return _placed(mixed, ratio), how


@dataclasses.dataclass(frozen=True)
class _Colours:
    """Linear maps between pictures of different channels."""

    shown: torch.Tensor
    """`[here, file]`: what a generator shows"""
    judged: torch.Tensor
    """`[file, here]`: what a discriminator is shown"""
    alpha_is_new: bool
    alpha_is_gone: bool

    @staticmethod
    def between(stored: int, here: int) -> _Colours | None:
        """None if it is not known what the channels mean."""
        if stored not in IMAGE_KINDS or here not in IMAGE_KINDS:
            return None
        has_alpha = [channels == 4 for channels in (stored, here)]
        return _Colours(
            _mixed(stored, here), _mixed(here, stored), has_alpha == [False, True], has_alpha == [True, False]
        )


def _level_and_layer(name: str) -> tuple[int, str]:
    """(64, "conv0.weight") of a tensor of a block; level 0 for everything else."""
    block, _, layer = name.removeprefix("synthesis.").partition(".")
    return (int(block[1:]) if block[:1] == "b" and block[1:].isdigit() else 0), layer


def _mixed(of: int, to: int) -> torch.Tensor:
    """`[to, of]`: grey is repeated, colours become their luma, alpha stays or is left out."""
    mix = torch.zeros([to, of], dtype=torch.float64)
    colours_of, colours_to = min(of, 3), min(to, 3)
    if colours_of == colours_to:
        mix[:colours_to, :colours_of] = torch.eye(colours_to)
    else:
        mix[:colours_to, :colours_of] = 1 if colours_of == 1 else torch.tensor(_LUMA, dtype=torch.float64)
    if of == to == 4:
        mix[3, 3] = 1
    return mix


def _copied(stored: torch.Tensor, ratio: float) -> _Value:
    return lambda fresh: (stored if ratio == 1 else stored * ratio).to(fresh)


def _placed(
    stored: torch.Tensor,
    ratio: float | torch.Tensor,
    columns: _Columns | None = None,
    spare_rows: float | None = None,
    fresh_columns: bool = False,
) -> _Value:
    """`stored`, of `[outputs]` or `[outputs, inputs, ...]`, as the first outputs of a larger tensor or cut to fewer.

    Args:
        ratio: what it is multiplied by; a tensor is broadcast over the chosen inputs.
        columns: which inputs it has; else the first ones.
        spare_rows: what the other outputs are; None: what the new network was made with.
        fresh_columns: other inputs of its outputs stay what the new network was made with, in place of 0.
    """

    def value(fresh: torch.Tensor) -> torch.Tensor:
        rows = min(len(stored), len(fresh))
        result = fresh.clone() if spare_rows is None else torch.full_like(fresh, spare_rows)
        if stored.ndim == 1:
            result[:rows] = (stored[:rows] * ratio).to(fresh)
            return result
        first = list(range(min(stored.shape[1], fresh.shape[1])))
        to, of = columns or (first, first)
        result[:rows] = fresh[:rows] if fresh_columns else 0
        result[:rows, to] = (stored[:rows, of] * ratio).to(fresh)
        return result

    return value

"""Start a new run from the weights of another: which of them, and what of it was carried over."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gan.config import SourceInfo
from gan.errors import GanError, printable
from gan.image_size import IMAGE_KINDS
from gan.models.snapshot import Snapshot
from gan.models.surgery import ADAPTED, LEFT_OUT, LOADED, NEW, Classes, Fate, fates
from gan.networks import Generator, height_width

_KINDS = (LOADED, ADAPTED, NEW, LEFT_OUT)
# Arguments that every run chooses for itself.
_SETTINGS = ("num_fp16_res", "conv_clamp", "fp16_channels_last", "freeze_layers", "mbstd_group_size")
_REASONS = 3  # that a line of the table names
_LISTED = 8  # classes, or layers, that an error spells out


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What becomes of every tensor of a run's networks and of the file's."""

    source: str
    kind: str
    """the format of the file"""
    fates: Mapping[str, Sequence[Fate]]
    """of G, D and G_ema"""
    advice: Sequence[str]
    """what to change so that more fits"""

    @property
    def counts(self) -> Counter[str]:
        """{kind of fate: tensors}."""
        return Counter(fate.kind for network in self.fates.values() for fate in network)

    @property
    def whole(self) -> bool:
        """Whether everything here comes from the file, and everything in the file is here."""
        return set(self.counts) <= {LOADED}

    @property
    def total(self) -> str:
        """`140 tensors loaded, 3 adapted, 2 new, 0 left out`."""
        counts = self.counts
        if self.whole:
            return f"all {counts[LOADED]} tensors loaded"
        return f"{counts[LOADED]} tensors loaded, " + ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS[1:])

    @property
    def refusal(self) -> str:
        """Why a run does not start from this unless it is told to."""
        advice = "; ".join(self.advice) or "it is another kind of network"
        remedies = f"{printable(advice)}; or start from what fits: --allow-partial"
        return f"{self.source}: fits only in part ({self.total}): {remedies}"

    def lines(self) -> list[str]:
        """For the screen: the total, and a table of the parts that are not simply loaded."""
        origin = f"{self.source}, {self.kind}" if self.kind else self.source
        first = printable(f"from {origin}: {self.total}")
        if self.whole:
            return [first]
        rows: list[tuple[str, ...]] = [("", "part", *_KINDS, "")]
        for network, part, members in self._parts():
            counts = Counter(fate.kind for fate in members)
            if set(counts) > {LOADED} or LOADED not in counts:
                reasons = list(dict.fromkeys(fate.why for fate in members if fate.kind != LOADED))
                shown = "; ".join(reasons[:_REASONS]) + ("; ..." if len(reasons) > _REASONS else "")
                rows.append((network, part, *(str(counts[kind]) for kind in _KINDS), shown))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        shown_rows = (
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
            + "".join(f"  {row[i]:>{widths[i]}}" for i in range(2, 6))
            + f"  {row[6]}"
            for row in rows
        )
        return [first, *(printable(row.rstrip()) for row in shown_rows)]

    def listing(self) -> list[str]:
        """A line for each tensor."""
        width = max((len(f"{name}.{fate.name}") for name, network in self.fates.items() for fate in network), default=0)
        return [
            printable(f"{name + '.' + fate.name:<{width}}  {fate.kind:<{len(LEFT_OUT)}}  {fate.why}".rstrip())
            for name, network in self.fates.items()
            for fate in network
        ]

    def _parts(self) -> Iterable[tuple[str, str, list[Fate]]]:
        """(network, part, its tensors); a network all of whose tensors share their fate is one part."""
        for network, members in self.fates.items():
            if len({(fate.kind, fate.why) for fate in members}) == 1:
                yield network, "all", list(members)
                continue
            parts: dict[str, list[Fate]] = {}
            for fate in members:
                parts.setdefault(fate.name.removeprefix("synthesis.").split(".")[0], []).append(fate)
            for part, found in parts.items():
                yield network, part, found


def transfer(
    source: Snapshot,
    G: torch.nn.Module,
    D: torch.nn.Module,
    G_ema: torch.nn.Module,
    allow_partial: bool = False,
    class_names: Sequence[str] | None = None,
) -> TransferReport:
    """Copy the weights of a snapshot into networks of a new run, in place.

    Args:
        allow_partial: adapt what has another shape, and leave what is not in the file as the networks were made.
        class_names: what the columns of the run's labels stand for.

    Raises GanError before anything is copied if the file fits only in part and that is not allowed.
    """
    report = plan_transfer(source, G, D, G_ema, class_names)
    if not report.whole and not allow_partial:
        raise GanError(report.refusal)
    for name, target in (("G", G), ("D", D), ("G_ema", G_ema)):
        _write(report.fates[name], target)
    return report


def plan_transfer(
    source: Snapshot,
    G: torch.nn.Module,
    D: torch.nn.Module,
    G_ema: torch.nn.Module,
    class_names: Sequence[str] | None = None,
) -> TransferReport:
    """What `transfer` would do to networks of these shapes, which need no numbers. Raises GanError without a G."""
    generator, classes = source.require_generator(), Classes(source.class_names, class_names)
    found: dict[str, list[Fate]] = {}
    advice: dict[str, str] = {}
    for name, stored, target in (("G", source.G, G), ("D", source.D, D), ("G_ema", source.G_ema, G_ema)):
        if stored is None and name == "D":
            found[name] = [Fate(tensor, NEW, "the file has no D") for tensor in D.state_dict()]
            advice["D"] = "it holds no discriminator"
            continue
        there = stored or generator
        found[name] = fates(there, target, classes)
        if stored is None:  # only one of the two generators is there
            other = "G_ema" if name == "G" else "G"
            found[name] = [_taken(fate, f"that of {other}") for fate in found[name]]
            advice[name] = f"it holds no {name}"
        if any(fate.kind != LOADED for fate in found[name]):
            advice.update(_remedies(there, target))
    if not advice and any(fate.name == "mapping.embed.weight" and fate.kind != LOADED for fate in found["G"]):
        advice["classes"] = f"its classes are {_listed(classes.stored or ['without names'])}"
    return TransferReport(source.source, source.kind, found, list(advice.values()))


def source_info(source: Snapshot) -> SourceInfo:
    """What the networks of a snapshot are, as `gan.resolve` takes it. Raises GanError without a G."""
    G, D = source.require_generator(), source.D
    given, synthesis = G.arguments(), G.synthesis.arguments(defaults=True)
    block: Any = G.synthesis.b4
    of_synthesis = _others(given.get("synthesis_kwargs"), "channel_base", "channel_max", "use_noise")
    of_mapping = _others(given.get("mapping_kwargs"), "num_layers")
    discriminator: dict[str, Any] = {}
    if D is not None:
        theirs = D.arguments(defaults=True)
        for name in ("channel_base", "channel_max"):
            if theirs[name] != synthesis[name]:
                discriminator[name] = int(theirs[name])
        if theirs["cmap_dim"] is not None:
            discriminator["cmap_dim"] = int(theirs["cmap_dim"])
        for name in ("block_kwargs", "mapping_kwargs", "epilogue_kwargs"):
            discriminator[name] = _others(theirs[name])
    return SourceInfo(
        channel_base=int(synthesis["channel_base"]),
        channel_max=int(synthesis["channel_max"]),
        mapping_layers=int(G.mapping.num_layers),
        use_noise=bool(block.arguments().get("use_noise", True)),
        z_dim=int(G.z_dim),
        w_dim=int(G.w_dim),
        d_architecture=None if D is None else D.arguments(defaults=True)["architecture"],
        generator={"mapping_kwargs": of_mapping, "synthesis_kwargs": of_synthesis},
        discriminator=discriminator,
    )


def frozen_but_new(report: TransferReport, D: torch.nn.Module) -> str:
    """Layers that Freeze-D is to keep as they are, though the file has none of it; "" if there are none."""
    frozen = {name for name, _ in D.named_buffers()}  # the others' weights are parameters
    new = (fate.name for fate in report.fates["D"] if fate.kind == NEW and fate.name in frozen)
    return _listed(dict.fromkeys(name.rpartition(".")[0] for name in new if name.endswith((".weight", ".bias"))))


@torch.no_grad()
def _write(found: Sequence[Fate], target: torch.nn.Module) -> None:
    tensors = target.state_dict(keep_vars=True)
    for fate in found:
        if fate.value is not None:
            tensor = tensors[fate.name]
            tensor.copy_(fate.value(tensor.detach()))


def _taken(fate: Fate, origin: str) -> Fate:
    """A tensor that is in the file, though in another network."""
    if fate.kind not in (LOADED, ADAPTED):
        return fate
    return dataclasses.replace(fate, kind=ADAPTED, why=", ".join(filter(None, [origin, fate.why])))


def _listed(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, _LISTED + 1))
    return ", ".join(first[:_LISTED]) + (", ..." if len(first) > _LISTED else "")


def _remedies(stored: torch.nn.Module, target: torch.nn.Module) -> dict[str, str]:
    """Option -> what to change, for each option in which the two networks differ."""
    theirs, ours = _options(stored), _options(target)
    height, width = height_width(theirs["img_resolution"])
    channels, labels = theirs.get("img_channels"), theirs.get("c_dim")
    here = "x".join(map(str, height_width(ours["img_resolution"])[::-1]))
    advice = {
        "img_resolution": (
            f"its images are {width}x{height}, the dataset's {here}: use a dataset of --width={width} --height={height}"
        ),
        "img_channels": (
            f"its images have {channels} channel{'s' * (channels != 1)}, the dataset {ours.get('img_channels')}"
            + (f": use a dataset of --channels={IMAGE_KINDS[channels].lower()}" if channels in IMAGE_KINDS else "")
        ),
        "c_dim": (
            f"it was trained on labels of {labels} numbers, the dataset's have {ours.get('c_dim')}"
            if labels and ours.get("c_dim")
            else f"it was trained on labels of {labels} numbers: use --cond=1 and a dataset with such labels"
            if labels
            else "it was trained without labels: use --cond=0"
        ),
        "channel_base": f"use --cbase={theirs.get('channel_base')}",
        "channel_max": f"use --cmax={theirs.get('channel_max')}",
        "num_layers": f"use --map-depth={theirs.get('num_layers')}",
        "architecture": f"its architecture is {theirs.get('architecture')}",
        "z_dim": f"its latents have {theirs.get('z_dim')} numbers",
        "w_dim": f"its intermediate latents have {theirs.get('w_dim')} numbers",
    }
    return {name: text for name, text in advice.items() if name in ours and theirs.get(name, ours[name]) != ours[name]}


def _options(network: torch.nn.Module) -> dict[str, Any]:
    """The options that decide names and shapes, with defaults filled in."""
    parts: list[Any] = [network]
    if isinstance(network, Generator):  # a discriminator takes them all itself
        synthesis: Any = network.synthesis
        parts += [synthesis.b4, synthesis, network.mapping]
    options: dict[str, Any] = {}
    for part in parts:
        options.update(part.arguments(defaults=True))
    options["img_resolution"] = network.img_resolution  # a square may have been given as a pair
    return options


def _others(kwargs: Mapping[str, Any] | None, *decided: str) -> dict[str, Any]:
    """Arguments that nothing else decides."""
    return {name: _plain(value) for name, value in (kwargs or {}).items() if name not in (*decided, *_SETTINGS)}


def _plain(value: Any) -> Any:
    """A value that JSON knows: files hold NumPy's too."""
    return value if isinstance(value, (str, int, float, type(None))) else np.asarray(value).tolist()

"""Start a new run from the weights of another."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from gan.errors import GanError
from gan.image_size import IMAGE_KINDS
from gan.models.snapshot import Snapshot
from gan.networks import Generator, height_width

_NAMED = 8  # misfits that an error spells out


@dataclass(frozen=True)
class TransferReport:
    """What was copied."""

    loaded: int  # parameters and buffers of the three networks
    parameters: int  # trained numbers among them


def transfer(source: Snapshot, G: torch.nn.Module, D: torch.nn.Module, G_ema: torch.nn.Module) -> TransferReport:
    """Copy all weights of a snapshot into networks of a new run, in place.

    Raises GanError, before anything is copied, if a parameter or buffer is on one side only or has another shape; it
    names the flags to change.
    """
    pairs = [("G", source.G, G), ("D", source.D, D), ("G_ema", source.G_ema, G_ema)]
    absent = [name for name, stored, _ in pairs if stored is None]
    if absent:
        raise GanError(f"{source.source}: holds no {' and no '.join(absent)}; a run cannot start from it")
    misfits: list[str] = []
    remedies: dict[str, str] = {}
    for name, stored, target in pairs:
        assert stored is not None
        found = _misfits(name, stored, target)
        misfits += found
        if found:
            remedies.update(_remedies(stored, target))
    if misfits:
        advice = "; ".join(remedies.values()) or "another kind of network"
        raise GanError(f"{source.source}: does not fit this run ({advice}): {_listed(misfits)}")
    return TransferReport(
        loaded=sum(_copy(stored, target) for _, stored, target in pairs if stored is not None),
        parameters=sum(p.numel() for _, _, target in pairs for p in target.parameters()),
    )


@torch.no_grad()
def _copy(stored: torch.nn.Module, target: torch.nn.Module) -> int:
    tensors = stored.state_dict(keep_vars=True)
    for name, tensor in target.state_dict(keep_vars=True).items():
        tensor.copy_(tensors[name])
    return len(tensors)


def _misfits(network: str, stored: torch.nn.Module, target: torch.nn.Module) -> list[str]:
    have = {name: list(tensor.shape) for name, tensor in stored.state_dict().items()}
    want = {name: list(tensor.shape) for name, tensor in target.state_dict().items()}
    found = []
    for name in [*want, *(name for name in have if name not in want)]:
        if name not in have:
            found.append(f"{network}.{name} is not in the file")
        elif name not in want:
            found.append(f"{network}.{name} is only in the file")
        elif have[name] != want[name]:
            found.append(f"{network}.{name} is {have[name]} in the file, {want[name]} here")
    return found


def _listed(misfits: list[str]) -> str:
    rest = len(misfits) - _NAMED
    return "; ".join(misfits[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _remedies(stored: torch.nn.Module, target: torch.nn.Module) -> dict[str, str]:
    """Option -> what to change, for each option in which the two networks differ."""
    theirs, ours = _options(stored), _options(target)
    height, width = height_width(theirs["img_resolution"])
    channels, labels = theirs.get("img_channels"), theirs.get("c_dim")
    advice = {
        "img_resolution": f"its images are {width}x{height}: use a dataset of --width={width} --height={height}",
        "img_channels": (
            f"its images have {channels} channel{'s' * (channels != 1)}, the dataset {ours.get('img_channels')}"
            + (f": use a dataset of --channels={IMAGE_KINDS[channels].lower()}" if channels in IMAGE_KINDS else "")
        ),
        "c_dim": (
            f"it was trained on labels of {labels} numbers: use --cond=1 and a dataset with such labels"
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
        bound = inspect.signature(type(part).__init__).bind(part, *part._init_args, **part._init_kwargs)
        bound.apply_defaults()
        options.update(bound.arguments)
    options["img_resolution"] = network.img_resolution  # a square may have been given as a pair
    return options

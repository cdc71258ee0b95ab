"""Safetensors: all networks in one file for sharing, which by its design cannot execute anything.

Tensors are named by network, like `G_ema.synthesis.b4.const`. The metadata's entry `config` is JSON: which class each
network is and the arguments of its constructor. The same JSON lies beside the file for people and other programs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from gan.models.description import Contents, Description
from gan.models.rebuild import MAX_TENSORS, cut
from gan.models.snapshot import Snapshot
from gan.networks import Discriminator, Generator
from torch_utils import persistence

LIBRARIES = ("safetensors",)
_FORMAT, _VERSION = "stylegan2-ada-trainer", 1
_CLASSES: dict[str, type[torch.nn.Module]] = {"G": Generator, "D": Discriminator, "G_ema": Generator}
_DTYPES = ("F32", "F16", "BF16")
_MAX_HEADER, _MAX_CONFIG = 2**24, 2**23  # bytes; with all networks for 1024 pixels it has 60 and 2 thousand


def write(path: Path, snapshot: Snapshot, half: bool = False) -> list[str]:
    """Write the networks to `path`; with `half` in float16, save for what is no matrix, which takes no room.

    Returns notes of what the file cannot carry.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, network in _networks(snapshot).items():
        for key, tensor in network.state_dict().items():
            stored = _halved(tensor) if half else tensor.float()
            tensors[f"{name}.{key}"] = stored.clone(memory_format=torch.contiguous_format)  # of G and G_ema, if one
    config, left_out = _config(snapshot, half)
    save_file(tensors, str(path), metadata={"format": "pt", "config": json.dumps(config)})
    return [f"training_set_kwargs: {', '.join(left_out)} left out, no plain values"] if left_out else []


def config_text(snapshot: Snapshot, half: bool = False) -> str:
    """The JSON that lies beside the file."""
    return json.dumps(_config(snapshot, half)[0], indent=2) + "\n"


def looks_like_one(start: bytes) -> bool:
    """Whether a file that begins so may be one: the length of a header, and the header, which is JSON."""
    return len(start) > 8 and start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 2**40


def read(path: str) -> Contents:
    """What is in a file that `write` wrote.

    Raises ValueError if it is another program's, or damaged; ImportError without the library safetensors.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if int.from_bytes(file.read(8), "little") > _MAX_HEADER:
            raise ValueError("its header is too large for a model of ours, or damaged")
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            config = _read_config(opened.metadata() or {}, names)
            if len(names) > MAX_TENSORS * len(_CLASSES):
                raise ValueError(f"it holds {len(names)} tensors")
            for name in names:
                if (dtype := opened.get_slice(name).get_dtype()) not in _DTYPES:
                    raise ValueError(f"its tensor {cut(name, 80)!r} is {dtype}, not one of {', '.join(_DTYPES)}")
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"it is a safetensors file that is cut short or damaged ({cut(str(error), 120)})") from error
    networks = {}
    for name, kwargs in _described(config):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        networks[name] = Description(_CLASSES[name], kwargs, own)
    astray = [key for key in tensors if key.split(".")[0] not in networks]
    if astray:
        raise ValueError(f"its tensor {cut(astray[0], 80)!r} belongs to none of its networks")
    p, training_set_kwargs = config.get("augment_p"), config.get("training_set_kwargs", {})
    if not (p is None or (isinstance(p, (int, float)) and 0 <= p <= 1)) or not isinstance(training_set_kwargs, dict):
        _damaged()
    return Contents("safetensors file of gan convert", networks, None if p is None else float(p), training_set_kwargs)


def _networks(snapshot: Snapshot) -> dict[str, torch.nn.Module]:
    there = {name: getattr(snapshot, name) for name in _CLASSES}
    return {name: network for name, network in there.items() if network is not None}


def _arguments(network: Any) -> dict[str, Any]:
    """Of its constructor's call, by name."""
    names = list(inspect.signature(type(network).__init__).parameters)[1:]
    return {**dict(zip(names, network._init_args, strict=False)), **network._init_kwargs}


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """As float16 if it is a matrix or more, and fits."""
    half = tensor.half()
    return half if tensor.ndim > 1 and bool(half.isfinite().all()) else tensor.float()


def _config(snapshot: Snapshot, half: bool) -> tuple[dict[str, Any], list[str]]:
    """The JSON's content, and what of training_set_kwargs JSON cannot say."""
    described: dict[str, Any] = {}
    for name, network in _networks(snapshot).items():
        described[name] = {"class": type(network).__name__, "kwargs": persistence.plain(_arguments(network))}
    known, left_out = {}, []
    for key, value in snapshot.training_set_kwargs.items():
        value = value.tolist() if isinstance(value, np.ndarray) else value
        try:
            known[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            left_out.append(key)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "fp16": half,
        "networks": described,
        "augment_p": snapshot.augment_p,
        "training_set_kwargs": known,
    }
    return content, left_out


def _read_config(metadata: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    text = metadata.get("config", "")
    try:
        config = persistence.plain(json.loads(text, parse_constant=_damaged)) if len(text) <= _MAX_CONFIG else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        about = f" with tensors such as {cut(names[0], 80)!r}" if names else " without tensors"
        raise ValueError(f"it is another program's safetensors file{about}; only those of gan convert can be opened")
    if config.get("version") != _VERSION:
        raise ValueError(f"it has version {cut(str(config.get('version')), 20)} of this format; update this program")
    return config


def _described(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    networks = config.get("networks")
    if not isinstance(networks, dict) or not networks:
        _damaged()
    for name, described in networks.items():
        if name not in _CLASSES or not isinstance(described, dict):
            _damaged()
        if described.get("class") != _CLASSES[name].__name__ or not isinstance(described.get("kwargs"), dict):
            _damaged()
        yield name, described["kwargs"]


def _damaged(*_: object) -> NoReturn:
    raise ValueError("its metadata is damaged")

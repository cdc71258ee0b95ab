"""Safetensors: all networks in one file for sharing, which by its design cannot execute anything.

Tensors are named by network, like `G_ema.synthesis.b4.const`. The metadata's entry `config` is JSON: which class each
network is and the arguments of its constructor. The same JSON lies beside the file for people and other programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from gan.models.description import MAX_TENSORS, Contents, Description
from gan.models.snapshot import Snapshot
from gan.models.wording import cut
from gan.networks import Discriminator, Generator
from torch_utils import persistence
from torch_utils.pickle_writer import halved

LIBRARIES = ("safetensors",)
_FORMAT, _VERSION = "stylegan2-ada-trainer", 1
_CLASSES: dict[str, type[torch.nn.Module]] = {"G": Generator, "D": Discriminator, "G_ema": Generator}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MAX_SIZE = 2**40  # of a dimension
_MAX_HEADER, _MAX_CONFIG = 2**24, 2**23  # bytes; with all networks for 1024 pixels it has 60 and 2 thousand


def write(path: Path, snapshot: Snapshot, half: bool = False) -> list[str]:
    """Write the networks to `path`; with `half` in float16, save for what is no matrix, which takes no room.

    Returns notes of what the file cannot carry.
    """
    tensors = {}
    for name, network in snapshot.networks.items():
        for key, tensor in network.state_dict().items():
            tensors[f"{name}.{key}"] = (halved(tensor) if half else tensor.float()).cpu().contiguous()
    config, left_out = _config(snapshot, half)
    _save(path, tensors, {"format": "pt", "config": json.dumps(config)})
    named = cut(", ".join(map(str, left_out)), 200)
    return [f"training_set_kwargs: {named} left out, no plain values"] if left_out else []


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
                stored = opened.get_slice(name)
                if (dtype := stored.get_dtype()) not in _DTYPES.values():
                    known = ", ".join(_DTYPES.values())
                    raise ValueError(f"its tensor {cut(name, 80)!r} is {dtype}, not one of {known}")
                if any(size > _MAX_SIZE for size in stored.get_shape()):  # of no numbers at all, if another is 0
                    raise ValueError(f"its tensor {cut(name, 80)!r} is larger than any that is known")
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
    training_set_kwargs = config.get("training_set_kwargs", {})
    if not isinstance(training_set_kwargs, dict):
        _damaged()
    return Contents("safetensors file of gan convert", networks, config.get("augment_p"), training_set_kwargs)


def _save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """As the library does, whose errors do not tell a full disk, and which takes the memory of all tensors again.

    The file is the header's length in 8 bytes, the header in JSON, and one tensor behind the other.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # each at a multiple of its element's size
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].numpy().data)


def _config(snapshot: Snapshot, half: bool) -> tuple[dict[str, Any], list[str]]:
    """The JSON's content, and what of training_set_kwargs JSON cannot say."""
    described: dict[str, Any] = {}
    for name, network in snapshot.networks.items():
        described[name] = {"class": type(network).__name__, "kwargs": persistence.plain(network.arguments())}
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

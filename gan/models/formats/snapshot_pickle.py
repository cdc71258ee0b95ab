"""Snapshot pickles of the PyTorch generation, ours among them, and of its successor's stylegan2 configuration.

A dict of modules, each a `PersistentObject` (torch_utils/persistence.py): class name, constructor arguments, tensors.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch

from gan.models.description import MAX_TENSORS, Contents, Description
from gan.models.wording import cut
from gan.networks import Discriminator, Generator
from torch_utils import persistence
from torch_utils.persistence import PersistentObject
from torch_utils.safe_pickle import StoredArray, StoredTensor

NETWORKS = ("G", "D", "G_ema")
# Defaults of the successor project's stylegan2 config, whose generator takes the synthesis options directly.
_SUCCESSOR_NETWORK = {"num_fp16_res": 4, "conv_clamp": 256}
_SUCCESSOR_MAPPING = {"w_avg_beta": 0.998}
_MAX_PREFIX = 1000  # characters of a dotted name
_MAX_ENTRIES = 64  # of training_set_kwargs, which has about ten
_OPTIONS_WITHOUT_EFFECT = ("fused_modconv_default",)  # how to compute, not what


def is_one(content: object) -> bool:
    """Whether a pickle's content looks like a snapshot."""
    return isinstance(content, dict) and any(content.get(name) is not None for name in NETWORKS)


def read(content: dict[str, Any]) -> Contents:
    """What `persistence.load` gave -> the networks in it.

    Raises ValueError if they are others than ours, or badly described.
    """
    generators = [content[name] for name in ("G", "G_ema") if content.get(name) is not None]
    successor = any(_is_successor(stored) for stored in generators)
    found = {}
    for name in NETWORKS:
        if content.get(name) is not None:
            try:
                found[name] = _describe(content[name], Discriminator if name == "D" else Generator, successor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return Contents(
        kind="snapshot of the " + ("successor's stylegan2 configuration" if successor else "PyTorch generation"),
        networks=found,
        augment_p=_augment_p(content.get("augment_pipe")),
        training_set_kwargs=_training_set_kwargs(content.get("training_set_kwargs")),
    )


def stored_tensors(stored: object) -> dict[str, StoredTensor]:
    """Parameters and buffers by dotted name, as in `state_dict`. Raises ValueError if `stored` is not a module."""
    tensors: dict[str, StoredTensor] = {}
    pending, seen = [("", stored)], 1
    while pending:
        prefix, module = pending.pop()
        if not isinstance(module, PersistentObject):
            raise ValueError(f"{cut(prefix[:-1], 80)!r} is not a module, but {_name(module)}")
        if module.class_name == "SynthesisInput":
            raise ValueError("it is an alias-free (StyleGAN3) generator; only StyleGAN2 networks can be opened")
        entries = {key: _entries(module, key) for key in ("_parameters", "_buffers", "_modules")}
        seen += sum(map(len, entries.values()))  # nothings too, of which many modules can share a dict
        if seen > MAX_TENSORS:
            raise ValueError(f"it holds more than {MAX_TENSORS} modules and tensors")
        own = [*_named(module, entries["_parameters"]), *_named(module, entries["_buffers"])]
        if len(prefix) > _MAX_PREFIX:
            raise ValueError("its modules are nested too deeply")
        hidden = module.state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, frozenset, list, tuple)) and len(hidden) <= MAX_TENSORS else ()
        for name, tensor in own:
            if not isinstance(tensor, StoredTensor):
                raise ValueError(f"{cut(prefix + name, 80)!r} is not a tensor, but {_name(tensor)}")
            if name not in hidden:
                tensors[prefix + name] = tensor
        pending += [(f"{prefix}{name}.", child) for name, child in _named(module, entries["_modules"])]
    return tensors


def _describe(stored: object, cls: type[torch.nn.Module], successor: bool) -> Description:
    if not isinstance(stored, PersistentObject) or stored.class_name != cls.__name__:
        raise ValueError(f"it is not a {cls.__name__}, but {_name(stored)}")
    return Description(cls, _constructor_arguments(stored, cls, successor), stored_tensors(stored))


def _is_successor(stored: object) -> bool:
    """Whether this is a generator that was given its synthesis options directly."""
    if not isinstance(stored, PersistentObject) or stored.class_name != Generator.__name__:
        return False
    return bool(_arguments(stored, Generator).keys() - set(_parameters(Generator)))


def _entries(module: PersistentObject, key: str) -> dict[Any, Any]:
    values = module.state.get(key) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{key} of a {cut(module.class_name, 60)} is badly described")
    return values


def _named(module: PersistentObject, values: dict[Any, Any]) -> list[tuple[str, Any]]:
    """What is there of tensors or modules."""
    if not all(isinstance(name, str) and len(name) <= _MAX_PREFIX for name in values):
        raise ValueError(f"a name in a {cut(module.class_name, 60)} is badly described")
    return [(name, value) for name, value in values.items() if value is not None]


def _arguments(stored: PersistentObject, cls: type) -> dict[str, Any]:
    """The arguments of the recorded constructor call, by name."""
    positional = persistence.plain(stored.state.get("_init_args") or ())
    named = persistence.plain(stored.state.get("_init_kwargs") or {})
    names = _parameters(cls)
    sound = isinstance(positional, (list, tuple)) and isinstance(named, dict) and len(positional) <= len(names)
    if not sound or not all(isinstance(name, str) for name in named):
        raise ValueError("the arguments of its constructor are badly described")
    return {**dict(zip(names, positional, strict=False)), **named}


def _constructor_arguments(stored: PersistentObject, cls: type, successor: bool) -> dict[str, Any]:
    """What to call our class with."""
    kwargs = _arguments(stored, cls)
    for name in [name for name in kwargs if name.endswith("_kwargs")]:
        if not isinstance(kwargs[name], (dict, type(None))):
            raise ValueError(f"its option {cut(name, 60)} is not a dict, but {_name(kwargs[name])}")
        kwargs[name] = dict(kwargs[name] or {})
    if successor and cls is Generator:
        names = _parameters(cls)
        direct = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        kwargs["synthesis_kwargs"] = {**_SUCCESSOR_NETWORK, **kwargs.get("synthesis_kwargs", {}), **direct}
        kwargs["mapping_kwargs"] = {**_SUCCESSOR_MAPPING, **kwargs.get("mapping_kwargs", {})}
    elif successor:
        kwargs = {**_SUCCESSOR_NETWORK, **kwargs}
    for options in (kwargs.get("synthesis_kwargs", {}), kwargs.get("block_kwargs", {})):
        for name in _OPTIONS_WITHOUT_EFFECT:
            options.pop(name, None)
    return kwargs


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]


def _augment_p(stored: object) -> float | None:
    if stored is None:
        return None
    p = stored_tensors(stored).get("p")
    if p is None or p.shape != () or not (value := p.tensor()).is_floating_point():
        raise ValueError("augment_pipe: no probability 'p' in it")
    return float(value)


def _training_set_kwargs(stored: object) -> dict[str, Any]:
    """What is plain of it: the rest, paths of other systems for one, only informs."""
    if not isinstance(stored, dict):
        return {}
    first = dict(itertools.islice(stored.items(), _MAX_ENTRIES))
    kept = (PersistentObject, StoredTensor, StoredArray)
    return {name: value for name, value in persistence.plain_entries(first).items() if not isinstance(value, kept)}


def _name(stored: object) -> str:
    if isinstance(stored, PersistentObject):
        return f"a {cut(stored.class_name, 60)!r}"
    return repr(cut(str(getattr(stored, "global_name", type(stored).__name__)), 80))

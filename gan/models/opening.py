"""Open the networks of a file, whoever wrote it, without executing anything in it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from gan.errors import GanError
from gan.models import rebuild
from gan.models.snapshot import Snapshot
from gan.networks import Discriminator, Generator
from torch_utils import persistence
from torch_utils.safe_pickle import Opaque, StoredArray, StoredTensor

_NETWORKS = ("G", "D", "G_ema")


def load(path: str | os.PathLike[str]) -> Snapshot:
    """Open a snapshot of ours or of the public PyTorch generation. Nothing in the file is executed.

    Raises GanError, naming the file, if it cannot be read, is no snapshot, or holds networks that are not ours.
    """
    source = os.fspath(path)
    try:
        return _snapshot(persistence.load(source), source)
    except OSError as error:
        raise GanError(f"{source}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise GanError(f"{source}: {' '.join(str(error).split())}") from error


def _snapshot(content: object, source: str) -> Snapshot:
    if isinstance(content, tuple) and len(content) == 3 and all(isinstance(part, Opaque) for part in content):
        raise ValueError("it looks like a snapshot of the TensorFlow generation, which cannot be opened yet")
    if not isinstance(content, dict) or not any(content.get(name) is not None for name in _NETWORKS):
        raise ValueError("it is not a network snapshot (no G, D or G_ema in it)")
    generators = [content[name] for name in ("G", "G_ema") if content.get(name) is not None]
    successor = any(rebuild.is_successor(stored) for stored in generators)
    found: dict[str, Any] = {}
    for name in _NETWORKS:
        stored = content.get(name)
        cls: type[torch.nn.Module] = Discriminator if name == "D" else Generator
        try:
            found[name] = None if stored is None else rebuild.network(stored, cls, successor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Snapshot(
        **found,
        augment_p=_augment_p(content.get("augment_pipe")),
        training_set_kwargs=_training_set_kwargs(content.get("training_set_kwargs")),
        source=source,
    )


def _augment_p(stored: object) -> float | None:
    if stored is None:
        return None
    p = rebuild.stored_tensors(stored).get("p")
    if p is None or p.shape != ():
        raise ValueError("augment_pipe: no probability 'p' in it")
    return float(p.tensor())


def _training_set_kwargs(stored: object) -> dict[str, Any]:
    """What is plain of it: the rest, paths of other systems for one, only informs."""
    kwargs = {}
    for name, value in stored.items() if isinstance(stored, dict) else ():
        try:
            value = persistence.plain(value)
        except ValueError:
            continue
        if isinstance(name, str) and not isinstance(value, (persistence.PersistentObject, StoredTensor)):
            kwargs[name] = np.asarray(value) if isinstance(value, StoredArray) else value
    return kwargs

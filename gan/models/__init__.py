"""Open, write and transfer networks: `load`, `save`, `transfer`."""

from __future__ import annotations

import inspect

import torch

from gan import augment, networks
from gan.models.opening import load
from gan.models.snapshot import Snapshot, save
from gan.models.transfer import TransferReport, transfer
from torch_utils import persistence

__all__ = ["Snapshot", "TransferReport", "load", "save", "transfer"]

persistence.register_classes(
    {
        name: cls
        for module in (networks, augment)
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, torch.nn.Module) and cls.__module__ == module.__name__
    }
)

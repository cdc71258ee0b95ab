"""Networks whose parameters, inputs and outputs are stored: see `tests/golden`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gan import networks

GOLDEN = Path(__file__).parent / "golden"
GENERATORS = sorted(path.stem for path in GOLDEN.glob("generator_*.npz"))
DISCRIMINATORS = sorted(path.stem for path in GOLDEN.glob("discriminator_*.npz"))


def golden(name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Constructor arguments (or a list of cases), parameters, and inputs with their outputs."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    tensors = {key: torch.as_tensor(value) for key, value in arrays.items()}
    parameters = {key.removeprefix("param."): tensors.pop(key) for key in arrays if key.startswith("param.")}
    return meta, parameters, tensors


def class_name(name: str) -> str:
    return "Generator" if name in GENERATORS else "Discriminator"


def golden_network(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A golden network as it was made, in training mode; its inputs with their outputs."""
    kwargs, parameters, tensors = golden(name)
    made = getattr(networks, class_name(name))(**kwargs)
    made.load_state_dict(parameters)
    return made, tensors

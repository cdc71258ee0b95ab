"""Files made to do harm, and files that came to harm."""

import builtins
import contextlib
import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from gan import models, networks
from gan.errors import GanError
from torch_utils import persistence

GENERATOR = {
    "z_dim": 8,
    "c_dim": 0,
    "w_dim": 8,
    "img_resolution": 8,
    "img_channels": 3,
    "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 64, "channel_max": 8},
}


class Payload:
    """Pickles into a call of `function`."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def hostile(canary):
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Payload(os.system, command),
        "eval": Payload(builtins.eval, code),
        "exec": Payload(builtins.exec, code),
        "open": Payload(builtins.open, str(canary), "w"),
        "nested": Payload(builtins.list, Payload(builtins.map, os.system, [command])),
        "in an OrderedDict": Payload(OrderedDict, [("a", Payload(os.system, command))]),
        "in a storage": Payload(torch.storage._load_from_bytes, storage_with(Payload(os.system, command))),
        "pickle in pickle": Payload(pickle.loads, pickle.dumps(Payload(os.system, command))),
        "in a list in a storage": Payload(
            torch.storage._load_from_bytes, storage_with([torch.zeros(1), Payload(os.system, command)])
        ),
    }


def storage_with(value):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("name", hostile("x"))
def test_payloads_would_do_something(name, tmp_path):
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(hostile(tmp_path / "executed")[name]))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("place", ["alone", "G", "state", "init", "tensor", "p", "training_set_kwargs"])
def test_payloads_do_nothing(name, place, tmp_path):
    canary = tmp_path / "executed"
    payload = hostile(canary)[name]
    meta = {"type": "class", "version": 6, "module_src": f"open({str(canary)!r}, 'w')", "class_name": "Generator"}
    state = {
        "_init_args": (),
        "_init_kwargs": payload if place == "init" else GENERATOR,
        "_parameters": {"weight": payload} if place == "tensor" else {},
        "_buffers": {},
        "_modules": {"mapping": payload} if place == "state" else {},
    }
    stored = Payload(persistence._reconstruct_persistent_obj, {**meta, "state": state})
    pipe = {"type": "class", "version": 6, "module_src": "", "class_name": "P", "state": {"_buffers": {"p": payload}}}
    file = tmp_path / "hostile.pkl"
    value = {
        "G": payload if place == "G" else stored,
        "augment_pipe": Payload(persistence._reconstruct_persistent_obj, pipe) if place == "p" else None,
        "training_set_kwargs": payload if place == "training_set_kwargs" else {},
    }
    file.write_bytes(pickle.dumps(payload if place == "alone" else value, protocol=4))
    with contextlib.suppress(ValueError):
        assert persistence.load(file) is not None
    with pytest.raises(GanError) as caught:
        models.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_a_damaged_file_is_read_or_refused(tmp_path):
    """Whatever a flipped byte makes of it, the answer is a snapshot or one clear error."""
    file = io.BytesIO()
    persistence.dump({"G": networks.Generator(**GENERATOR), "augment_pipe": None, "training_set_kwargs": {}}, file)
    data = file.getvalue()
    random = np.random.default_rng(0)
    file = tmp_path / "damaged.pkl"
    for position in random.integers(2, len(data), size=100):
        damaged = bytearray(data)
        damaged[position] ^= int(random.integers(1, 256))
        file.write_bytes(damaged)
        with contextlib.suppress(GanError):
            models.load(file)

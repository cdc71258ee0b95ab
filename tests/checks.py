"""What tests of several kinds ask of a call."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gan.errors import GanError


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """The one line that it is refused with."""
    with pytest.raises(GanError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What PyTorch makes tensors of, where nothing is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_child(function: Callable[[], Any]) -> Any:
    """What a forked process makes of it, by way of JSON."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return json.loads(data)
